"""Silent errors of distillation software, each under the number that it has in the table of the docs.

Rows 2, 4 to 7 and 11 are the kernels': test_kernel_pitfalls.py. Each test was seen to fail on the wrong behaviour.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
import toys
import yaml
from torch import nn

import stillhouse
from stillhouse.api import Batch, Splits, TensorSplit
from stillhouse.config import read
from stillhouse.contract import losses
from stillhouse.errors import CheckpointError, ConfigError, PluginError
from stillhouse.runs.evaluate import Sealed
from stillhouse.runs.resolve import resolve
from stillhouse.softlabels import SoftLabels, write_soft_labels
from stillhouse.training.labels import keep
from stillhouse.training.loop import micro_batches
from stillhouse.training.step import DistillStep

EVEN = {"name": "sld", "shares": (1, 1, 1)}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("method", ["hard_labels", "kd", "sld"])
def test_1_the_loss_depends_on_how_the_batch_is_split(method, parts):
    x, y = toys.rows(16)
    y[:5] = -100  # so that the micro-batches hold unequal numbers of labels
    batch = Batch(x, y, mask=torch.arange(16) != 7)
    gradients = []
    for count in (1, parts):
        student = toys.net(seed=1)
        teacher = None if method == "hard_labels" else toys.net(16, seed=2)
        step = DistillStep(method, student=student, teacher=teacher, probe=batch, steps=9)
        micro = micro_batches(batch, 16 // count)
        step.begin_update(micro)
        for part in micro:
            step(student, part)[0].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in student.parameters()]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()


@pytest.mark.parametrize("method", [{"name": "kd", "alpha": 1.0}, "sld"])
def test_3_temperature_does_not_reach_the_loss_or_t_squared_is_missing(method):
    """In the step as a run makes it. Without T^2 the norm falls about 64 times; unused, the ratio is 1."""
    method = {"name": method} if isinstance(method, str) else method
    norms = []
    for temperature in (1.0, 8.0):
        student = toys.net(seed=1)
        step = DistillStep(
            {**method, "temperature": temperature},
            student=student,
            teacher=toys.net(16, seed=2),
            probe=toys.rows(4),
            steps=9,
        )
        step(student, toys.rows(64))[0].backward()
        norms.append(
            torch.cat([parameter.grad.flatten() for parameter in student.parameters()]).norm().item()
        )
    ratio = norms[1] / norms[0]
    assert 0.2 < ratio < 5
    assert abs(ratio - 1) > 1e-3


def test_8_cached_labels_are_found_by_global_step():
    """By sample id instead: over three shuffled epochs each row gets its own label."""
    data, teacher = toys.splits(train=20), toys.net(16, seed=2)
    seen = []
    loop = toys.loop("kd", teacher=teacher, data=data, keep=keep, steps=9, batch_size=7)
    terms = loop.step.plugins.loss_terms
    loop.step.plugins.loss_terms = lambda student_out, teacher_out, targets, batch, info: (
        seen.append((batch.ids, batch.inputs, teacher_out.logits)),
        terms(student_out, teacher_out, targets, batch, info),
    )[1]
    loop.run()
    assert loop.step.teacher_calls < 9, "the labels were kept"
    ids = torch.cat([ids for ids, _, _ in seen])
    assert len(ids) == 63 > 3 * 20
    assert ids[:20].tolist() != ids[20:40].tolist(), "shuffled anew"
    for ids, inputs, logits in seen:
        assert torch.equal(inputs, data.train.inputs[ids])
        torch.testing.assert_close(logits, teacher(inputs), rtol=1e-5, atol=1e-6)


def test_8_cached_labels_are_right_after_a_resume():
    data, teacher = toys.splits(), toys.net(16, seed=2)
    broken = toys.loop("kd", teacher=teacher, data=data, keep=keep)
    broken.run(5)
    resumed = toys.loop("kd", teacher=teacher, data=data, keep=keep)
    resumed.load_state_dict(copy.deepcopy(broken.state_dict()))
    resumed.run()
    unbroken = toys.loop("kd", teacher=teacher, data=data, keep=keep)
    unbroken.run()
    assert toys.same_bits(resumed.model, unbroken.model)


@pytest.mark.parametrize("field", ["model", "data", "stage"])
def test_9_a_cache_of_something_else_is_read_without_a_word(field, tmp_path):
    made_from = {"model": "a", "data": "b", "stage": "c"}
    device = torch.device("cpu")
    write_soft_labels(toys.net(), toys.splits().train, made_from, device=device)[0].save(tmp_path / "x")
    with pytest.raises(CheckpointError, match=f"were made with {field} = "):
        SoftLabels.load(tmp_path / "x", {**made_from, field: "another"}, device)


def test_9_a_directory_of_another_teacher_is_read_without_a_word(tmp_path):
    given = {"steps": 3, "batch_size": 8, "device": "cpu", "dir": tmp_path / "run"}
    stillhouse.distill(toys.net(seed=1), toys.net(16, seed=2), toys.rows(20), **given)
    with pytest.raises(CheckpointError, match=r"another teacher"):
        stillhouse.distill(toys.net(seed=1), toys.net(16, seed=3), toys.rows(20), **given)


@pytest.mark.parametrize("forgets", ["stage", "generators", "projector", "stand-in", "scheduler"])
def test_12_resume_forgets(forgets, tmp_path):
    """Killing processes: tests/engine/test_resume.py. Here each thing by its name, at every update."""
    from test_loop import TestAuxiliary, augmented, through_a_file  # ours, next door

    method = TestAuxiliary.Projects if forgets == "projector" else lambda: EVEN
    given = {
        "data": augmented(toys.splits()) if forgets == "stand-in" else toys.splits(),
        "keep": None if forgets == "stand-in" else lambda loop, split, _: keep(loop, split, tmp_path),
        "scheduler": "CosineAnnealingLR" if forgets == "scheduler" else None,
        "steps": 6,
    }
    make = lambda: toys.loop(
        method(), student=toys.net(seed=1, dropout=0.5 * (forgets == "generators")), **given
    )
    unbroken = make()
    unbroken.run()
    for update in range(1, 6):
        broken, resumed = make(), make()
        broken.run(update)
        resumed.load_state_dict(through_a_file(broken.state_dict()))
        resumed.run()
        for name, model in unbroken.step.run.models.items():
            assert toys.same_bits(model, resumed.step.run.models[name]), (name, update)


def test_13_hooks_on_a_class_let_two_runs_overwrite_each_other():
    """Two methods that capture features of models of one class, taking turns."""
    from test_loop import TestAuxiliary

    def make(seed):
        return toys.loop(
            TestAuxiliary.Projects(),
            student=toys.net(seed=seed, dropout=0.3),
            teacher=toys.net(16, seed=seed + 10),
            seed=seed,
        )

    alone = [make(seed) for seed in (1, 2)]
    for loop in alone:
        loop.run()
    turns = [make(seed) for seed in (1, 2)]
    done = [False, False]
    while not all(done):
        done = [loop.run(1) for loop in turns]
    for one, other in zip(alone, turns, strict=True):
        assert toys.same_bits(one.model, other.model)
    one, other = (loop.step for loop in turns)
    x = toys.rows(5)[0]
    expected = one.run.student[:2].eval()(x)
    with one.captures.collecting("student"), other.captures.collecting("student"):
        one.run.student(x)
        other.run.student(x * 2)
    assert torch.equal(one.captures.take("student")["1"], expected), (
        "another model of the class ran in between"
    )


def test_14_a_plugin_that_can_not_be_imported_is_skipped(install):
    install("acme", "[stillhouse.methods]\nmine = acme_broken:Mine\n", acme_broken="import no_such_library")
    student = toys.net(seed=1)
    before = toys.weights(student)
    with pytest.raises(PluginError, match=r"method plugin 'mine' \(acme 1\.2\) can't be loaded") as caught:
        stillhouse.distill(student, toys.net(16, seed=2), toys.rows(20), method=["kd", "mine"], steps=3)
    assert "no_such_library" in str(caught.value)
    assert toys.same_bits(before, student)


@pytest.mark.parametrize("method", ["kd", EVEN])
def test_15_the_teacher_is_trained_or_in_train_mode_or_in_every_checkpoint(method):
    teacher = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4)).train()
    before, modes = toys.weights(teacher), []
    teacher.register_forward_hook(
        lambda module, given, out: modes.append(any(m.training for m in module.modules()))
    )
    loop = toys.loop(method, teacher=teacher)
    loop.run()
    assert toys.same_bits(before, toys.weights(teacher))
    assert modes
    assert not any(modes)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    optimized = {id(parameter) for group in loop.optimizer.param_groups for parameter in group["params"]}
    assert not optimized & {id(parameter) for parameter in teacher.parameters()}
    assert set(loop.state_dict()["models"]) == {"student"}


def test_16_the_test_split_is_looked_at_before_the_end():
    reads = []

    class Watched(TensorSplit):
        def batch(self, index):
            reads.append("test")
            return super().batch(index)

    class Looks(toys.Squares):
        @stillhouse.api.hookimpl
        def on_run_start(self, run):
            assert run.splits.test is None, "no plugin sees it"

        @stillhouse.api.hookimpl
        def on_update_end(self, info):
            reads.append("update")

    made = toys.splits()
    data = Splits(made.train, made.validation, Watched(*toys.rows(16, 3)))
    summary = stillhouse.distill(
        toys.net(seed=1), None, data, method=Looks(), steps=6, batch_size=8, device="cpu", validate_every=2
    ).summary
    assert summary["test_opened"] == 1
    last = len(reads) - 1 - reads[::-1].index("update")
    first = reads.index("update")
    assert "test" not in reads[first:last]
    assert reads[last + 1 :] == ["test"], "one pass, after the last update"
    sealed = Sealed(data.test)
    sealed.open()
    with pytest.raises(RuntimeError, match=r"it opens once"):
        sealed.open()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("stpes: 3", "stpes: unknown; did you mean 'steps'?"),
        ("optimizer: {lrr: 3}", "optimizer.lrr: AdamW has no such argument; did you mean 'lr'?"),
        ("method: {name: kd, temprature: 3}", "method.temprature: unknown; did you mean 'temperature'?"),
        ("task: {name: digits, labeled: 3}", "task.labeled: unknown; did you mean 'labelled'?"),
        ("student: {name: mlp, hiden: 3}", "student.hiden: unknown; did you mean 'hidden'?"),
        ("teacher: {name: mlp, train: {stpes: 3}}", "teacher.train.stpes: unknown; did you mean 'steps'?"),
    ],
)
def test_17_a_misspelt_key_is_ignored(line, said, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"task": "digits", "method": "kd", **yaml.safe_load(line)}))
    with pytest.raises(ConfigError) as caught:
        resolve(read(str(path)))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "x: !!python/object/apply:os.mkdir ['MARK']",
        "x: !!python/object/new:os.mkdir ['MARK']",
        "x: !!python/name:os.mkdir",
        "x: !import_call {key: os.mkdir, init: {args: ['MARK']}}",
        "method: {name: kd, _target_: os.mkdir, path: 'MARK'}",
        "method: os.mkdir",
        "method: 'os:mkdir'",
        "student: 'torch.nn:Linear'",
        "task: 'os:mkdir'",
        "optimizer: 'os:mkdir'",
        "scheduler: {name: LambdaLR, lr_lambda: 'os.mkdir'}",
    ],
)
def test_18_the_config_names_any_callable_to_run(line, tmp_path, cli, monkeypatch):
    mark = tmp_path / "ran"
    path = tmp_path / "evil.yaml"
    kept = [plain for plain in ("task: digits", "method: kd") if plain[:4] != line[:4]]
    path.write_text("\n".join([*kept, line.replace("MARK", str(mark))]))
    called = []
    monkeypatch.setattr(os, "mkdir", lambda *given, **more: called.append(given))
    said = cli("run", path, f"out={tmp_path / 'run'}")
    assert said.code == 2
    assert "Traceback" not in said.err
    assert not called
    assert not mark.exists()


@pytest.mark.parametrize("method", ["kd", EVEN, "hldm"], ids=str)
def test_the_kernel_is_what_the_methods_use(monkeypatch, method):
    """Row 2's premise: no method keeps a formula of its own."""
    called = []

    def recording(kernel):
        def recorded(*given, **named):
            called.append(named["temperature"])
            return kernel(*given, **named)

        return recorded

    for name in ("softmax_kl", "distillation_loss"):  # the second: the labels' term in the same pass
        monkeypatch.setattr(losses, name, recording(getattr(losses, name)))
    toys.loop(method, steps=3).run()
    assert called == [4.0] * 3
