"""From tensors to the numbers a kernel takes. No driver, so the tests pack their launches with the same code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.kernels.cuda.plan import Plan
from stillhouse.kernels.reference import log_of_rest, top_k_at
from stillhouse.kernels.series import TERMS, jsd_series
from stillhouse.kernels.targets import Sampled, Target

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def target_kind(target: Target) -> str:
    """What a kernel is compiled for."""
    return "dense" if isinstance(target, Tensor) else "sampled" if isinstance(target, Sampled) else "top-k"


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
        return [target.contiguous()]
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


def constants(temperature: float, divergence: str, beta: float, smoothing: float) -> tuple[float, ...]:
    """What is the same for all rows, as ``rows`` names its places.

    log2(e) / T; the factors of gradients and losses, which the kernels' lack: they work in log2, and jsd in units of (1 - beta) p_s;
    the share of a label that goes to all entries; what jsd needs of beta: its odds and their log2, log2 of beta and of 1 - beta, and
    two polynomials' coefficients.
    """
    of_loss, of_grad = 1.0, math.log(2) if divergence == "reverse" else 1.0
    coin = (0.0,) * (4 + 2 * TERMS)
    if divergence == "jsd":
        of_loss = of_grad = (beta - 1) * math.log(2)
        log_t, log_s = math.log2(beta), math.log2(1 - beta)
        coin = (beta / (1 - beta), log_t - log_s, log_t, log_s, *jsd_series(beta)[: 2 * TERMS])
    return math.log2(math.e) / temperature, temperature * of_grad, temperature**2 * of_loss, smoothing, *coin


def pack(
    launch: Plan, student_shape: tuple[int, int], target: Target, tensors: Sequence[int], others: Sequence[int],
    factors: tuple[float, float],
) -> tuple[int | float, ...]:  # fmt: skip
    """The arguments of the kernel of ``launch``, in order; tensors are given by address, absent ones as 0.

    ``tensors``: the student, then those of the target; ``others``: gradient, losses, mask, class indices, constants, factors in memory.
    """
    v = student_shape[1]
    if isinstance(target, Tensor):
        _, s_width, t_width = widths(v, target, launch.spec.divergence)
        return (*tensors, *others, v, target.shape[-1], s_width, t_width, launch.span, *factors)
    outside = tensors[3] if len(tensors) > 3 else 0
    return (*tensors[:3], outside, *others, v, target.indices.shape[-1], launch.span, *factors)
