"""Refusals: what comes in is checked here once, so that every backend gives the same errors."""

from __future__ import annotations

import math
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor

from stillhouse.kernels.errors import fail, require
from stillhouse.kernels.series import NO_LABEL
from stillhouse.kernels.targets import Labels, Sampled, Target, TopK

DIVERGENCES = ("forward", "reverse", "jsd")
REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-8, 1e15  # what stands for -inf over T, and T^2, are float32
LEAST_BETA = 0.01  # nearer to 0 or 1 one of a jsd's two divergences is rounding beside the other's weight
SUM_TOLERANCE = 1e-2  # probabilities that went through 16-bit storage still sum to one within this


def check_settings(temperature: float, divergence: str, beta: float, reduction: str, count: object) -> None:
    """Refuse settings that have no meaning, before any tensor is looked at."""
    _check_positive("temperature", temperature, "pass a float such as 1.0")
    most, named = f"a number from {LEAST_TEMPERATURE} to {LARGEST_TEMPERATURE}", "pick one of these names"
    in_range = LEAST_TEMPERATURE <= temperature <= LARGEST_TEMPERATURE
    require(in_range, "temperature", repr(temperature), most, "pass a float such as 1.0")
    require(
        divergence in DIVERGENCES, "divergence", repr(divergence), f"one of {', '.join(DIVERGENCES)}", named
    )
    if divergence == "jsd" and not (_is_real(beta) and LEAST_BETA <= beta <= 1 - LEAST_BETA):
        expected = f"a number from {LEAST_BETA} to {1 - LEAST_BETA}"
        raise fail("beta", repr(beta), expected, "the ends are divergence='forward' or 'reverse'")
    require(reduction in REDUCTIONS, "reduction", repr(reduction), f"one of {', '.join(REDUCTIONS)}", named)
    if count is not None:
        got, fix = f"a count with reduction={reduction!r}", "drop count, or average"
        require(reduction == "mean", "count", got, "reduction='mean'", fix)
        _check_count(count)


def _is_real(value: object) -> TypeGuard[float]:
    # what it mostly is comes first: to ask an abstract class takes longer
    return isinstance(value, (float, int, Real))


def _check_positive(name: str, value: object, fix: str) -> None:
    require(
        _is_real(value) and 0 < float(value) < math.inf, name, repr(value), "a finite number above 0", fix
    )


def _check_count(count: object, name: str = "count") -> None:
    if isinstance(count, Tensor):
        shape = f"shape {tuple(count.shape)}"
        require(count.dim() == 0, name, shape, "a number or a 0-d tensor", "sum it over the step")
        if count.device.type != "cpu" or torch.compiler.is_compiling():
            return  # looking would stall the stream, or break the graph
        count = count.item()
    check_count_value(count, name)


def check_count_value(count: object, name: str = "count") -> None:
    """Refuse a number of valid rows that is none."""
    expected, fix = "a finite number of valid rows, 0 or more", "count the rows of the whole step"
    require(_is_real(count) and 0 <= float(count) < math.inf, name, repr(count), expected, fix)


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not a floating one of the four types that are known here."""
    what, fix = type(tensor).__name__, "convert it with torch.as_tensor"
    require(isinstance(tensor, Tensor), name, what, "a torch.Tensor", fix)
    expected = "float32, bfloat16, float16 or float64"
    require(tensor.dtype in FLOATS, f"{name} dtype", tensor.dtype, expected, "call .float() on it")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "a nested tensor" if tensor.is_nested else tensor.layout
        raise fail(f"{name} layout", layout, "a dense tensor", "call .to_dense() on it, or pad it and mask")


def check_target(
    student: Tensor, target: Target, mask: Tensor | None, temperature: float, divergence: str
) -> None:
    """Refuse a target or a mask that does not belong to these student logits (..., V)."""
    shape, fix = tuple(student.shape), "keep the vocabulary last"
    require(bool(shape) and shape[-1] > 0, "student_logits shape", shape, "(..., V) with V >= 1", fix)
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
    got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
    require(got == torch.bool, "mask dtype", got, "torch.bool (True: the row counts)", "call .bool() on it")
    rows, shape = tuple(student.shape[:-1]), tuple(mask.shape)
    require(
        shape == rows, "mask shape", shape, f"{rows}, the student's without the last", "one entry for a row"
    )
    _same_device("mask", student, mask)


def check_labels(student: Tensor, labels: Tensor, smoothing: float, weights: object, count: object) -> None:
    """Refuse labels that do not belong to these student logits (..., V), and settings of the label term without meaning."""
    got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
    soft = isinstance(labels, Tensor) and labels.is_floating_point()
    fix = "call .long() on class indices"
    require(soft or got == torch.int64, "labels dtype", got, "torch.int64 or probabilities", fix)
    expected = tuple(student.shape) if soft else tuple(student.shape[:-1])
    what = "probabilities of all V entries" if soft else "a class index for a row"
    aligned = tuple(labels.shape) == expected
    require(aligned, "labels shape", tuple(labels.shape), f"{expected}: {what}", "align them with the logits")
    _same_device("labels", student, labels)
    share = _is_real(smoothing) and 0 <= smoothing < 1
    require(share, "label_smoothing", repr(smoothing), "a number from 0 up to 1", "pass 0.0 for none")
    two = isinstance(weights, (tuple, list)) and len(weights) == 2 and all(map(_is_weight, weights))
    require(two, "weights", repr(weights), "two finite numbers, 0 or more", "pass (soft, label)")
    if count is not None:
        _check_count(count, "label_count")


def _is_weight(value: object) -> bool:
    return _is_real(value) and 0 <= float(value) < math.inf


def check_label_values(labels: Labels, width: int, mask: Tensor | None) -> None:
    """Refuse class indices that are none of the V entries and not ``NO_LABEL``, and negative probabilities."""
    if labels.indices is not None:
        wrong = (labels.indices != NO_LABEL) & ((labels.indices < 0) | (labels.indices >= width))
    else:
        assert labels.probabilities is not None
        wrong = ~((labels.probabilities >= 0) & (labels.probabilities < math.inf)).all(-1)
    wrong = wrong if mask is None else wrong & mask
    if bool(wrong.any()):
        raise _label_error(labels, int(wrong.nonzero()[0, 0]), width)


def _label_error(labels: Labels, row: int, width: int) -> ValueError:
    if labels.indices is None:
        got, expected = (
            f"a negative probability, NaN or +inf in row {row}",
            "finite probabilities of 0 or more",
        )
        return fail("labels", got, expected, "mask the row out")
    got = f"{int(labels.indices[row])} in row {row}"
    return fail("labels", got, f"0 to {width - 1}, or {NO_LABEL} for none", "remap the classes")


def check_inplace(student: Tensor) -> None:
    """Refuse to overwrite a parameter or an input that autograd hands back to the caller, or a view of one."""
    base = student if student._base is None else student._base
    if student.requires_grad and (student.is_leaf or (base.is_leaf and base.requires_grad)):
        got = "a leaf tensor that requires grad" if student.is_leaf else "a view of a leaf that requires grad"
        expected = "logits computed by a layer, whose values nothing needs later"
        raise fail("inplace=True", got, expected, "drop inplace, or pass the layer's output")


def _check_top_k(student: Tensor, target: TopK, temperature: float) -> None:
    known = target.rest in {"ghost", "renormalise"}
    require(known, "TopK.rest", repr(target.rest), "'ghost' or 'renormalise'", "pick one of these names")
    _check_positive("TopK.temperature", target.temperature, "1.0 for plain log-probabilities")
    if target.rest == "ghost" and target.temperature != temperature:
        expected = "the same one, since the mass outside the top k cannot be moved to another temperature"
        fix = f"take the log-probabilities at {temperature}, or use rest='renormalise'"
        raise fail("TopK.temperature", f"{target.temperature} with temperature={temperature}", expected, fix)
    _check_pair(student, target.indices, target.log_probs, "TopK", "log_probs")
    log_rest, shape = target.log_rest, tuple(target.indices.shape)
    if log_rest is not None:
        got = f"one with rest={target.rest!r}"
        require(target.rest == "ghost", "TopK.log_rest", got, "rest='ghost'", "drop one of the two")
        check_floating("TopK.log_rest", log_rest)
        got, expected = f"{tuple(log_rest.shape)} with indices {shape}", "the indices' shape without the last"
        require(tuple(log_rest.shape) == shape[:-1], "TopK.log_rest shape", got, expected, "squeeze it")
        _same_device("TopK.log_rest", student, log_rest)
    width = student.shape[-1]
    require(shape[-1] <= width, "TopK k", shape[-1], f"at most V = {width}", "store fewer entries")


def _check_sampled(student: Tensor, target: Sampled, temperature: float, divergence: str) -> None:
    got, fix = f"{divergence!r} with Sampled", "use TopK or dense logits as target"
    require(divergence == "forward", "divergence", got, "'forward'", fix)
    got, fix = (
        f"{target.temperature} with temperature={temperature}",
        f"draw from softmax(teacher / {temperature})",
    )
    expected = "the same one, since draws at one temperature are biased at another"
    require(target.temperature == temperature, "Sampled.temperature", got, expected, fix)
    _check_pair(student, target.indices, target.weights, "Sampled", "weights")


def _check_pair(student: Tensor, indices: Tensor, values: Tensor, kind: str, name: str) -> None:
    check_floating(f"{kind}.{name}", values)
    dtype = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
    require(dtype == torch.int64, f"{kind}.indices dtype", dtype, "torch.int64", "call .long() on it")
    got, fix = f"{tuple(indices.shape)} and {tuple(values.shape)}", "gather both with the same index"
    same = indices.shape == values.shape
    require(same, f"{kind} shapes", got, f"indices and {name} of the same shape", fix)
    _same_rows(f"{kind}.indices", student, indices)
    _same_device(f"{kind}.{name}", student, values)


def _same_rows(name: str, student: Tensor, other: Tensor) -> None:
    rows, shape = tuple(student.shape[:-1]), tuple(other.shape)
    expected = f"{rows} + (width >= 1,), as the student's {tuple(student.shape)}"
    aligned = len(shape) == len(rows) + 1 and shape[:-1] == rows and shape[-1] > 0
    require(
        aligned, f"{name} shape", shape, expected, "align the rows of both sides first; nothing is broadcast"
    )
    _same_device(name, student, other)


def _same_device(name: str, student: Tensor, other: Tensor) -> None:
    device = student.device
    if other.device != device:
        raise fail(f"{name} device", other.device, f"{device}, the student's", f"call .to({str(device)!r})")


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
        _check_log_probs(indices, values, rest)
    else:
        _check_weights(values)


def _check_indices(target: TopK | Sampled, width: int, mask: Tensor | None) -> Tensor:
    """Refuse indices that are none of a row's entries; those of the rows that count."""
    indices = target.indices if mask is None else target.indices[mask]
    if indices.numel() == 0:
        return indices
    low, high = indices.min().item(), indices.max().item()
    if low < 0 or high >= width:
        expected, wrong = f"0 to {width - 1}, the student's entries", low if low < 0 else high
        raise fail(f"{type(target).__name__}.indices", wrong, expected, "drop or remap foreign entries")
    return indices


def _check_log_probs(indices: Tensor, log_probs: Tensor, log_rest: Tensor | None) -> None:
    ordered = indices.sort(-1).values
    repeated, fix = bool((ordered[:, 1:] == ordered[:, :-1]).any()), "Sampled is what may repeat"
    require(not repeated, "TopK.indices", "a repeated index in a row", "k distinct entries", fix)
    sums = log_probs.exp().sum(-1)
    off = ~((sums <= 1 + SUM_TOLERANCE) & (sums > 0))
    if bool(off.any()):
        got = f"a row whose exp sums to {sums[off][0].item():.6g}"
        raise fail("TopK.log_probs", got, "above 0 and at most 1", "pass log_softmax")
    if log_rest is not None:
        whole = sums + log_rest.double().exp()
        off = ~((whole - 1).abs() <= SUM_TOLERANCE)
        if bool(off.any()):
            got = f"a row that sums to {whole[off][0].item():.6g} with its entries"
            fix = "pass the log of the mass outside the k entries, or leave it out"
            raise fail("TopK.log_rest", got, "1", fix)


def _check_weights(weights: Tensor) -> None:
    least = weights.min().item()
    require(least >= 0, "Sampled.weights", f"{least:.6g}", "weights >= 0", "divide counts by draws")
    sums = weights.sum(-1)
    off = (sums - 1).abs() > SUM_TOLERANCE
    if bool(off.any()):
        got = f"a row that sums to {sums[off][0].item():.6g}"
        raise fail("Sampled.weights", got, "1 in each row", "divide by the row's sum")


def checked(total: float, rows: Tensor, what: str = "logits") -> None:
    """Refuse losses of which one is not a number, or reports an index out of range; +inf is a loss like another."""
    if not math.isnan(total) and total != -math.inf:
        return
    if bool(rows.isnan().any()):
        row = int(rows.isnan().nonzero()[0, 0])
        raise fail(
            what, f"NaN, +inf or only -inf in row {row} (of {rows.numel()} flattened rows)",
            "finite logits, with -inf for entries that cannot occur", "mask the row out, or find the step that made it so",
        )  # fmt: skip
    if bool((rows == -math.inf).any()):
        row = int((rows == -math.inf).nonzero()[0, 0])
        got = f"one outside the student's entries in row {row} of a trusted target"
        raise fail("target indices", got, "0 to V - 1", "drop trusted=True to see which, and remap it")


def checked_labels(total: float, rows: Tensor, labels: Labels, width: int, mask: Tensor | None) -> None:
    """Refuse label terms (N,) of which one is not a number, or reports an index out of range, or comes of an infinite label."""
    if math.isinf(total):  # also that of a label which the student rules out
        check_label_values(labels, width, mask)
    if math.isnan(total) or total == -math.inf:
        raise _label_error(labels, int((rows.isnan() | (rows == -math.inf)).nonzero()[0, 0]), width)
