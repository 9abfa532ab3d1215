"""``softmax_kl``: checks and shapes in front of the backends."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from stillhouse.kernels import backends, ops, reference
from stillhouse.kernels.checks import (
    check_floating,
    check_inplace,
    check_settings,
    check_target,
    check_values,
    checked,
)
from stillhouse.kernels.targets import Sampled, Target, TopK

Divergence = Literal["forward", "reverse", "jsd"]
Reduction = Literal["mean", "sum", "none"]


def softmax_kl(
    student_logits: Tensor,
    target: Target,
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    count: float | Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Divergence between the softmax of a teacher and of a student, times the squared temperature.

    With t = softmax(teacher / T) and s = softmax(student / T), each row's loss is T^2 times
    ``forward``: KL(t || s); ``reverse``: KL(s || t); ``jsd``: beta KL(t || m) + (1 - beta) KL(s || m) with
    m = beta t + (1 - beta) s. T^2 keeps the gradient's scale (Hinton et al. 2015, arXiv:1503.02531, section 2);
    the generalised JSD is that of Agarwal et al. 2023, arXiv:2306.13649. No gradient reaches the target.

    Args:
        student_logits: (..., V); float32, bfloat16, float16 (accumulated in float32) or float64.
        target: teacher logits (..., Vt), a :class:`TopK` or a :class:`Sampled` with the same leading shape.
            Differing widths share a prefix: an entry that one side lacks counts as -inf there, and entries that
            the second argument of a KL lacks are dropped from the first, which is renormalised.
        temperature: T, from 1e-8 to 1e15.
        divergence: see above. ``Sampled`` is for ``forward`` only.
        beta: weight of the teacher in the mixture, from 0.01 to 0.99; read by ``jsd`` only.
        mask: (...) bool, True where a row counts. Other rows have loss and gradient exactly 0, whatever they hold.
        reduction: ``mean`` over valid rows, ``sum``, or ``none`` for one loss per row.
        count: what ``mean`` divides by: the valid rows of the whole optimizer step, so that the way in which a
            batch is split into micro-batches does not matter. By default the valid rows of this call.
        inplace: the call may overwrite ``student_logits`` (by their gradient), which saves N x V memory; their
            values are undefined afterwards. Backward through an operation that saved them raises.
        backend: ``torch``, ``numba`` or ``cuda``; by default the fastest for the device (see :func:`explain`).

    Returns:
        A 0-d tensor, or (...) for ``none``; float32, or float64 for float64 logits. With no valid row at all the
        mean is defined as 0, with gradient 0. A second derivative raises RuntimeError.

    Raises:
        ValueError: settings, shapes, types, devices or values that have no meaning, saying got, expected and fix.
            On the CPU also NaN or +inf logits in a valid row; on a GPU, where looking would stall the stream,
            these give a NaN loss.
    """
    check_settings(temperature, divergence, beta, reduction, count)
    check_floating("student_logits", student_logits)
    check_target(student_logits, target, mask, temperature, divergence)
    if inplace:
        check_inplace(student_logits)
    chosen = backends.choose(student_logits, backend)
    student, flat, flat_mask = flatten(student_logits, target, mask, chosen)
    if not torch.compiler.is_compiling():
        check_values(flat, student.shape[-1], flat_mask, chosen)
    per_row = reduction == "none"
    if chosen == "torch":
        rows = reference.softmax_kl_rows(student, flat, temperature, divergence, beta, flat_mask)
        if student.device.type == "cpu" and not torch.compiler.is_compiling():
            checked(rows.detach().sum().item(), rows)
        loss = reduce(rows, flat_mask, reduction, count)
    else:
        if reduction == "sum":
            count = 1
        elif count is None:
            count = student.shape[0] if flat_mask is None else flat_mask.sum()
        fixed = ops.arguments(flat, flat_mask, count, temperature, divergence, beta, per_row)
        loss = ops.softmax_kl(student, fixed, inplace)
    return loss.reshape(student_logits.shape[:-1]) if per_row and student_logits.dim() != 2 else loss


def flatten(
    student: Tensor, target: Target, mask: Tensor | None, backend: str = "torch"
) -> tuple[Tensor, Target, Tensor | None]:
    """Everything with one leading dimension N; the target such that no derivative reaches it on ``backend``."""

    def rows(x: Tensor) -> Tensor:
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])

    if isinstance(target, TopK):
        # as it is where it can be, and the backend saves nothing of it for backward: a new one costs as much as thirty rows of
        # a thousand logits, where the operators before have left none of this in the caches
        parts = (target.log_probs, target.log_rest)
        if backend == "torch" or target.indices.dim() != 2 or not all(map(ops.is_constant, parts)):
            rest = None if target.log_rest is None else target.log_rest.detach().reshape(-1)
            target = replace(
                target, indices=rows(target.indices), log_probs=rows(target.log_probs.detach()), log_rest=rest
            )
    elif isinstance(target, Sampled):
        target = replace(target, indices=rows(target.indices), weights=rows(target.weights.detach()))
    else:
        target = rows(target.detach())
    return rows(student), target, None if mask is None else mask.reshape(-1)


def reduce(rows: Tensor, mask: Tensor | None, reduction: str, count: float | Tensor | None) -> Tensor:
    """Reduce the rows' losses (N,); masked ones are zero already."""
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    if count is None:
        count = rows.numel() if mask is None else mask.sum()
    if isinstance(count, Tensor):
        some = count > 0
        return torch.where(some, total / torch.where(some, count, 1), 0)
    return total / count if count else torch.nan_to_num(total * 0)  # also where a row is +inf
