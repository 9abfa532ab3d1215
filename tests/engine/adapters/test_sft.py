"""distilling(SFTTrainer): TRL's own preparation of data, packing, batches without padding, LoRA, its settings."""

from __future__ import annotations

import five
import pytest
import torch
from torch import nn

import stillhouse
from stillhouse.adapters.hf import distilling
from stillhouse.errors import ConfigError

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")


def words(count: int, seed: int = 0) -> list[str]:
    return [" ".join(map(str, row["input_ids"].tolist())) for row in five.texts(count, seed)]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {"<end>": 0, **{str(number): number for number in range(1, five.V)}}
    made = Tokenizer(models.WordLevel(known, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<end>", eos_token="<end>")


def made(tmp_path, rows=None, *, method="kd", student=None, teacher=None, given=None, **args):
    args = {
        "output_dir": str(tmp_path), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.05,
        "optim": "sgd", "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "max_length": 32,
        "gradient_checkpointing": False, "max_grad_norm": 0.0, **args,
    }  # fmt: skip
    rows = [{"text": text} for text in words(16)] if rows is None else rows
    return distilling(trl.SFTTrainer)(
        model=student or five.gpt2(1),
        args=trl.SFTConfig(**args),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        distillation=stillhouse.Distillation(
            method, teacher=teacher or five.gpt2(2, layers=3, width=24), task="causal_lm"
        ),
        **(given or {}),
    )


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def by_hand(rows: list[list[int]], first: list[int] | None = None) -> float:
    """KD's loss over the next tokens of texts, each alone, in float64; those before ``first`` do not count."""
    student, teacher = five.gpt2(1).double(), five.gpt2(2, layers=3, width=24).double()
    total, count = 0.0, 0
    for number, ids in enumerate(rows):
        ids = torch.tensor([ids])
        own, given = student(ids).logits[0, :-1], teacher(ids).logits[0, :-1]
        soft, answers = (own / 4).log_softmax(-1), (given / 4).log_softmax(-1)
        kl = 16 * (answers.exp() * (answers - soft)).sum(-1)
        ce = -own.log_softmax(-1)[torch.arange(len(own)), ids[0, 1:]]
        start = 0 if first is None else first[number] - 1
        total, count = total + (0.9 * kl + 0.1 * ce)[start:].sum().item(), count + len(own) - start
    return total / count


def tokens(texts: list[str]) -> list[list[int]]:
    return [[*map(int, text.split()), 0] for text in texts]  # TRL ends each text


def test_texts_that_trl_prepares_give_the_loss_by_hand(tmp_path):
    trainer = made(tmp_path, max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(by_hand(tokens(words(16))), rel=1e-6)


def test_prompts_do_not_count(tmp_path):
    texts = [text.split() for text in words(8)]
    rows = [{"prompt": " ".join(text[:2]) + " ", "completion": " ".join(text[2:])} for text in texts]
    trainer = made(tmp_path, rows, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    expected = by_hand([[*map(int, text), 0] for text in texts], [2] * 8)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("how", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=str)
def test_packed_rows_and_batches_without_padding_give_the_loss_of_texts_apart(tmp_path, how):
    texts = words(8)
    trainer = made(
        tmp_path, [{"text": text} for text in texts], max_steps=1, per_device_train_batch_size=8, **how
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert "position_ids" in batch
    assert len(batch["input_ids"]) == 1
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(by_hand(tokens(texts)), rel=1e-6)


def test_evaluation_and_the_logs_name_the_terms(tmp_path):
    trainer = made(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    rows = trainer.state.log_history
    training = [row for row in rows if "loss" in row]
    assert len(training) == 4
    for row in training:
        assert 0.9 * row["kd.kl"] + 0.1 * row["kd.ce"] == pytest.approx(row["loss"], rel=1e-5)
    evaluated = [row for row in rows if "eval_loss" in row]
    assert len(evaluated) == 2
    for row in evaluated:
        whole = 0.9 * row["eval_kd.kl"] + 0.1 * row["eval_kd.ce"]
        assert whole == pytest.approx(row["eval_loss"], rel=0.05)  # batches of unlike rows


def test_a_lora_student_made_by_trl_is_taught_by_its_own_base(tmp_path):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = made(tmp_path, teacher="self", given={"peft_config": config}, learning_rate=0.5)
    base = weights(five.gpt2(1))
    trainer.train()
    own = [row["kd.kl"] for row in trainer.state.log_history if "kd.kl" in row]
    assert own[0] == pytest.approx(0, abs=1e-7), "an adapter that does nothing yet gives its base's answers"
    assert own[-1] > 1e-8
    assert torch.equal(weights(trainer.model.unload()), base), "the base stayed as it was"


@pytest.mark.parametrize("reentrant", [False, True])
def test_trls_defaults_of_checkpointing_and_bf16_train_alike(tmp_path, reentrant):
    plain = made(tmp_path)
    checkpointed = made(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    half = made(
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        bf16=True,
    )
    for trainer in (plain, checkpointed, half):
        trainer.train()
    assert (weights(plain.model) - weights(checkpointed.model)).abs().max() < 1e-6
    assert 0 < (weights(plain.model) - weights(half.model)).norm() / weights(plain.model).norm() < 1e-2


def test_stopped_and_resumed_equals_unbroken(tmp_path):
    method = ["kd", {"name": "fitnets", "layers": {"transformer.h.0.mlp": "transformer.h.1.mlp"}}]
    whole = made(tmp_path / "a", method=method, max_steps=6)
    whole.train()
    made(tmp_path / "b", method=method, max_steps=6, save_strategy="steps", save_steps=3).train()
    again = made(tmp_path / "b", method=method, max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert torch.equal(weights(again.model), weights(whole.model))
    regressor = "fitnets.regressor"
    assert torch.equal(weights(again.step.run.models[regressor]), weights(whole.step.run.models[regressor]))


def test_settings_of_a_loss_that_is_not_computed_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="loss_type='dft'"):
        made(tmp_path, loss_type="dft")


def test_a_mixture_of_experts_own_term_is_refused_until_it_is_off(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    def mixture():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=five.V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, num_local_experts=2, max_position_embeddings=32,
            )
        )  # fmt: skip

    with pytest.raises(ConfigError, match=r"router_aux_loss_coef=0\.0"):
        made(tmp_path, student=mixture())
    trainer = made(tmp_path, student=mixture(), router_aux_loss_coef=0.0)
    trainer.train()
    assert trainer.state.log_history[0]["kd.kl"] > 0
