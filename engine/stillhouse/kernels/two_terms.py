"""A divergence from the teacher and the cross-entropy with labels in one pass over the logits, for the CPU kernel."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.kernels import ops
from stillhouse.kernels.checks import checked, checked_labels
from stillhouse.kernels.targets import Labels, Target

SAME = 1e-6  # relative: weights that differ by no more count as those that the gradient was made for


@dataclass(frozen=True, eq=False)
class Settings:
    """All of a call but the logits; rows in one dimension, counts as numbers."""

    target: Target
    labels: Labels
    mask: Tensor | None
    temperature: float
    divergence: str
    beta: float
    weights: tuple[float, float]
    count: float
    label_count: float


def both(student: Tensor, settings: Settings, inplace: bool) -> tuple[Tensor, Tensor]:
    """Both terms; a gradient of any combination of them reaches ``student`` (N, V)."""
    if not (torch.is_grad_enabled() and student.requires_grad):
        return compute(student, settings, None)[0]
    inplace = inplace and ops.overwritable(student, tensors(settings))
    soft, label, _ = _TwoTerms.apply(student, settings, inplace)
    return soft, label


def tensors(settings: Settings) -> list[Tensor]:
    """What is read besides the student's logits."""
    labels, target = settings.labels, settings.target
    parts = [settings.mask, labels.indices, labels.probabilities]
    parts += [target] if isinstance(target, Tensor) else list(vars(target).values())
    return [x for x in parts if isinstance(x, Tensor)]


def compute(student: Tensor, s: Settings, out: Tensor | None) -> tuple[tuple[Tensor, Tensor], float]:
    """(Soft and label term, what the gradient of their weighted sum in ``out`` is still to be divided by)."""
    student = student if student.stride(1) == 1 else student.contiguous()
    # float16 would lose 1 / count times a small gradient before the loss scaler can lift it: divided in backward
    late = (s.count or s.label_count or 1.0) if student.dtype == torch.float16 else 1.0
    per_soft, per_label = (ops.reciprocal(count) for count in (s.count, s.label_count))
    values = student.new_empty(2, dtype=torch.float32)
    rows, totals = ops.cpu().softmax_kl_fwd_bwd(
        student, s.target, temperature=s.temperature, divergence=s.divergence, beta=s.beta, mask=s.mask,
        scale=s.weights[0] * per_soft * late, out_grad=out, loss_scale=per_soft or 1.0, loss=values, labels=s.labels,
        label_scale=s.weights[1] * per_label * late, label_loss_scale=per_label or 1.0,
    )  # fmt: skip
    checked(totals[0], rows[0])
    checked_labels(totals[1], rows[1], s.labels, student.shape[1])
    soft, label = values.unbind()
    none = values.new_zeros(())
    return (soft if per_soft else none, label if per_label else none), late


class _TwoTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, settings: Settings, inplace: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if inplace:
            gradient = student.detach()
            try:
                terms, ctx.late = compute(gradient, settings, gradient)
            finally:  # who saved these logits is told that they are gone, also where a row was refused
                torch.autograd.graph.increment_version(student)
        else:
            gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
            terms, ctx.late = compute(student, settings, gradient)
        ctx.settings, ctx.inplace = settings, inplace
        anchor = terms[0].new_empty(0)
        ctx.save_for_backward(gradient, anchor, *(() if inplace else (student,)))
        ctx.set_materialize_grads(False)
        return terms[0].clone(), terms[1].clone(), anchor

    @staticmethod
    def backward(
        ctx: Any, soft: Tensor | None, label: Tensor | None, _: None
    ) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        gradient, anchor, *kept = ctx.saved_tensors
        wanted = tuple(0.0 if g is None else g.item() for g in (soft, label))
        factor = common_factor(wanted, ctx.settings.weights)
        if factor is None:
            if ctx.inplace:
                raise RuntimeError(_OVERWRITTEN.format(got=wanted, expected=ctx.settings.weights))
            gradient = torch.empty_like(kept[0], memory_format=torch.contiguous_format)
            with torch.no_grad():
                compute(kept[0], replace(ctx.settings, weights=wanted), gradient)
            factor = 1.0
        upstream = torch.tensor(factor / ctx.late)
        gradient = ops.scaled_in_place(gradient, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            gradient = ops.no_second_derivative(gradient, anchor)
        return gradient, None, None


_OVERWRITTEN = (
    "distillation_loss: got derivatives of its terms weighted {got}; expected a multiple of weights={expected}, for which "
    "inplace=True has overwritten the logits by their gradient. Fix: pass these weights, or drop inplace."
)


def common_factor(wanted: tuple[float, ...], weights: tuple[float, float]) -> float | None:
    """The number that ``weights`` times it are ``wanted``, if there is one."""
    (a, b), (x, y) = weights, wanted
    if a == b == 0:
        return 0.0 if x == y == 0 else None
    if abs(x * b - y * a) > SAME * max(abs(x * b), abs(y * a)):
        return None
    return x / a if a >= b else y / b
