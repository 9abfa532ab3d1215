"""Students trained from stored labels beside those that ask the teacher."""

from __future__ import annotations

import making
import pytest
import torch
import toys

from stillhouse.kernels import softmax_kl
from stillhouse.softlabels import Form, SoftLabels

STEPS = 18  # three epochs of 48 samples in batches of 8


def store(folder, form: Form, teacher, rows: int = 48, **recipe) -> SoftLabels:
    split = toys.splits(rows).train
    return making.made(folder, form, split=split, teacher=teacher, shard_samples=rows // 3, **recipe)


def student(
    labels, *, seed: int = 0, steps: int = STEPS, parts: int = 1, method="kd", rows: int = 48, **training
):
    """Trained by kd, from the labels or from the teacher."""
    teacher = toys.net(16, seed=2)
    keep = None if labels is None else lambda *given: labels
    made = toys.loop(
        method, teacher=teacher, keep=keep, steps=steps, seed=seed, student=toys.net(8, seed=seed + 10),
        cache_teacher=labels is not None, data=toys.splits(rows), **training,
    )  # fmt: skip
    for _ in range(parts):
        made.run(steps // parts)
        state = made.state_dict()
    made.load_state_dict(state)
    if labels is not None:
        assert made.step.teacher_calls == 0
    return made.step.run.models["student"]


@pytest.mark.parametrize("training", [{}, {"micro_batch_size": 3}], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("parts", [1, 3], ids=["unbroken", "resumed"])
def test_from_dense_float32_it_is_the_one_that_asked_the_teacher(parts, training, tmp_path):
    labels = store(tmp_path, Form.choose(4, "dense", "float32"), toys.net(16, seed=2))
    mine, online = student(labels, parts=parts, **training), student(None, **training)
    for (name, got), expected in zip(mine.state_dict().items(), online.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6, msg=name)


def held_out(model) -> float:
    """KL from the teacher on inputs that nobody trained on."""
    inputs, _ = toys.rows(512, 99)
    with torch.no_grad():
        return float(softmax_kl(model.eval()(inputs), toys.net(16, seed=2).eval()(inputs)))


FORMS = [
    Form.choose(4, "dense", "float16"),
    Form.choose(4, "hidden", width=16),
    Form.choose(4, "topk", "uint8", 4),
    Form.choose(4, "topk", "uint8", 3),
    Form.choose(4, "sampled", None, 50),
]


# T = 1: neither a rest nor draws can be moved to another temperature. Two epochs: draws that are seen again and again
# are learnt by heart
SETTINGS = {
    "rows": 480,
    "steps": 120,
    "optimizer": {"lr": 5e-3},
    "method": {"name": "kd", "temperature": 1.0},
}


@pytest.fixture(scope="module")
def online() -> torch.Tensor:
    return torch.tensor([held_out(student(None, seed=seed, **SETTINGS)) for seed in range(3)])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_from_the_other_forms_it_is_as_good_within_the_noise_of_three_seeds(form, online, tmp_path):
    head = {"head": "3"} if form.kind == "hidden" else {}
    labels = store(tmp_path, form, toys.net(16, seed=2), 480, **head)
    mine = torch.tensor([held_out(student(labels, seed=seed, **SETTINGS)) for seed in range(3)])
    noise = torch.cat([mine - mine.mean(), online - online.mean()]).square().mean().sqrt()
    print(f"{form}: {mine.mean():.4f}, online {online.mean():.4f}, noise {noise:.4f}")
    assert abs(float(mine.mean() - online.mean())) < 2 * float(noise)
