"""distilling(Seq2SeqTrainer): an encoder and a decoder, as T5 has them, generation while evaluating among them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

import stillhouse
from stillhouse.adapters.hf import distilling

V = 40


def t5(seed: int, layers: int = 1, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=V, d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=layers, num_heads=2,
            dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, initializer_factor=1.0,
        )
    )  # fmt: skip


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 10, (count, 2), generator=draw).tolist()
    return [
        {
            "input_ids": torch.randint(2, V, (source,), generator=draw),
            "labels": torch.randint(2, V, (target,), generator=draw),
        }
        for source, target in lengths
    ]


def padded(items):
    ids = nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], True, 0)
    labels = nn.utils.rnn.pad_sequence([item["labels"] for item in items], True, -100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def made(tmp_path, method="kd", *, given=None, **args):
    args = {
        "output_dir": str(tmp_path), "max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 16,
        "learning_rate": 0.02, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "use_cpu": True, **args,
    }  # fmt: skip
    return distilling(Seq2SeqTrainer)(
        model=t5(1),
        args=Seq2SeqTrainingArguments(**args),
        train_dataset=rows(16),
        eval_dataset=rows(16),
        data_collator=padded,
        distillation=stillhouse.Distillation(method, teacher=t5(2, 2, 24), task="seq2seq_lm"),
        **(given or {}),
    )


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def by_hand() -> float:
    """KD's loss in float64, each pair alone."""
    student, teacher = t5(1).double(), t5(2, 2, 24).double()
    total, count = 0.0, 0
    for row in rows(16):
        given = {"input_ids": row["input_ids"][None], "labels": row["labels"][None]}
        own, answers = student(**given).logits[0], teacher(**given).logits[0]
        soft, wanted = (own / 4).log_softmax(-1), (answers / 4).log_softmax(-1)
        total += 0.9 * 16 * float((wanted.exp() * (wanted - soft)).sum())
        total += 0.1 * -float(own.log_softmax(-1)[torch.arange(len(own)), row["labels"]].sum())
        count += len(own)
    return total / count


def test_the_loss_is_that_of_each_pair_alone(tmp_path):
    trainer = made(tmp_path, max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(by_hand(), rel=1e-6)


def test_generation_while_evaluating_gives_tokens_and_the_distillations_loss(tmp_path):
    seen = {}

    def metrics(prediction):
        seen["tokens"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"mean": float(prediction.predictions.mean())}

    trainer = made(
        tmp_path, predict_with_generate=True, generation_max_length=12, given={"compute_metrics": metrics}
    )
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(by_hand(), rel=1e-5)
    assert "eval_mean" in found
    batch = padded(rows(16))
    expected = t5(1).generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_length=12)
    assert torch.equal(torch.from_numpy(seen["tokens"])[:, : expected.shape[1]], expected)
    assert {"eval_kd.kl", "eval_kd.ce"} <= trainer.state.log_history[-1].keys()


def test_without_generation_evaluation_gives_logits(tmp_path):
    seen = {}

    def metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {}

    made(tmp_path, given={"compute_metrics": metrics}).evaluate()
    assert seen["shape"] == (*padded(rows(16))["labels"].shape, V)


@pytest.mark.parametrize("method", ["sld", ["kd", {"name": "fitnets", "layers": "last"}]], ids=str)
def test_stopped_and_resumed_equals_unbroken(tmp_path, method):
    whole = made(tmp_path / "a", method, max_steps=6)
    whole.train()
    assert not torch.equal(weights(whole.model), weights(t5(1)))
    made(tmp_path / "b", method, max_steps=6, save_strategy="steps", save_steps=3).train()
    again = made(tmp_path / "b", method, max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert torch.equal(weights(again.model), weights(whole.model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_both_kinds_changes_nothing(tmp_path, reentrant):
    plain = made(tmp_path)
    other = made(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    for trainer in (plain, other):
        trainer.train()
    assert (weights(plain.model) - weights(other.model)).abs().max() < 1e-6
