"""distilling(Trainer): refusals, evaluation, logs, checkpoints, precision, PEFT, checkpointing, compiling."""

from __future__ import annotations

import copy

import five
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import stillhouse
from stillhouse.adapters.hf import distilling
from stillhouse.api import Method, hookimpl
from stillhouse.errors import CheckpointError, ConfigError, StillhouseError

FITNETS = ["kd", {"name": "fitnets", "layers": {"transformer.h.0.mlp": "transformer.h.1.mlp"}}]


def made(tmp_path, method="kd", *, base=Trainer, student=None, teacher=None, data=None, given=None, **args):
    data = five.texts(16) if data is None else data
    args = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **args,
    }
    teacher = teacher or five.gpt2(2, layers=3, width=24)
    return distilling(base)(
        model=student or five.gpt2(1),
        args=TrainingArguments(**args),
        train_dataset=data,
        eval_dataset=data,
        data_collator=five.padded,
        distillation=stillhouse.Distillation(method, teacher=teacher, task="causal_lm"),
        **(given or {}),
    )


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


class TestRefusals:
    """Before step 0, with the reason."""

    def test_a_class_that_is_no_trainer(self):
        with pytest.raises(TypeError, match="Trainer"):
            distilling(nn.Linear)

    def test_settings_of_a_loss_that_is_not_computed(self, tmp_path):
        with pytest.raises(ConfigError, match="label_smoothing_factor"):
            made(tmp_path, label_smoothing_factor=0.1)
        with pytest.raises(ConfigError, match="compute_loss_func"):
            made(tmp_path, given={"compute_loss_func": lambda *given, **named: None})

    def test_a_method_that_makes_the_update_itself(self, tmp_path):
        class Own(Method):
            api_version = 1
            requires = frozenset({"logits", "student_update"})

            @hookimpl
            def student_update(self, loss):
                return True

        with pytest.raises(ConfigError, match="student_update"):
            made(tmp_path, Own())

    def test_a_target(self, tmp_path):
        distillation = stillhouse.Distillation(
            "sld", teacher=five.gpt2(2), target=five.gpt2(3), task="causal_lm"
        )
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
        with pytest.raises(ConfigError, match="target"):
            distilling(Trainer)(
                model=five.gpt2(1),
                args=args,
                train_dataset=five.texts(4),
                data_collator=five.padded,
                distillation=distillation,
            )

    def test_an_empty_training_set(self, tmp_path):
        with pytest.raises(StillhouseError, match="empty"):
            made(tmp_path, data=[], max_steps=2)


def test_attaching_draws_no_random_number(tmp_path):
    trainer = made(tmp_path, FITNETS)
    own = torch.get_rng_state()
    Trainer(trainer.model, trainer.args, train_dataset=five.texts(4))
    assert torch.equal(own, torch.get_rng_state())


def test_evaluate_gives_the_loss_of_each_batch_and_its_terms(tmp_path):
    trainer = made(tmp_path, per_device_eval_batch_size=16)
    found = trainer.evaluate()
    batch = five.padded(trainer.eval_dataset)
    with torch.no_grad():
        expected = trainer.step(trainer.model, batch).loss
    assert found["eval_loss"] == pytest.approx(float(expected), rel=1e-6)
    assert {"eval_kd.kl", "eval_kd.ce"} <= trainer.state.log_history[-1].keys()


def test_padding_on_the_left_gives_the_same_loss_where_places_are_given():
    student, rows = five.gpt2(1), five.texts(4)
    right = five.padded(rows)
    left = {name: value.clone() for name, value in right.items()}
    for i, row in enumerate(rows):
        for name, value in left.items():
            left[name][i] = value[i].roll(value.shape[1] - len(row["input_ids"]))
    places = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    distillation = stillhouse.Distillation("kd", teacher=five.gpt2(2), task="causal_lm")
    with distillation.attach(student, probe=right) as step, torch.no_grad():
        expected = float(step(student, right).loss)
        assert float(step(student, {**left, "position_ids": places}).loss) == pytest.approx(
            expected, rel=1e-6
        )
        # transformers' GPT-2 counts pads as places
        assert float(step(student, left).loss) != pytest.approx(expected, rel=1e-6)


def test_evaluate_is_the_mean_over_the_rows_whatever_the_batches(tmp_path):
    rows = five.texts(10)
    rows[3]["attention_mask"][:] = 0  # no row of it counts: alone it enters as nothing
    for row in rows[5:8]:
        row["labels"][2:] = -100
    rows[8]["labels"][:] = -100
    trainer = made(tmp_path, FITNETS, data=rows, teacher=five.gpt2(2, layers=3, width=24))
    for row in rows:  # positions without a label count for the terms against the teacher
        row["mask"] = row["attention_mask"].bool()

    def joined(items):
        mask = nn.utils.rnn.pad_sequence([row["mask"] for row in items], True, False)
        return {**five.padded(items), "mask": mask}

    trainer.data_collator = joined
    found = {}
    for size in (1, 3, 8, 10):
        trainer.args.per_device_eval_batch_size = size
        found[size] = trainer.evaluate()
    with torch.no_grad():
        whole = trainer.step(trainer.model, joined(rows))
    assert whole.counts[0] != whole.counts[1]
    for metrics in found.values():
        for name in ("loss", "kd.kl", "kd.ce", "fitnets.hint"):
            assert metrics[f"eval_{name}"] == pytest.approx(float(whole.metrics[name]), rel=1e-5), name
    assert trainer.state.log_history[-1]["eval_loss"] == found[10]["eval_loss"]
    trainer.args.per_device_eval_batch_size = 3
    predicted = trainer.predict(rows).metrics
    assert predicted["test_kd.ce"] == pytest.approx(float(whole.metrics["kd.ce"]), rel=1e-5)


def test_evaluate_gives_logits_and_labels_to_compute_metrics(tmp_path):
    seen = {}

    def metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    found = made(tmp_path, given={"compute_metrics": metrics}).evaluate()
    assert "eval_right" in found
    assert seen["shape"][-1] == five.V


def test_terms_are_logged_by_name_and_sum_to_the_loss(tmp_path):
    trainer = made(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "kd.kl" in row]
    assert len(rows) == 4
    for row in rows:
        assert 0.9 * row["kd.kl"] + 0.1 * row["kd.ce"] == pytest.approx(row["loss"], rel=1e-5)


def test_what_is_trained_beside_the_student_is_optimized_cleared_and_clipped_with_it(tmp_path):
    norms = []
    trainer = made(tmp_path, FITNETS, max_grad_norm=1e-3)
    regressor = trainer.step.run.models["fitnets.regressor"]
    start = weights(regressor)
    step = trainer.create_optimizer().step

    def look(*given, **named):
        every = [p for group in trainer.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(nn.utils.get_total_norm([p.grad for p in every])))
        return step(*given, **named)

    trainer.optimizer.step = look
    trainer.train()
    assert norms == pytest.approx([1e-3] * 4, rel=1e-3)
    assert not torch.equal(weights(regressor), start)
    assert all(p.grad is None for p in regressor.parameters())


@pytest.mark.parametrize("method", ["sld", FITNETS], ids=str)
def test_stopped_and_resumed_equals_unbroken_and_the_checkpoint_holds_no_teacher(tmp_path, method):
    whole = made(tmp_path / "a", method, max_steps=6)
    whole.train()
    first = made(tmp_path / "b", method, max_steps=6, save_strategy="steps", save_steps=3)
    first.train()
    again = made(tmp_path / "b", method, max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert torch.equal(weights(again.model), weights(whole.model))
    assert again.step.state_dict()["position"] == whole.step.state_dict()["position"]
    folder = tmp_path / "b" / "checkpoint-3"
    loaded = type(whole.model).from_pretrained(folder)
    assert loaded.state_dict().keys() == whole.model.state_dict().keys()
    teacher = sum(p.numel() for p in five.gpt2(2, layers=3, width=24).parameters()) * 4
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3 * teacher
    torch.load(folder / "distillation.pt", weights_only=True)


def test_a_checkpoint_that_was_changed_or_is_anothers_is_refused(tmp_path):
    made(tmp_path, save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    with pytest.raises(CheckpointError, match="sld"):
        made(tmp_path, "sld").train(resume_from_checkpoint=str(folder))
    content = bytearray((folder / "distillation.pt").read_bytes())
    content[-40] ^= 1
    (folder / "distillation.pt").write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="digest"):
        made(tmp_path).train(resume_from_checkpoint=str(folder))
    (folder / "distillation.pt").unlink()
    with pytest.raises(CheckpointError, match=r"distillation\.pt"):
        made(tmp_path).train(resume_from_checkpoint=str(folder))


def test_training_twice_starts_anew(tmp_path):
    trainer = made(tmp_path, "sld")
    trainer.train()
    trainer.train()
    assert trainer.step.schedule.at.step == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_both_kinds_changes_nothing(tmp_path, reentrant):
    plain, checkpointed = (
        made(tmp_path),
        made(
            tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        ),
    )
    for trainer in (plain, checkpointed):
        trainer.train()
    assert (weights(plain.model) - weights(checkpointed.model)).abs().max() < 1e-6


def test_bf16_trains_beside_float32(tmp_path):
    exact, half = made(tmp_path, FITNETS), made(tmp_path, FITNETS, bf16=True)
    for trainer in (exact, half):
        trainer.train()
    difference = (weights(exact.model) - weights(half.model)).norm() / weights(exact.model).norm()
    assert 0 < difference < 1e-2


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        pytest.param("kd", "aot_eager", marks=pytest.mark.slow),
        (FITNETS, "aot_eager"),
        pytest.param("kd", "inductor", marks=pytest.mark.slow),
        pytest.param(FITNETS, "inductor", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_compiled_student_trains_alike(tmp_path, method, backend):
    plain = made(tmp_path, method)
    compiled = made(tmp_path, method, torch_compile=True, torch_compile_backend=backend)
    for trainer in (plain, compiled):
        trainer.train()
    assert (weights(plain.model) - weights(compiled.model)).abs().max() < 1e-5


def lora(model: nn.Module) -> nn.Module:
    import peft

    torch.manual_seed(7)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def test_a_lora_student_may_be_taught_by_its_own_base(tmp_path):
    base = five.gpt2(1)
    outside, inside = made(tmp_path / "a", student=lora(five.gpt2(1)), teacher=base), None
    outside.train()
    inside = made(tmp_path / "b", student=lora(five.gpt2(1)), teacher="self")
    inside.train()
    assert outside.state.log_history[0]["kd.kl"] > 1e-6
    assert (weights(outside.model) - weights(inside.model)).abs().max() < 1e-6
    inside.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_packed_texts_give_the_loss_of_texts_apart(tmp_path):
    texts = five.texts(4)
    ids = torch.cat([row["input_ids"] for row in texts])
    places = torch.cat([torch.arange(len(row["input_ids"])) for row in texts])
    packed = {
        "input_ids": ids[None],
        "position_ids": places[None],
        "labels": ids.where(places > 0, -100)[None],
    }
    trainer = made(tmp_path, given={}, data=texts)
    with torch.no_grad():
        apart = trainer.step(trainer.model, five.padded(texts)).loss
        together = trainer.step(trainer.model, packed).loss
    assert abs(float(apart - together)) < 1e-6


def test_ragged_batches_equal_a_float64_loss_by_hand_over_the_real_tokens(tmp_path):
    student, teacher = five.gpt2(1), five.gpt2(2, layers=3, width=24)
    trainer = made(
        tmp_path,
        student=copy.deepcopy(student),
        teacher=teacher,
        max_steps=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    student, teacher = student.double(), copy.deepcopy(teacher).double()
    total, rows = 0.0, 0
    for row in five.texts(16):
        ids = row["input_ids"][None]
        own, given = (
            student(ids).logits[0, :-1].log_softmax(-1),
            (teacher(ids).logits[0, :-1] / 4).log_softmax(-1),
        )
        soft = (student(ids).logits[0, :-1] / 4).log_softmax(-1)
        kl = 16 * (given.exp() * (given - soft)).sum()
        ce = -own[torch.arange(len(own)), ids[0, 1:]].sum()
        total, rows = total + 0.9 * kl + 0.1 * ce, rows + len(own)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(total) / rows, rel=1e-6)


def test_a_teacher_goes_to_the_students_device_save_one_that_was_spread(tmp_path):
    from stillhouse.adapters.host import place

    plain, spread = nn.Linear(2, 2), nn.Linear(2, 2)
    spread.hf_device_map = {"": "cpu"}
    place(stillhouse.Distillation("kd", teacher={"a": plain, "b": spread}), torch.device("meta"))
    assert plain.weight.device.type == "meta"
    assert spread.weight.device.type == "cpu"


def test_a_mask_that_leaves_no_token_is_refused_in_the_constructor(tmp_path):
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in five.texts(4)]
    with pytest.raises(StillhouseError, match="no position of the probe counts"):
        made(tmp_path, data=rows)


def test_an_update_without_a_token_changes_nothing(tmp_path):
    rows = five.texts(8)
    rows[4:] = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows[4:]]
    trainer = made(tmp_path, data=rows, max_steps=1)
    trainer.train()
    once = weights(trainer.model)
    trainer = made(tmp_path, data=rows, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[1]["loss"] == 0
    assert torch.equal(weights(trainer.model), once)


def test_texts_longer_than_the_positions_are_refused(tmp_path):
    ids = torch.ones(40, dtype=torch.long)
    rows = [{"input_ids": ids, "attention_mask": ids, "labels": ids}] * 4
    with pytest.raises(StillhouseError, match="40 tokens, and GPT2LMHeadModel has 32 positions"):
        made(tmp_path, data=rows)
