"""Helpers of the kernel tests: exact values in float64, and relative errors."""

from dataclasses import replace

import torch

from stillhouse.kernels import Sampled, TopK, reference, softmax_kl

DIVERGENCES = ("forward", "reverse", "jsd")
TEMPERATURES = (0.05, 0.5, 1.0, 4.0, 100.0)


def logits(rows, width, seed=0, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, width, generator=generator)).to(dtype)


def wide(target):
    if isinstance(target, TopK):
        rest = None if target.log_rest is None else target.log_rest.double()
        return replace(target, log_probs=target.log_probs.double(), log_rest=rest)
    if isinstance(target, Sampled):
        return Sampled(target.indices, target.weights.double(), target.temperature)
    return target.double()


def exact(student, target, *, temperature=1.0, divergence="forward", beta=0.5, mask=None):
    """(loss of each row, gradient of their mean over valid rows), by the specification in float64."""
    s = student.detach().double().requires_grad_()
    rows = reference.softmax_kl_rows(s, wide(target), temperature, divergence, beta, mask)
    count = rows.numel() if mask is None else max(int(mask.sum()), 1)
    (gradient,) = torch.autograd.grad(rows.sum() / count, s)
    return rows.detach(), gradient


def fused(student, target, **settings):
    """(loss of each row, gradient of the mean), by the CPU kernel, which small calls would not get by themselves."""
    settings = {"backend": "numba", **settings}
    s = student.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(softmax_kl(s, target, **settings), s)
    rows = softmax_kl(s.detach(), target, **{**settings, "reduction": "none"})
    return rows.double(), gradient.double()


def relative(got, expected, floor=0.0):
    return (
        (got.double() - expected.double()).norm() / max(expected.double().norm().item(), floor, 1e-300)
    ).item()
