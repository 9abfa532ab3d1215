"""The Numba backend: torch tensors in front of the compiled rows, which the first call loads or compiles."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.kernels.cpu_jit import BLOCK, entry
from stillhouse.kernels.series import jsd_apart, jsd_series
from stillhouse.kernels.targets import Sampled, Target, TopK
from stillhouse.kernels.workers import LINE, Workers

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
) -> tuple[Tensor, float]:
    """``loss_scale`` times the loss of each row (N,) in float32 and their sum; ``scale`` times the gradient in ``out_grad``.

    Args:
        student: (N, V) float32, bfloat16 or float16, on the CPU, columns contiguous.
        target: teacher logits (N, Vt) of any of these dtypes, or a TopK or Sampled of (N, k).
        temperature: T.
        divergence: ``forward``, ``reverse`` or ``jsd``.
        beta: for ``jsd``.
        mask: (N,) bool, or None.
        scale: multiplies the gradient, not the loss.
        loss_scale: multiplies the loss, not the gradient.
        out_grad: (N, V) contiguous, of the student's dtype; may be ``student`` itself. None: loss only.
        loss: 0-d float32, which the sum is written to; by the kernel, since any other way's code has left the caches meanwhile:
            ctypes takes 15 us then, a torch operator several times that.

    Returns:
        The losses are also -inf, where an index of a trusted TopK or Sampled lies outside the row, and NaN for a row that is no
        distribution; the gradient of such a row is undefined.
    """
    losses = torch.empty(student.shape[0], dtype=torch.float32)
    square = float(temperature) ** 2
    scales = (scale * square, loss_scale * square)
    if student.numel() == 0:
        if loss is not None:
            loss.zero_()
        return losses.zero_(), 0.0
    mask = None if mask is None else mask.contiguous()
    settings = (temperature, divergence, beta, mask, scales, out_grad, losses, _address(loss))
    if isinstance(target, Tensor):
        return losses, _dense(student, target, *settings)
    return losses, _sparse(student, target, *settings)


def _dense(
    student: Tensor, teacher: Tensor, temperature: float, divergence: str, beta: float, mask: Tensor | None,
    scales: tuple[float, float], out_grad: Tensor | None, losses: Tensor, loss: int,
) -> float:  # fmt: skip
    if teacher.stride(1) != 1:
        teacher = teacher.contiguous()
    if teacher.dtype not in DTYPES:
        teacher = teacher.float()
    wide, vs, vt = student.shape[1], student.shape[1], teacher.shape[1]
    if divergence == "forward":
        vt = min(vs, vt)
    elif divergence == "reverse":
        vs = min(vs, vt)
    v = max(vs, vt)
    stride = -(-v // LINE) * LINE + LINE
    return _workers.run(
        entry("dense_rows"), student.shape[0], wide, 3 * stride, loss,
        (
            DIVERGENCES[divergence], student.data_ptr(), teacher.data_ptr(), _address(out_grad),
            losses.data_ptr(), _address(mask), student.stride(0) * student.element_size(),
            teacher.stride(0) * teacher.element_size(), DTYPES[student.dtype], DTYPES[teacher.dtype],
            vs, vt, v, wide, stride * 4, _series(beta)[1],
        ),
        (1.0 / temperature, scales[0], beta, scales[1]),
    )  # fmt: skip


def _sparse(
    student: Tensor, target: TopK | Sampled, temperature: float, divergence: str, beta: float, mask: Tensor | None,
    scales: tuple[float, float], out_grad: Tensor | None, losses: Tensor, loss: int,
) -> float:  # fmt: skip
    sampled = isinstance(target, Sampled)
    ghost = isinstance(target, TopK) and target.rest == "ghost"
    values = target.weights if isinstance(target, Sampled) else target.log_probs
    if values.dtype == torch.float64 and not sampled and not ghost:  # what the kernel makes them relative to
        values = values - values.amax(-1, keepdim=True)
    values, indices = _plain(values), target.indices.contiguous()
    rest = target.log_rest if isinstance(target, TopK) else None
    rest = None if rest is None else _plain(rest)
    v, k = student.shape[1], indices.shape[1]
    stride = -(-(v + (2 * v if sampled else 4 * k)) // LINE) * LINE + 6 * LINE
    # of rows that the caches hold, one is written while the next is read; only of float32, for each kind takes seconds to compile
    pairs = v <= BLOCK and out_grad is not None and student.dtype == torch.float32
    return _workers.run(
        entry("sparse_rows"), student.shape[0], v, (1 + pairs) * stride, loss,
        (
            DIVERGENCES[divergence], student.data_ptr(), _address(out_grad), losses.data_ptr(),
            _address(mask), student.stride(0) * student.element_size(), DTYPES[student.dtype], v,
            indices.data_ptr(), values.data_ptr(), _address(rest), k, sampled, ghost, _series(beta)[1], pairs * stride * 4,
        ),
        (1.0 / temperature, scales[0], beta, scales[1], target.temperature / temperature),
    )  # fmt: skip


def _plain(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=64)
def _series(beta: float) -> tuple[NDArray[np.float32], int]:
    """What jsd needs of beta, and where it lies: an array's address costs as much to ask for as all the others together."""
    series = np.array([*jsd_series(beta), jsd_apart(beta)], dtype=np.float32)
    return series, series.ctypes.data
