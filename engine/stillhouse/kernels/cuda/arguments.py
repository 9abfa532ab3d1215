"""From tensors to the numbers a kernel takes. No driver, so the tests pack their launches with the same code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.kernels.cuda.plan import Plan
from stillhouse.kernels.reference import log_of_rest, top_k_at
from stillhouse.kernels.series import TERMS, jsd_series
from stillhouse.kernels.targets import Sampled, Target, TopK

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
GHOST, RENORMALISE, WITHIN, SAMPLED = range(4)  # what a sparse kernel does with the entries outside the k


def target_kind(target: Target) -> str:
    """Logits are "dense"; top-k and sampled labels are "sparse"."""
    return "dense" if isinstance(target, Tensor) else "sparse"


def widths(v: int, target: Target, divergence: str) -> tuple[int, int, int]:
    """(all of the row, where the student has mass, where the teacher has), for differing vocabularies."""
    if not isinstance(target, Tensor):
        return v, v, v
    teacher = target.shape[-1]
    widest = max(v, teacher)
    student = min(v, teacher) if divergence == "reverse" else v
    teacher = min(v, teacher) if divergence == "forward" else teacher
    return widest, student, teacher


def flatten(target: Target, temperature: float) -> list[Tensor]:
    """The tensors a kernel reads of a target: logits, or indices (int64), values and a ghost's logarithm (float32)."""
    if isinstance(target, Tensor):
        return [target]
    if isinstance(target, Sampled):
        return [target.indices.contiguous(), target.weights.float().contiguous()]
    log_probs = top_k_at(target, temperature).float().contiguous()
    read = [target.indices.contiguous(), log_probs]
    if target.rest != "ghost":
        return read
    log_rest = target.log_rest
    if log_rest is None:
        log_rest = log_of_rest(log_probs)
    return [*read, log_rest.float().contiguous()]


def sparse_mode(target: TopK | Sampled, divergence: str) -> int:
    """Which of the four ways a sparse kernel treats what lies outside the k entries."""
    if isinstance(target, Sampled):
        return SAMPLED
    if target.rest == "ghost":
        return GHOST
    return WITHIN if divergence == "reverse" else RENORMALISE


def factors(divergence: str, beta: float) -> tuple[float, float]:
    """What the kernels' losses and gradients leave out: they work in log2, and jsd in units of (1 - beta) p_s."""
    if divergence == "jsd":
        return (beta - 1) * math.log(2), (beta - 1) * math.log(2)
    return 1.0, math.log(2) if divergence == "reverse" else 1.0


COIN = 4 + 2 * TERMS  # numbers that jsd needs of beta
FLOATS = 3 + COIN  # numbers of a kernel's arguments, which come last


def coin(beta: float) -> tuple[float, ...]:
    """What jsd needs of beta: its odds and their log2, log2 of beta and of 1 - beta, and two polynomials' coefficients."""
    log_t, log_s = math.log2(beta), math.log2(1 - beta)
    return beta / (1 - beta), log_t - log_s, log_t, log_s, *jsd_series(beta)[: 2 * TERMS]


def pack(
    launch: Plan, *, student_shape: tuple[int, int], target: Target, temperature: float, divergence: str, beta: float,
    factor: float, student: int, tensors: Sequence[int], grad: int, loss: int, mask: int, scale: int,
) -> tuple[int | float, ...]:  # fmt: skip
    """The arguments of the kernel of ``launch``, in order; tensors are given by address, absent ones as 0."""
    rows, v = student_shape
    of_loss, of_grad = factors(divergence, beta)
    scalars = (
        math.log2(math.e) / temperature,
        temperature * factor * of_grad,
        temperature * temperature * of_loss,
        *(coin(beta) if divergence == "jsd" else [0.0] * COIN),
    )
    if isinstance(target, Tensor):
        _, s_width, t_width = widths(v, target, divergence)
        last = rows if launch.spec.lanes else launch.span
        dense = (v, target.shape[-1], s_width, t_width, last)
        return (student, tensors[0], grad, loss, mask, scale, *dense, *scalars)
    k = target.indices.shape[-1]
    outside = tensors[2] if len(tensors) > 2 else 0
    sizes = (v, k, sparse_mode(target, divergence), launch.span)
    return (student, tensors[0], tensors[1], outside, grad, loss, mask, scale, *sizes, *scalars)
