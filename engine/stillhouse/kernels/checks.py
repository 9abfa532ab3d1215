"""Refusals: what comes in is checked here once, so that every backend gives the same errors."""

from __future__ import annotations

import math
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor

from stillhouse.kernels.errors import fail
from stillhouse.kernels.series import NO_LABEL
from stillhouse.kernels.targets import Labels, Sampled, Target, TopK

DIVERGENCES = ("forward", "reverse", "jsd")
REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-8, 1e15  # what stands for -inf over T, and T^2, are float32
LEAST_BETA = (
    0.01  # nearer to 0 or 1 one of the two divergences of a jsd is rounding beside the other's weight
)
SUM_TOLERANCE = 1e-2  # probabilities that went through 16-bit storage still sum to one within this


def check_settings(temperature: float, divergence: str, beta: float, reduction: str, count: object) -> None:
    """Refuse settings that have no meaning, before any tensor is looked at."""
    _check_positive("temperature", temperature, "pass a float such as 1.0")
    if not LEAST_TEMPERATURE <= temperature <= LARGEST_TEMPERATURE:
        expected = f"a number from {LEAST_TEMPERATURE} to {LARGEST_TEMPERATURE}"
        raise fail("temperature", repr(temperature), expected, "pass a float such as 1.0")
    if divergence not in DIVERGENCES:
        raise fail(
            "divergence", repr(divergence), f"one of {', '.join(DIVERGENCES)}", "pick one of these names"
        )
    if divergence == "jsd" and not (_is_real(beta) and LEAST_BETA <= beta <= 1 - LEAST_BETA):
        raise fail(
            "beta",
            repr(beta),
            f"a number from {LEAST_BETA} to {1 - LEAST_BETA}",
            "the ends are divergence='forward' or 'reverse'",
        )
    if reduction not in REDUCTIONS:
        raise fail("reduction", repr(reduction), f"one of {', '.join(REDUCTIONS)}", "pick one of these names")
    if count is not None:
        _check_count(count, reduction)


def _is_real(value: object) -> TypeGuard[float]:
    # what it mostly is comes first: to ask an abstract class takes longer
    return isinstance(value, (float, int, Real))


def _check_positive(name: str, value: object, fix: str) -> None:
    if not _is_real(value) or not 0 < float(value) < math.inf:
        raise fail(name, repr(value), "a finite number above 0", fix)


def _check_count(count: object, reduction: str) -> None:
    if reduction != "mean":
        raise fail(
            "count", f"a count with reduction={reduction!r}", "reduction='mean'", "drop count, or average"
        )
    if isinstance(count, Tensor):
        if count.dim() != 0:
            raise fail(
                "count", f"shape {tuple(count.shape)}", "a number or a 0-d tensor", "sum it over the step"
            )
        if count.device.type != "cpu" or torch.compiler.is_compiling():
            return  # looking would stall the stream, or break the graph
        count = count.item()
    check_count_value(count)


def check_count_value(count: object) -> None:
    """Refuse a number of valid rows that is none."""
    if not _is_real(count) or not 0 <= float(count) < math.inf:
        raise fail(
            "count",
            repr(count),
            "a finite number of valid rows, 0 or more",
            "count the rows of the whole step",
        )


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not a floating one of the four types that are known here."""
    if not isinstance(tensor, Tensor):
        raise fail(name, type(tensor).__name__, "a torch.Tensor", "convert it with torch.as_tensor")
    if tensor.dtype not in FLOATS:
        raise fail(
            f"{name} dtype", tensor.dtype, "float32, bfloat16, float16 or float64", "call .float() on it"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested tensor" if tensor.is_nested else tensor.layout
        raise fail(f"{name} layout", layout, "a dense tensor", "call .to_dense() on it, or pad it and mask")


def check_target(
    student: Tensor, target: Target, mask: Tensor | None, temperature: float, divergence: str
) -> None:
    """Refuse a target or a mask that does not belong to these student logits (..., V)."""
    if student.dim() < 1 or student.shape[-1] < 1:
        raise fail(
            "student_logits shape", tuple(student.shape), "(..., V) with V >= 1", "keep the vocabulary last"
        )
    if isinstance(target, TopK):
        _check_top_k(student, target, temperature)
    elif isinstance(target, Sampled):
        _check_sampled(student, target, temperature, divergence)
    else:
        check_floating("target", target)
        _same_rows("target", student, target)
    if mask is not None:
        check_mask(student, mask)


def check_mask(student: Tensor, mask: Tensor) -> None:
    """Refuse a mask that is not one boolean for each row."""
    rows = tuple(student.shape[:-1])
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise fail("mask dtype", got, "torch.bool (True: the row counts)", "call .bool() on it")
    if tuple(mask.shape) != rows:
        raise fail(
            "mask shape", tuple(mask.shape), f"{rows}, the student's without the last", "one entry for a row"
        )
    _same_device("mask", student, mask)


def check_labels(student: Tensor, labels: Tensor, smoothing: float, weights: object, count: object) -> None:
    """Refuse labels that do not belong to these student logits (..., V), and settings of the label term without meaning."""
    rows = tuple(student.shape[:-1])
    if not isinstance(labels, Tensor) or not (labels.dtype == torch.int64 or labels.is_floating_point()):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise fail("labels dtype", got, "torch.int64 or probabilities", "call .long() on class indices")
    expected = tuple(student.shape) if labels.is_floating_point() else rows
    if tuple(labels.shape) != expected:
        what = "probabilities of all V entries" if labels.is_floating_point() else "a class index for a row"
        raise fail("labels shape", tuple(labels.shape), f"{expected}: {what}", "align them with the logits")
    _same_device("labels", student, labels)
    if not _is_real(smoothing) or not 0 <= smoothing < 1:
        raise fail("label_smoothing", repr(smoothing), "a number from 0 up to 1", "pass 0.0 for none")
    if not isinstance(weights, (tuple, list)) or len(weights) != 2 or not all(map(_is_weight, weights)):
        raise fail("weights", repr(weights), "two finite numbers, 0 or more", "pass (soft, label)")
    if count is not None:
        _check_count(count, "mean")


def _is_weight(value: object) -> bool:
    return _is_real(value) and 0 <= float(value) < math.inf


def check_label_values(labels: Labels, width: int, mask: Tensor | None) -> None:
    """Refuse class indices that are none of the V entries and not ``NO_LABEL``, and negative probabilities."""
    if labels.indices is not None:
        wrong = (labels.indices != NO_LABEL) & ((labels.indices < 0) | (labels.indices >= width))
    else:
        assert labels.probabilities is not None
        wrong = ~(labels.probabilities >= 0).all(-1)
    wrong = wrong if mask is None else wrong & mask
    if bool(wrong.any()):
        raise label_error(labels, int(wrong.nonzero()[0, 0]), width)


def label_error(labels: Labels, row: int, width: int) -> ValueError:
    """The refusal of a row's label."""
    if labels.indices is None:
        return fail(
            "labels", f"a negative probability or NaN in row {row}", "probabilities of 0 or more", "mask the row out"
        )  # fmt: skip
    got = f"{int(labels.indices[row])} in row {row}"
    return fail("labels", got, f"0 to {width - 1}, or {NO_LABEL} for none", "remap the classes")


def check_inplace(student: Tensor) -> None:
    """Refuse to overwrite a parameter or an input that autograd hands back to the caller, or a view of one."""
    base = student if student._base is None else student._base
    if student.requires_grad and (student.is_leaf or (base.is_leaf and base.requires_grad)):
        raise fail(
            "inplace=True",
            "a leaf tensor that requires grad" if student.is_leaf else "a view of a leaf that requires grad",
            "logits computed by a layer, whose values nothing needs later",
            "drop inplace, or pass the layer's output",
        )


def _check_top_k(student: Tensor, target: TopK, temperature: float) -> None:
    if target.rest not in ("ghost", "renormalise"):
        raise fail("TopK.rest", repr(target.rest), "'ghost' or 'renormalise'", "pick one of these names")
    _check_positive("TopK.temperature", target.temperature, "1.0 for plain log-probabilities")
    if target.rest == "ghost" and target.temperature != temperature:
        raise fail(
            "TopK.temperature",
            f"{target.temperature} with temperature={temperature}",
            "the same one, since the mass outside the top k cannot be moved to another temperature",
            f"take the log-probabilities at {temperature}, or use rest='renormalise'",
        )
    _check_pair(student, target.indices, target.log_probs, "TopK", "log_probs")
    if target.log_rest is not None:
        _check_log_rest(student, target, target.log_rest)
    if target.indices.shape[-1] > student.shape[-1]:
        raise fail(
            "TopK k", target.indices.shape[-1], f"at most V = {student.shape[-1]}", "store fewer entries"
        )


def _check_log_rest(student: Tensor, target: TopK, log_rest: Tensor) -> None:
    if target.rest != "ghost":
        raise fail("TopK.log_rest", f"one with rest={target.rest!r}", "rest='ghost'", "drop one of the two")
    check_floating("TopK.log_rest", log_rest)
    if log_rest.shape != target.indices.shape[:-1]:
        got = f"{tuple(log_rest.shape)} with indices {tuple(target.indices.shape)}"
        raise fail("TopK.log_rest shape", got, "the indices' shape without the last", "squeeze it")
    _same_device("TopK.log_rest", student, log_rest)


def _check_sampled(student: Tensor, target: Sampled, temperature: float, divergence: str) -> None:
    if divergence != "forward":
        raise fail(
            "divergence", f"{divergence!r} with Sampled", "'forward'", "use TopK or dense logits as target"
        )
    if target.temperature != temperature:
        raise fail(
            "Sampled.temperature",
            f"{target.temperature} with temperature={temperature}",
            "the same one, since draws at one temperature are biased at another",
            f"draw from softmax(teacher / {temperature})",
        )
    _check_pair(student, target.indices, target.weights, "Sampled", "weights")


def _check_pair(student: Tensor, indices: Tensor, values: Tensor, kind: str, name: str) -> None:
    check_floating(f"{kind}.{name}", values)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        dtype = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise fail(f"{kind}.indices dtype", dtype, "torch.int64", "call .long() on it")
    if indices.shape != values.shape:
        got = f"{tuple(indices.shape)} and {tuple(values.shape)}"
        raise fail(
            f"{kind} shapes", got, f"indices and {name} of the same shape", "gather both with the same index"
        )
    _same_rows(f"{kind}.indices", student, indices)
    _same_device(f"{kind}.{name}", student, values)


def _same_rows(name: str, student: Tensor, other: Tensor) -> None:
    if other.dim() != student.dim() or other.shape[:-1] != student.shape[:-1] or other.shape[-1] < 1:
        raise fail(
            f"{name} shape",
            tuple(other.shape),
            f"{tuple(student.shape[:-1])} + (width >= 1,), as the student's {tuple(student.shape)}",
            "align the rows of both sides first; nothing is broadcast",
        )
    _same_device(name, student, other)


def _same_device(name: str, student: Tensor, other: Tensor) -> None:
    if other.device != student.device:
        raise fail(
            f"{name} device",
            other.device,
            f"{student.device}, the student's",
            f"call .to({str(student.device)!r})",
        )


def check_values(target: Target, width: int, mask: Tensor | None, backend: str = "") -> None:
    """Refuse values that would read out of bounds or mean nothing; rows 2-D, masked rows are not looked at.

    Of a trusted target the backend ``torch`` has its indices looked at, since torch's own refusal names no fix.
    """
    if isinstance(target, Tensor):
        return
    if target.trusted:
        if backend == "torch" and target.indices.device.type == "cpu":
            _check_indices(target, width, mask)
        return
    indices = _check_indices(target, width, mask)
    values = target.log_probs if isinstance(target, TopK) else target.weights
    values = (values if mask is None else values[mask]).double()
    if indices.numel() == 0:
        return
    if isinstance(target, TopK):
        rest = target.log_rest if target.log_rest is None or mask is None else target.log_rest[mask]
        _check_log_probs(indices, values, None if rest is None else rest.double())
    else:
        _check_weights(values)


def _check_indices(target: TopK | Sampled, width: int, mask: Tensor | None) -> Tensor:
    """Refuse indices that are none of a row's entries; those of the rows that count."""
    indices = target.indices if mask is None else target.indices[mask]
    if indices.numel() == 0:
        return indices
    low, high = indices.min().item(), indices.max().item()
    if low < 0 or high >= width:
        raise fail(
            f"{type(target).__name__}.indices",
            low if low < 0 else high,
            f"0 to {width - 1}, the student's entries",
            "drop or remap foreign entries",
        )
    return indices


def _check_log_probs(indices: Tensor, log_probs: Tensor, log_rest: Tensor | None) -> None:
    ordered = indices.sort(-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise fail(
            "TopK.indices", "a repeated index in a row", "k distinct entries", "Sampled is what may repeat"
        )
    sums = log_probs.exp().sum(-1)
    if not bool((sums <= 1 + SUM_TOLERANCE).all()) or not bool((sums > 0).all()):
        worst = sums[~((sums <= 1 + SUM_TOLERANCE) & (sums > 0))][0].item()
        raise fail(
            "TopK.log_probs",
            f"a row whose exp sums to {worst:.6g}",
            "above 0 and at most 1",
            "pass log_softmax",
        )
    if log_rest is not None:
        whole = sums + log_rest.exp()
        off = ~((whole - 1).abs() <= SUM_TOLERANCE)
        if bool(off.any()):
            raise fail(
                "TopK.log_rest",
                f"a row that sums to {whole[off][0].item():.6g} with its entries",
                "1",
                "pass the log of the mass outside the k entries, or leave it out",
            )


def _check_weights(weights: Tensor) -> None:
    if not bool((weights >= 0).all()):
        raise fail("Sampled.weights", f"{weights.min().item():.6g}", "weights >= 0", "divide counts by draws")
    sums = weights.sum(-1)
    if not bool(((sums - 1).abs() <= SUM_TOLERANCE).all()):
        worst = sums[((sums - 1).abs() > SUM_TOLERANCE)][0].item()
        raise fail(
            "Sampled.weights", f"a row that sums to {worst:.6g}", "1 in each row", "divide by the row's sum"
        )


def checked(total: float, rows: Tensor, what: str = "logits") -> None:
    """Refuse losses of which one is not a number, or reports an index out of range; +inf is a loss like another."""
    if not math.isnan(total) and total != -math.inf:
        return
    if bool(rows.isnan().any()):
        raise _nan_error(rows, what)
    if bool((rows == -math.inf).any()):
        row = int((rows == -math.inf).nonzero()[0, 0])
        raise ValueError(
            f"target indices: got one outside the student's entries in row {row} of a trusted target; expected 0 to"
            " V - 1. Fix: drop trusted=True to see which, and remap it."
        )


def checked_labels(total: float, rows: Tensor, labels: Labels, width: int) -> None:
    """Refuse label terms (N,) of which one is not a number, or reports an index out of range."""
    if not math.isnan(total) and total != -math.inf:
        return
    row = int((rows.isnan() | (rows == -math.inf)).nonzero()[0, 0])
    raise label_error(labels, row, width)


def _nan_error(rows: Tensor, what: str) -> ValueError:
    """The refusal of logits that give no distribution, naming the first such row."""
    row = int(rows.isnan().nonzero()[0, 0])
    return ValueError(
        f"{what}: got NaN, +inf or only -inf in row {row} (of {rows.numel()} flattened rows); expected finite logits,"
        " with -inf for entries that cannot occur. Fix: mask the row out, or find the step that made it so."
    )
