"""``softmax_kl`` and ``distillation_loss``: checks and shapes in front of the backends."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stillhouse.kernels import backends, ops, reference
from stillhouse.kernels.checks import (
    check_floating,
    check_inplace,
    check_label_values,
    check_labels,
    check_settings,
    check_target,
    check_values,
    checked,
)
from stillhouse.kernels.targets import Labels, Sampled, Target, TopK, restricted

SMALL = 8192  # logits of a call that is not worth compiling a kernel for, measured: see docs/kernels.md
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
    chosen = choose(student_logits, target, divergence, backend)
    student, flat, flat_mask = flatten(student_logits, target, mask, chosen)
    if not torch.compiler.is_compiling():
        check_values(flat, student.shape[-1], flat_mask, chosen)
    if chosen in {"torch", "small"}:
        rows = _rows_by_torch(student, flat, flat_mask, temperature, divergence, beta, chosen)
        loss = reduce(rows, flat_mask, reduction, count)
    else:
        if reduction == "sum":
            count = 1
        elif count is None:
            count = rows_of(student, flat_mask)
        call = ops.call_of(flat, flat_mask, count, temperature, divergence, beta, per_row=reduction == "none")
        loss = ops.softmax_kl(student, call, inplace)[0]
    return (
        loss.reshape(student_logits.shape[:-1]) if reduction == "none" and student_logits.dim() != 2 else loss
    )


class Terms(NamedTuple):
    """The two terms of :func:`distillation_loss`: 0-d tensors, neither multiplied by its weight."""

    soft: Tensor
    label: Tensor


def distillation_loss(
    student_logits: Tensor,
    target: Target,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    weights: tuple[float, float] = (1.0, 1.0),
    divergence: Divergence = "forward",
    beta: float = 0.5,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    count: float | Tensor | None = None,
    label_count: float | Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Terms:
    """The divergence from a teacher at T, as of :func:`softmax_kl`, and the cross-entropy with labels at 1, in one pass.

    With ``weights`` (a, b) a row's loss is a T^2 KL(t || s) + b CE(y, softmax(student)), and its gradient
    a T (s_T - t_T) + b (s_1 - y): eq. 1 and section 2 of Hinton et al. 2015, arXiv:1503.02531. No gradient reaches the target, nor
    labels that are probabilities.

    Args:
        student_logits: (..., V), as for :func:`softmax_kl`.
        target: the teacher's side, as for :func:`softmax_kl`.
        labels: class indices (...) int64, -100 where a row has none; or probabilities (..., V), of zeros alone where it has none.
        temperature: T, of the first term alone.
        weights: what the caller multiplies the terms by. The gradient of that sum (or a multiple) is made with the terms. One of
            another combination is right as well and takes a pass of its own, which needs the logits: with ``inplace``
            it raises RuntimeError instead, and so does backward where they were changed meanwhile.
        divergence: of the first term.
        beta: of a ``jsd``.
        label_smoothing: the share of every label that goes to all V entries alike, 0 <= share < 1.
        mask: (...) bool, True where a row counts in either term.
        count: what the first term is divided by; by default the valid rows of this call.
        label_count: what the second one is divided by; by default the valid rows that have a label.
        inplace: as for :func:`softmax_kl`.
        backend: as for :func:`softmax_kl`. On CUDA labels that are probabilities take a pass of their own.

    Returns:
        Both terms, each divided by its count; 0 where that is 0. float32, or float64 for float64 logits.

    Raises:
        ValueError: as :func:`softmax_kl`, and for labels, weights and smoothing without meaning. On a GPU labels are not looked at.
    """
    check_settings(temperature, divergence, beta, "mean", count)
    check_floating("student_logits", student_logits)
    check_target(student_logits, target, mask, temperature, divergence)
    check_labels(student_logits, labels, label_smoothing, weights, label_count)
    if inplace:
        check_inplace(student_logits)
    chosen = choose(student_logits, target, divergence, backend, labels=labels)
    student, flat, flat_mask = flatten(student_logits, target, mask, chosen)
    y = flat_labels(labels, label_smoothing)
    count = rows_of(student, flat_mask) if count is None else count
    if label_count is None:
        label_count = labelled_rows_of(y, flat_mask)
    if chosen not in {"torch", "small"} and fits_one_pass(student, flat, divergence, labels):
        check_values(flat, student.shape[1], flat_mask, chosen)
        call = ops.call_of(
            flat, flat_mask, count, temperature, divergence, beta, labels=y, weights=weights, label_count=label_count
        )  # fmt: skip
        return Terms(*ops.softmax_kl(student, call, inplace))
    if student.device.type == "cpu" and not (torch.compiler.is_compiling() or ops.is_transformed()):
        check_label_values(y, student.shape[1], flat_mask)
    soft = softmax_kl(
        student, flat, temperature=temperature, divergence=divergence, beta=beta, mask=flat_mask, count=count,
        backend=None if chosen == "small" else chosen,
    )  # fmt: skip
    rows = reference.label_rows(student.double() if chosen == "small" else student, y, flat_mask)
    return Terms(soft, reduce(rows.to(soft.dtype), None, "mean", label_count))


def choose(
    student: Tensor, target: Target, divergence: str, backend: str | None, *, labels: Tensor | None = None
) -> str:
    """The backend of a call; ``small`` for one that needs no kernel."""
    if backend is None and _is_small(student, target, divergence):
        return "small"
    one_pass = labels is not None and fits_one_pass(student, target, divergence, labels)
    kernel = "dense" if isinstance(target, Tensor) or restricted(target, divergence) else "sparse"
    return backends.choose(student, backend, f"{kernel}_labels" if one_pass else kernel)


def fits_one_pass(student: Tensor, target: Target, divergence: str, labels: Tensor) -> bool:
    """Do the kernels have this form with a label term? Not where the student is restricted to a part of its entries.

    Nor, on a GPU, of labels that are probabilities; nor while torch traces or transforms the call, when backward cannot look at
    what it is asked for.
    """
    if torch.compiler.is_compiling() or ops.is_transformed():
        return False
    if student.is_cuda and labels.is_floating_point():
        return False
    if divergence != "reverse":
        return True
    if isinstance(target, Tensor):
        return target.shape[-1] >= student.shape[-1]
    return isinstance(target, TopK) and target.rest == "ghost"


# -- what torch's operators compute


def _is_small(student: Tensor, target: Target, divergence: str) -> bool:
    """Is it a dense forward KL of few logits on both sides? These are what training on small data asks for.

    Their operators' overhead is all that such a call takes, with any backend. So they are chosen by size alone: whether a kernel
    was compiled before does not change a result.
    """
    return (
        isinstance(target, Tensor)
        and student.device.type == "cpu"
        and student.dtype != torch.float64
        and divergence == "forward"
        and 0 < student.numel() <= SMALL
        and target.shape == student.shape
        and not torch.compiler.is_compiling()
        and not ops.is_transformed()
    )


def _rows_by_torch(
    student: Tensor, target: Target, mask: Tensor | None, temperature: float, divergence: str, beta: float, chosen: str
) -> Tensor:  # fmt: skip
    """The loss of each row (N,): by the specification, or by the closed form in float64 where the call is small."""
    if chosen == "small":
        assert isinstance(target, Tensor)
        rows = _closed_form(student.double(), target.double(), temperature, mask)
    else:
        rows = reference.softmax_kl_rows(student, target, temperature, divergence, beta, mask)
    if student.device.type == "cpu" and not (torch.compiler.is_compiling() or ops.is_transformed()):
        checked(rows.detach().sum().item(), rows)
    return rows.float() if chosen == "small" else rows


def _closed_form(s: Tensor, t: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    if mask is not None:
        s, t = (torch.where(mask[:, None], x, 0) for x in (s, t))
    log_s, log_t = (torch.log_softmax(x / temperature, -1) for x in (s, t))
    p = log_t.exp()
    rows = torch.where(p == 0, 0, p * (log_t - log_s)).sum(-1) * temperature**2
    rows = torch.where(
        rows < 0, rows - rows.detach(), rows
    )  # which rounding leaves of equal distributions: 0
    return rows if mask is None else torch.where(mask, rows, 0)


# -- rows in one dimension


def flat_labels(labels: Tensor, smoothing: float) -> Labels:
    """Labels with their rows in one dimension."""
    if labels.is_floating_point():
        return Labels(None, _rows(labels.detach()), float(smoothing))
    return Labels(labels.reshape(-1), None, float(smoothing))


def labelled_rows_of(labels: Labels, mask: Tensor | None) -> Tensor:
    """How many rows have a label and are not masked."""
    return (labels.present() if mask is None else labels.present() & mask).sum()


def rows_of(student: Tensor, mask: Tensor | None) -> int | Tensor:
    """How many rows are not masked."""
    return student.shape[0] if mask is None else mask.sum()


def flatten(
    student: Tensor, target: Target, mask: Tensor | None, backend: str = "torch"
) -> tuple[Tensor, Target, Tensor | None]:
    """Everything with one leading dimension N; the target such that no derivative reaches it on ``backend``."""
    if isinstance(target, TopK):
        # as it is where it can be, and the backend saves nothing of it for backward: a new one costs as much as thirty rows of
        # a thousand logits, where the operators before have left none of this in the caches
        parts = (target.log_probs, target.log_rest)
        if backend == "torch" or target.indices.dim() != 2 or not all(map(ops.is_constant, parts)):
            rest = (
                None
                if target.log_rest is None
                else savable(target.log_rest.detach()).resolve_neg().reshape(-1)
            )
            indices, log_probs = _rows(savable(target.indices)), _rows(savable(target.log_probs.detach()))
            target = replace(target, indices=indices, log_probs=log_probs, log_rest=rest)
    elif isinstance(target, Sampled):
        indices, weights = _rows(savable(target.indices)), _rows(savable(target.weights.detach()))
        target = replace(target, indices=indices, weights=weights)
    else:
        target = _rows(target.detach())
    return _rows(student), target, None if mask is None else savable(mask).reshape(-1)


def _rows(x: Tensor) -> Tensor:
    x = x.resolve_neg()  # kernels take addresses, and what lies there has the other sign
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def savable(x: Tensor) -> Tensor:
    """A copy of what was made in inference mode, which autograd refuses to save for backward."""
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


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
