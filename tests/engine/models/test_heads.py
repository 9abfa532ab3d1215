"""The last layer left to the loss: the same numbers, and the model's own layer does not multiply."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import stillhouse
from stillhouse.contract.head import Head
from stillhouse.models import heads

V = 1100


def gpt2(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_positions=16, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0,
                   embd_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    )  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, V, (3, 9), generator=torch.Generator().manual_seed(0))
    real = (torch.arange(9) < torch.tensor([[9], [5], [3]])).long()
    return {"input_ids": ids, "attention_mask": real, "labels": ids.where(real.bool(), -100)}


def updated(method, monkeypatch, *, fused: bool):
    monkeypatch.setattr(heads, "SMALLEST", 1024 if fused else 10**9)
    student, teacher = gpt2(1), gpt2(2)
    widths = []
    with stillhouse.Distillation(method, teacher=teacher, task="causal_lm").attach(
        student, probe=batch(), steps=9
    ) as step:
        for model in (student, teacher):
            model.register_forward_hook(lambda module, given, out: widths.append(out.logits.shape[-1]))
        loss, _ = step(student, batch())
        loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()]), widths


@pytest.mark.parametrize("method", ["kd", "sld", {"name": "kd", "alpha": 1.0}], ids=str)
def test_loss_and_gradient_are_those_of_the_logits_and_nobody_makes_them(method, monkeypatch):
    loss, gradient, wide = updated(method, monkeypatch, fused=False)
    own, its, narrow = updated(method, monkeypatch, fused=True)
    assert own == pytest.approx(loss, rel=1e-6)
    assert (its - gradient).norm() <= 1e-6 * gradient.norm()
    assert set(wide) == {V}
    assert set(narrow) == {16}


def test_a_head_is_a_tensor_whose_numbers_are_made_when_they_are_asked_for():
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True)
    head = Head(hidden, weight)
    assert isinstance(head, torch.Tensor)
    assert head.shape == (2, 3, V)
    assert head.requires_grad
    assert not head.multiplied
    (head * 2).sum().backward()
    assert head.multiplied
    assert torch.allclose(weight.grad, (2 * hidden.sum((0, 1))).expand(V, 4))


def test_a_layer_that_another_has_taken_hold_of_stays_as_it_is():
    model = gpt2(1)
    model.lm_head.register_forward_hook(lambda module, given, out: out)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    assert heads.output_layer(model, inputs, stillhouse.Distillation("hard_labels", task="causal_lm").attach(
        gpt2(1), probe=batch()).kind) is None  # fmt: skip
