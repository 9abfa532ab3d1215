"""The Numba backend: torch tensors in front of the compiled rows, which the first call loads or compiles."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.kernels.cpu.build import entry
from stillhouse.kernels.cpu.workers import LINE, Workers
from stillhouse.kernels.series import jsd_apart, jsd_series
from stillhouse.kernels.targets import Labels, Sampled, Target, TopK

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DIVERGENCES = {"forward": 0, "reverse": 1, "jsd": 2}

_workers = Workers()


def softmax_kl_fwd_bwd(
    student: Tensor,
    target: Target,
    *,
    temperature: float,
    divergence: str,
    beta: float,
    mask: Tensor | None,
    scale: float,
    out_grad: Tensor | None,
    loss_scale: float = 1.0,
    loss: Tensor | None = None,
    labels: Labels | None = None,
    label_scale: float = 0.0,
    label_loss_scale: float = 1.0,
) -> tuple[Tensor, tuple[float, float]]:
    """``loss_scale`` times the loss of each row in float32 and their sum; ``scale`` times the gradient in ``out_grad``.

    Args:
        student: (N, V) float32, bfloat16 or float16, on the CPU, columns contiguous.
        target: teacher logits (N, Vt) of any of these dtypes, or a TopK or Sampled of (N, k).
        temperature: T.
        divergence: ``forward``, ``reverse`` (with labels not against a narrower teacher) or ``jsd``.
        beta: for ``jsd``.
        mask: (N,) bool, or None.
        scale: multiplies the gradient, not the loss.
        loss_scale: multiplies the loss, not the gradient.
        out_grad: (N, V) contiguous, of the student's dtype; may be ``student`` itself. None: loss only.
        loss: float32, () or with labels (2,), which the sums are written to; by the kernel, since any other way's code has left
            the caches meanwhile: ctypes takes 15 us then, a torch operator several times that.
        labels: those of the label term, of (N,) rows, whose gradient times ``label_scale`` is added to the other.
        label_scale: multiplies the label term's gradient.
        label_loss_scale: multiplies the label term's loss.

    Returns:
        The losses, (1, N), or (2, N) with labels, and the sum of each. They are also -inf, where an index lies outside the row,
        and NaN for a row that is no distribution; the gradient of such a row is undefined.
    """
    losses = torch.empty((1 if labels is None else 2, student.shape[0]), dtype=torch.float32)
    if student.numel() == 0:
        if loss is not None:
            loss.zero_()
        return losses.zero_(), (0.0, 0.0)
    rows, width = student.shape
    square = float(temperature) ** 2
    mask = None if mask is None else mask.contiguous()
    tensors = _readable(target)  # held until the rows are done
    common = _address(out_grad), losses.data_ptr(), _address(mask)
    reals: tuple[float, ...] = (1.0 / temperature, scale * square, beta, loss_scale * square)
    if isinstance(target, Tensor):
        kind, scratch, integers = _dense(student, tensors[0], divergence, beta, common)
    else:
        kind, scratch, integers = _sparse(student, target, tensors, divergence, beta, common)
        reals += (target.temperature / temperature,)
    if labels is None:
        return losses, _workers.run(entry(kind), rows, width, scratch, _address(loss), integers, reals)
    indices = None if labels.indices is None else labels.indices.contiguous()
    probabilities = None if labels.probabilities is None else _plain(labels.probabilities)
    integers += (_address(indices), _address(probabilities))
    reals = (*reals, *(0.0,) * (5 - len(reals)), labels.smoothing, label_scale, label_loss_scale)
    scratch += _padded(max(width, integers[12] if kind == "dense" else 0))
    return losses, _workers.run(
        entry(f"{kind}_labels"), rows, width, scratch, _address(loss), integers, reals
    )


def _readable(target: Target) -> tuple[Tensor | None, ...]:
    """A target's tensors as the rows read them: logits; or indices, values and a ghost's logarithm."""
    if isinstance(target, Tensor):
        target = target if target.stride(1) == 1 else target.contiguous()
        return (target if target.dtype in DTYPES else target.float(),)
    if isinstance(target, Sampled):
        return target.indices.contiguous(), _plain(target.weights), None
    values, rest = target.log_probs, target.log_rest
    if values.dtype == torch.float64 and target.rest != "ghost":  # what the kernel makes them relative to
        values = values - values.amax(-1, keepdim=True)
    return target.indices.contiguous(), _plain(values), None if rest is None else _plain(rest)


def _dense(
    student: Tensor, teacher: Tensor | None, divergence: str, beta: float, common: tuple[int, int, int]
) -> tuple[str, int, tuple[int, ...]]:
    """(Entry point, float32 of scratch, the call's integers in the order of ``dense.rows_of``)."""
    assert teacher is not None
    wide, vs, vt = student.shape[1], student.shape[1], teacher.shape[1]
    if divergence == "forward":
        vt = min(vs, vt)
    elif divergence == "reverse":
        vs = min(vs, vt)
    v = max(vs, vt)
    stride = _padded(v)
    integers = (
        DIVERGENCES[divergence], student.data_ptr(), teacher.data_ptr(), *common,
        student.stride(0) * student.element_size(), teacher.stride(0) * teacher.element_size(),
        DTYPES[student.dtype], DTYPES[teacher.dtype], vs, vt, v, wide, stride * 4, _series(beta)[1],
    )  # fmt: skip
    return "dense", 3 * stride, integers


def _sparse(
    student: Tensor, target: TopK | Sampled, tensors: tuple[Tensor | None, ...], divergence: str, beta: float,
    common: tuple[int, int, int],
) -> tuple[str, int, tuple[int, ...]]:  # fmt: skip
    """The same in the order of ``sparse.rows_of``."""
    sampled = isinstance(target, Sampled)
    ghost = isinstance(target, TopK) and target.rest == "ghost"
    v, k = student.shape[1], target.indices.shape[1]
    scratch = _padded(v + (2 * v if sampled else 4 * k)) + 5 * LINE
    integers = (
        DIVERGENCES[divergence], student.data_ptr(), *common, student.stride(0) * student.element_size(),
        DTYPES[student.dtype], v, *map(_address, tensors), k, sampled, ghost, _series(beta)[1], scratch * 4,
    )  # fmt: skip
    return "sparse", scratch, integers


def _padded(columns: int) -> int:
    return -(-columns // LINE) * LINE + LINE


def _plain(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=64)
def _series(beta: float) -> tuple[NDArray[np.float32], int]:
    """What jsd needs of beta, and where it lies: an array's address costs as much to ask for as all the others together."""
    series = np.array([*jsd_series(beta), jsd_apart(beta)], dtype=np.float32)
    return series, series.ctypes.data
