"""Kept labels in other trainers: found by a column ``sample_id``, the student that of the teacher itself."""

from __future__ import annotations

import contextlib
import io
import warnings

import five
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import stillhouse
from stillhouse.api import KINDS, DatasetSplit, Method, hookimpl
from stillhouse.errors import CheckpointError, ConfigError, DataError
from stillhouse.kernels import softmax_kl
from stillhouse.softlabels import Form, SoftLabels
from stillhouse.softlabels.label import Recipe
from stillhouse.softlabels.places import place
from stillhouse.softlabels.writer import label_split

ROWS, BATCH, EPOCHS = 24, 4, 3


def rows(count: int = ROWS, first: int = 0) -> list[dict]:
    """Texts with a column of their numbers."""
    return [{**row, "sample_id": first + number} for number, row in enumerate(five.texts(count))]


def joined(given) -> dict[str, torch.Tensor]:
    """A padded batch, with the numbers."""
    numbers = (
        {"sample_id": torch.tensor([row["sample_id"] for row in given])} if "sample_id" in given[0] else {}
    )
    return {**five.padded(given), **numbers}


def teacher(seed: int = 2, sharp: float = 1.0) -> nn.Module:
    """``sharp``: of its logits, of which an untrained model has flat ones."""
    model = five.gpt2(seed, layers=3, width=24)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
    return model


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A store of a form, labelled once."""
    made: dict[Form, SoftLabels] = {}

    def labels(form: Form, **recipe) -> SoftLabels:
        if form not in made:
            split = DatasetSplit(rows(), fixed=True, collate=joined, kind=KINDS["causal_lm"])
            where = place(tmp_path_factory.mktemp("kept"))
            label_split(where, teacher(), split, Recipe(form, batch_size=5, **recipe), shard_samples=9)
            made[form] = SoftLabels.open(str(where))
        return made[form]

    return labels


EXACT = Form.choose(five.V, "dense", "float32")


def distillation(labels: SoftLabels | nn.Module, method: object = "kd") -> stillhouse.Distillation:
    """By labels, or by a teacher itself."""
    given = {"teacher": labels} if isinstance(labels, nn.Module) else {"soft_labels": labels}
    return stillhouse.Distillation(method, task="causal_lm", **given)


def sgd(groups) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def quiet(call):
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def hugging_face(
    labels, folder, *, broken: bool = False, method="kd", seed: int = 1, data=None, epochs: int = EPOCHS
) -> nn.Module:
    """Three epochs, shuffled; ``broken``: ended after seven updates and taken up at the fifth by another trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from stillhouse.adapters.hf import distilling

    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **named):
            control.should_training_stop = state.global_step == 7

    def trainer(**given):
        args = TrainingArguments(
            output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=BATCH,
            lr_scheduler_type="constant", save_strategy="steps" if broken else "no", save_steps=5, report_to=[], disable_tqdm=True,
            use_cpu=True, seed=42,
        )  # fmt: skip
        student = five.gpt2(seed)
        return distilling(Trainer)(
            model=student, args=args, train_dataset=data or rows(), data_collator=joined,
            distillation=distillation(labels, method), optimizers=(sgd(student.parameters()), None), **given,
        )  # fmt: skip

    def run():
        if broken:
            trainer(callbacks=[Ends()]).train()
        made = trainer()
        made.train(resume_from_checkpoint=str(folder / "checkpoint-5") if broken else None)
        assert made.state.global_step == len(data or rows()) // BATCH * epochs
        assert isinstance(labels, nn.Module) or made.step.teacher_calls == 0
        return made.model

    return quiet(run)


def lightning(labels, folder, *, broken: bool = False, method="kd", seed: int = 1, data=None) -> nn.Module:
    """The same; ``broken``: ended after an epoch."""
    import lightning as L

    from stillhouse.adapters.lightning import DistilledModule

    class Ends(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(folder / "first.ckpt")
            trainer.should_stop = True

    def fit(callbacks=(), path=None):
        given = data or rows()
        module = DistilledModule(five.gpt2(seed), distillation(labels, method), optimizer=sgd, seed=42)
        sampler = DistributedSampler(given, 1, 0, shuffle=True, seed=3)  # another order every epoch
        trainer = L.Trainer(
            max_epochs=EPOCHS, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, logger=False, callbacks=list(callbacks), default_root_dir=folder,
        )  # fmt: skip
        loader = DataLoader(given, batch_size=BATCH, sampler=sampler, collate_fn=joined)
        trainer.fit(module, loader, ckpt_path=path, **({"weights_only": True} if path else {}))
        return trainer, module

    def run():
        if broken:
            fit([Ends()])
        trainer, module = fit(path=str(folder / "first.ckpt") if broken else None)
        assert trainer.global_step == ROWS // BATCH * EPOCHS
        assert isinstance(labels, nn.Module) or module.step.teacher_calls == 0
        return module.student

    return quiet(run)


TRAINERS = {"hugging face": hugging_face, "lightning": lightning}
every_trainer = pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS.keys())


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("broken", [False, True], ids=["unbroken", "resumed"])
@every_trainer
def test_from_dense_float32_it_is_the_one_that_asked_the_teacher(train, broken, kept, tmp_path):
    mine, online = train(kept(EXACT), tmp_path / "a", broken=broken), train(teacher(), tmp_path / "b")
    moved = (weights(online) - weights(five.gpt2(1))).abs().max()
    assert moved > 0.01, "it was trained"
    assert (weights(mine) - weights(online)).abs().max() <= 1e-6


@every_trainer
def test_ids_matter(train, kept, tmp_path):
    """The test above fails where rows have each other's labels."""
    turned = [{**row, "sample_id": (row["sample_id"] + 1) % ROWS} for row in rows()]
    lengths = {len(row["labels"]) for row in turned}
    assert len(lengths) > 1
    with pytest.raises(
        DataError, match=r"sample \d+ has \d+ rows in soft labels .* and \d+ in this batch's mask"
    ):
        train(kept(EXACT), tmp_path, data=turned)


FORMS = [
    (Form.choose(five.V, "dense", "float16"), {}),
    (Form.choose(five.V, "topk", "uint8", five.V), {}),
    (Form.choose(five.V, "hidden", width=24), {"head": "lm_head"}),
]
FEWER = [Form.choose(five.V, "topk", "uint8", 32), Form.choose(five.V, "sampled", None, 50)]
PLAIN = {"name": "kd", "temperature": 1.0}
SHARP, MANY = 4.0, 320


def divergence(model: nn.Module) -> float:
    """From the teacher, on texts that nobody trained on."""
    batch = five.padded(five.texts(64, seed=9))
    mask = batch.pop("attention_mask").bool()
    own, given = model.eval(), teacher(sharp=SHARP).eval()
    with torch.no_grad():
        return float(softmax_kl(own(batch["input_ids"]).logits[mask], given(batch["input_ids"]).logits[mask]))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "recipe"), FORMS, ids=[str(form) for form, _ in FORMS])
def test_from_the_other_forms_it_is_as_good_within_the_noise_of_three_seeds(form, recipe, tmp_path):
    """A top k of fewer classes, and draws, are held to it in ``softlabels/test_training.py``."""
    data = rows(MANY)
    split = DatasetSplit(data, fixed=True, collate=joined, kind=KINDS["causal_lm"])
    label_split(tmp_path / "kept", teacher(sharp=SHARP), split, Recipe(form, **recipe))

    def found(labels):
        made = [
            hugging_face(labels, tmp_path / f"{seed}", method=PLAIN, seed=10 + seed, data=data, epochs=2)
            for seed in range(3)
        ]
        return torch.tensor([divergence(model) for model in made])

    mine, online = found(SoftLabels.open(tmp_path / "kept")), found(teacher(sharp=SHARP))
    noise = torch.cat([mine - mine.mean(), online - online.mean()]).square().mean().sqrt()
    print(f"{form}: {mine.mean():.4f}, online {online.mean():.4f}, noise {noise:.4f}")
    assert abs(float(mine.mean() - online.mean())) < 2 * float(noise)


def attached(labels, method="kd", probe=None, **given):
    described = stillhouse.Distillation(method, task="causal_lm", soft_labels=labels, **given)
    return described.attach(five.gpt2(1), probe=joined(rows(4)) if probe is None else probe, steps=2)


class Blurs(Method):
    """Changes what models read."""

    api_version = 1
    requires = frozenset({"logits"})
    supports = frozenset({"causal_lm"})

    @hookimpl
    def batch_transform(self, batch):
        return None


class TestAttaching:
    """What doesn't fit is told before the first step."""

    def test_a_batch_without_ids(self, kept):
        with pytest.raises(
            ConfigError, match=r"found by sample id, and this batch has none; expected .* 'sample_id'"
        ):
            attached(kept(EXACT), probe=five.padded(rows(4)))

    def test_a_sample_that_is_not_there(self, kept):
        with pytest.raises(DataError, match=r"sample 24 is not in soft labels .*, which hold 24 samples"):
            attached(kept(EXACT), probe=joined(rows(4, first=21)[3:]))

    def test_a_sample_with_other_rows(self, kept):
        with pytest.raises(DataError, match=r"has \d+ rows in soft labels .*, and \d+ in this batch's mask"):
            attached(kept(EXACT), probe=joined(rows(4, first=3)))

    def test_other_outputs_than_the_students(self, kept, tmp_path):
        split = DatasetSplit(rows(), fixed=True, collate=joined, kind=KINDS["causal_lm"])

        class Wide(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = teacher()

            def forward(self, **inputs):
                return nn.functional.pad(self.inner(**inputs).logits, (0, 3))

        for number, form in enumerate([Form.choose(five.V + 3), Form.choose(five.V + 3, "topk", None, 5)]):
            where = place(tmp_path / str(number))
            labels = label_split(where, Wide(), split, Recipe(form))
            with pytest.raises(ConfigError, match=rf"outputs of shape \(4, \d+, {five.V + 3}\), the student"):
                attached(
                    labels, {"name": "dkd"} if number == 0 else {"name": "logit_std", "temperature": 1.0}
                )

    def test_a_method_that_changes_inputs(self, kept):
        with pytest.raises(
            CheckpointError, match=r"made with transform = 'none', this run has .*inputs changed by"
        ):
            attached(kept(EXACT), ["kd", Blurs()])

    def test_a_method_that_reads_hidden_layers(self, kept):
        layers = {"transformer.h.0.mlp": "transformer.h.1.mlp"}
        with pytest.raises(ConfigError, match="needs a teacher, and there is none"):
            attached(kept(EXACT), ["kd", {"name": "fitnets", "layers": layers}])
        with pytest.raises(
            ConfigError, match="reads the teacher's hidden layers, and kept labels stand in its place"
        ):
            attached(kept(EXACT), ["kd", {"name": "fitnets", "layers": layers}], teacher=teacher())

    def test_another_temperature_than_the_forms(self, kept):
        for form in FEWER:
            with pytest.raises(
                ConfigError, match=r"has temperature = 4, and soft labels .* have a meaning at 1 alone"
            ):
                attached(kept(form))
            attached(kept(form), PLAIN).close()

    def test_another_teacher_beside_them(self, kept):
        attached(kept(EXACT), teacher=teacher()).close()
        with pytest.raises(CheckpointError, match="made with teacher = '"):
            attached(kept(EXACT), teacher=teacher(3))
        with pytest.raises(ConfigError, match="stand in one teacher's place; got 2: a, b"):
            attached(kept(EXACT), teacher={"a": teacher(), "b": teacher(3)})

    def test_ids_that_are_no_numbers(self, kept):
        probe = joined(rows(4))
        for wrong, said in (
            (["a", "b", "c", "d"], "sample ids are strings"),
            (torch.rand(4), r"sample ids are torch.float32 \(4,\)"),
            (torch.arange(8).reshape(4, 2), r"sample ids are torch.int64 \(4, 2\)"),
        ):
            with pytest.raises(DataError, match=said):
                attached(kept(EXACT), probe={**probe, "sample_id": wrong})
        with pytest.raises(DataError, match="got ids twice"):
            attached(kept(EXACT), probe={**probe, "ids": probe["sample_id"]})


def test_rows_to_evaluate_on_have_ids_of_their_own(kept, tmp_path):
    """A batch with no id is refused, as one with the id of another row would give a wrong number."""
    step = attached(kept(EXACT))
    with step, torch.no_grad():
        assert torch.isfinite(step(step.run.student, joined(rows(4))).loss)
        with pytest.raises(DataError, match="behind the training rows', and are labelled with them"):
            step(step.run.student, five.padded(five.texts(4)))
