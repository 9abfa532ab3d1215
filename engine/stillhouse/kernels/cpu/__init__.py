"""The Numba backend: torch tensors in front of the compiled rows, which the first call loads or compiles."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.kernels.cpu.build import entry
from stillhouse.kernels.cpu.workers import LINE, Workers
from stillhouse.kernels.normalise import single
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
    scales: tuple[float, float] = (1.0, 0.0),
    out_grad: Tensor | None,
    labels: Labels | None = None,
) -> tuple[Tensor, tuple[float, float]]:
    """The losses of each row in float32 and their sums; the gradient of the sums times ``scales`` in ``out_grad``.

    Args:
        student: (N, V) float32, bfloat16 or float16, on the CPU, columns contiguous.
        target: teacher logits (N, Vt) of any of these dtypes, or a TopK or Sampled of (N, k).
        temperature: T.
        divergence: ``forward``, ``reverse`` (with labels not against a narrower teacher) or ``jsd``.
        beta: for ``jsd``.
        mask: (N,) bool, or None.
        scales: of the gradients of the divergence and of the label term.
        out_grad: (N, V) contiguous, of the student's dtype; may be ``student`` itself. None: loss only.
        labels: those of the label term, of (N,) rows.

    Returns:
        The losses, (1, N), or (2, N) with labels, and the sum of each. They are also -inf, where an index lies outside the row,
        and NaN for a row that is no distribution; the gradient of such a row is undefined.
    """
    losses = torch.empty((1 if labels is None else 2, student.shape[0]), dtype=torch.float32)
    if student.numel() == 0:
        return losses.zero_(), (0.0, 0.0)
    rows, width = student.shape
    square = float(temperature) ** 2
    mask = None if mask is None else mask.contiguous()
    tensors = _readable(target)  # held until the rows are done
    if isinstance(target, Tensor):
        kind, scratch, others, power, widest = (
            *_dense(student, tensors[0], divergence),
            0.0,
            max(width, target.shape[1]),
        )
    else:
        kind, scratch, others = _sparse(width, target, tensors)
        power, widest = target.temperature / temperature, width
    indices = probabilities = None
    smoothing = 0.0
    at = 4 * scratch  # of the label term's part
    if labels is not None:
        kind, smoothing = f"{kind}_labels", labels.smoothing
        indices = None if labels.indices is None else labels.indices.contiguous()
        probabilities = None if labels.probabilities is None else _plain(labels.probabilities)
        scratch += _padded(widest)
    integers = (
        DIVERGENCES[divergence], student.data_ptr(), _address(out_grad), losses.data_ptr(), _address(mask),
        student.stride(0) * student.element_size(), DTYPES[student.dtype], width, _series(beta)[1], _address(indices),
        _address(probabilities), at, *others,
    )  # fmt: skip
    reals = 1.0 / temperature, scales[0] * square, beta, square, smoothing, scales[1], power
    return losses, _workers.run(entry(kind), rows, width, scratch, integers, reals)


def _readable(target: Target) -> tuple[Tensor | None, ...]:
    """A target's tensors as the rows read them: logits; or indices, values and a ghost's logarithm."""
    if isinstance(target, Tensor):
        target = target if target.stride(1) == 1 else target.contiguous()
        return (target if target.dtype in DTYPES else single(target),)
    if isinstance(target, Sampled):
        return target.indices.contiguous(), _plain(target.weights), None
    values, rest = target.log_probs, target.log_rest
    if values.dtype == torch.float64 and target.rest != "ghost":  # what the kernel makes them relative to
        values = values - values.amax(-1, keepdim=True)
    return target.indices.contiguous(), _plain(values), None if rest is None else _plain(rest)


def _dense(student: Tensor, teacher: Tensor | None, divergence: str) -> tuple[str, int, tuple[int, ...]]:
    """(Entry point, float32 of scratch, the integers of ``dense.row_of``)."""
    assert teacher is not None
    vs, vt = student.shape[1], teacher.shape[1]
    if divergence == "forward":
        vt = min(vs, vt)
    elif divergence == "reverse":
        vs = min(vs, vt)
    v = max(vs, vt)
    part = _padded(v)
    stride = teacher.stride(0) * teacher.element_size()
    return "dense", 3 * part, (teacher.data_ptr(), stride, DTYPES[teacher.dtype], vs, vt, v, 4 * part)


def _sparse(
    v: int, target: TopK | Sampled, tensors: tuple[Tensor | None, ...]
) -> tuple[str, int, tuple[int, ...]]:
    """The same of ``sparse.row_of``."""
    sampled, k = isinstance(target, Sampled), target.indices.shape[1]
    ghost = isinstance(target, TopK) and target.rest == "ghost"
    scratch = _padded(v + (2 * v if sampled else 4 * k)) + 5 * LINE
    return "sparse", scratch, (*map(_address, tensors), k, sampled, ghost)


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
