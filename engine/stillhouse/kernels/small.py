"""Calls too small to be worth compiling a kernel for: closed forms in float64, by torch's operators.

Where a call has few logits its operators' overhead is all it takes, with any backend. So these are chosen by size alone: whether
a kernel was compiled before does not change a result.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillhouse.kernels import ops
from stillhouse.kernels.checks import check_label_values, checked
from stillhouse.kernels.targets import Labels, Target

MOST = 8192  # logits, measured: see docs/kernels.md


def suits(student: Tensor, target: Target | None, divergence: str) -> bool:
    """Is it a dense forward KL of few logits on both sides? These are what training on small data asks for."""
    return (
        isinstance(target, Tensor)
        and divergence == "forward"
        and student.numel() <= MOST
        and target.shape == student.shape
        and student.numel() > 0
        and not torch.compiler.is_compiling()
        and not ops.is_transformed()
    )


def rows_of(
    student: Tensor, teacher: Tensor, labels: Labels | None, temperature: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """T^2 KL(teacher || student) of each row (N,) in float32, and the cross-entropy of its label; 0 without labels."""
    if labels is not None:
        check_label_values(labels, student.shape[1], mask)
    soft, label, _ = _Rows.apply(student, teacher, labels, temperature, mask)
    checked(soft.sum().item(), soft)
    return soft, label


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Labels | None, temperature: float, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        s, t = student.double(), teacher.double()
        if mask is not None:
            s, t = s.masked_fill(~mask[:, None], 0), t.masked_fill(~mask[:, None], 0)
        log_s, log_t = (torch.log_softmax(x / temperature, -1) for x in (s, t))
        p = log_t.exp()
        rows = torch.where(p == 0, 0, p * (log_t - log_s)).sum(-1).clamp(min=0) * temperature**2
        of_soft = (log_s.exp() - p) * temperature
        label, of_label = torch.zeros_like(rows), None
        if labels is not None:
            label, of_label = _label_rows(s, labels, mask)
        if mask is not None:
            rows = torch.where(mask, rows, 0)
            of_soft = torch.where(mask[:, None], of_soft, 0)
        ctx.dtype = student.dtype
        anchor = student.new_empty(0)
        ctx.save_for_backward(of_soft, of_label, anchor)
        ctx.set_materialize_grads(False)
        return rows.float(), label.float(), anchor

    @staticmethod
    def backward(ctx: Any, soft: Tensor | None, label: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_soft, of_label, anchor = ctx.saved_tensors
        parts = [
            g.double()[:, None] * of
            for g, of in ((soft, of_soft), (label, of_label))
            if g is not None and of is not None
        ]
        gradient = sum(parts[1:], parts[0]).to(ctx.dtype) if parts else None
        if gradient is not None and torch.is_grad_enabled():  # create_graph=True
            gradient = ops.no_second_derivative(gradient, anchor)
        return gradient, None, None, None, None


def _label_rows(s: Tensor, labels: Labels, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Cross-entropy of each row, its gradient), in float64."""
    log_s = torch.log_softmax(s, -1)
    keep = labels.present() if mask is None else labels.present() & mask
    if labels.probabilities is not None:
        y = labels.probabilities.double().masked_fill(~keep[:, None], 0)
    else:
        assert labels.indices is not None
        chosen = torch.where(keep, labels.indices, 0)
        y = torch.zeros_like(log_s).scatter_(-1, chosen[:, None], 1.0)
    y = y * (1 - labels.smoothing) + labels.smoothing / s.shape[1]
    rows = -torch.where(y != 0, y * log_s, 0).sum(-1)
    gradient = log_s.exp() * y.sum(-1, keepdim=True) - y
    return torch.where(keep, rows, 0), torch.where(keep[:, None], gradient, 0)
