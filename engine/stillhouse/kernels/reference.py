"""The specification of every softmax divergence here, in plain torch: the other paths are tested against this file.

Rows are 2-D: student (N, V), teacher (N, Vt). The dtype is generic, so ``torch.autograd.gradcheck`` runs in float64.

KL(p || q) is summed as  sum_j p_j * phi(log q_j - log p_j)  with  phi(x) = exp(x) - 1 - x,  which equals
sum_j p_j (log p_j - log q_j) because p and q both sum to one. Every term is non-negative, and an error in a
normaliser enters squared: in the plain sum it enters as it is and drowns the loss of nearly equal distributions.

Entries that only one side has (differing widths) count as -inf on the other. In KL(p || q) entries that q lacks
are dropped from p, which is renormalised: they would make the loss infinite whatever the student does.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from stillhouse.kernels.normalise import log_softmax, wide
from stillhouse.kernels.series import LEAST_REST
from stillhouse.kernels.targets import Labels, Sampled, Target, TopK, restricted

NEG_INF = float("-inf")


def softmax_kl_rows(
    student: Tensor,
    target: Target,
    temperature: float,
    divergence: str,
    beta: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Loss of each row, (N,): T^2 times the divergence; exactly 0, with gradient 0, where ``mask`` (N,) is False."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, target = wide(student), wide(target) if isinstance(target, Tensor) else target
    if mask is not None:  # replaced before any arithmetic, so that inf and NaN in masked rows reach nothing
        student = torch.where(mask[:, None], student, 0)
        target = _mask_target(target, mask)
    if isinstance(target, Sampled):
        log_s = log_softmax(student, temperature).gather(-1, target.indices)
        rows = -torch.where(target.weights > 0, target.weights * log_s, 0).sum(-1)  # 0 times -inf is NaN
    elif isinstance(target, TopK):
        rows = _divergence(*_top_k_outcomes(student, target, temperature, divergence), divergence, beta)
    else:
        rows = _divergence(*_aligned(student, target, temperature, divergence), divergence, beta)
    rows = (rows * temperature**2).to(dtype)
    return rows if mask is None else torch.where(mask, rows, 0)


def label_rows(student: Tensor, labels: Labels, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of each row's label with softmax(student), (N,): -sum_j y_j log s_j.

    y is the label's entry, or its probabilities, less ``smoothing`` of it, which goes to all V entries alike (Szegedy et al. 2016,
    arXiv:1512.00567, section 7). 0, with gradient 0, for a row without label, and where ``mask`` (N,) is False.
    """
    keep = labels.present()
    keep = keep if mask is None else keep & mask
    log_s = log_softmax(torch.where(keep[:, None], student, 0))  # what other rows hold reaches nothing
    if labels.probabilities is not None:
        y = torch.where(keep[:, None], labels.probabilities, 0).to(log_s.dtype)
        y = torch.where(
            y < 0, torch.nan, y
        )  # where nobody looks at them: on a GPU, and where a call is traced
        rows = -torch.where(y != 0, y * log_s, 0).sum(-1)  # 0 times -inf is NaN
    elif labels.indices is not None:
        rows = -log_s.gather(-1, torch.where(keep, labels.indices, 0)[:, None])[:, 0]
    if labels.smoothing:
        rows = (1 - labels.smoothing) * rows - labels.smoothing * log_s.mean(-1)
    return torch.where(keep, rows, 0)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    if not log_p.requires_grad:
        return _bregman(log_p, log_q.exp(), log_q - log_p)
    # Where q has no mass and p has, the loss is +inf; a gradient through p would be NaN, so such rows get none.
    infinite = ((log_q == NEG_INF) & (log_p.exp() > 0)).any(-1, keepdim=True)
    log_q = torch.where(infinite, log_p.detach(), log_q)
    return torch.where(infinite[:, 0], torch.inf, _bregman(log_p, log_q.exp(), log_q - log_p))


def _bregman(log_p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    """sum_j p phi(x) for x = log(q / p): as q - p - p x, and by the series of phi near zero, where that cancels."""
    p = log_p.exp()
    x = torch.where(p > 0, x, 0)
    near = x.clamp(-0.5, 0.5)
    series = torch.zeros_like(near)
    for n in range(14, 1, -1):  # 0.5^13 / 15! < 1e-16
        series = series * near + 1.0 / math.factorial(n)
    return torch.where((p > 0) & (x.abs() < 0.5), p * (series * near * near), q - p - p * x).sum(-1)


def _jsd(log_t: Tensor, log_s: Tensor, beta: float) -> Tensor:
    mixture = beta * log_t.exp() + (1 - beta) * log_s.exp()
    ratio = log_t - log_s
    ratio = torch.where(ratio.isnan(), 0, ratio)  # neither side has the entry
    to_s = torch.log1p(beta * torch.expm1(ratio.clamp(max=80)))  # log(m / p_s)
    to_t = torch.log1p((1 - beta) * torch.expm1((-ratio).clamp(max=80)))  # log(m / p_t)
    return beta * _bregman(log_t, mixture, to_t) + (1 - beta) * _bregman(log_s, mixture, to_s)


def _divergence(log_s: Tensor, log_t: Tensor, divergence: str, beta: float) -> Tensor:
    if divergence == "forward":
        return _kl(log_t, log_s)
    if divergence == "reverse":
        return _kl(log_s, log_t)
    return _jsd(log_t, log_s, beta)  # beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s


def _aligned(student: Tensor, teacher: Tensor, temperature: float, divergence: str) -> tuple[Tensor, Tensor]:
    shared = min(student.shape[-1], teacher.shape[-1])
    if divergence == "forward":
        teacher = teacher[:, :shared]
    elif divergence == "reverse":
        student = student[:, :shared]
    width = max(student.shape[-1], teacher.shape[-1])
    log_s, log_t = (log_softmax(logits, temperature) for logits in (student, teacher))
    pad = torch.nn.functional.pad
    return pad(log_s, (0, width - log_s.shape[-1]), value=NEG_INF), pad(
        log_t, (0, width - log_t.shape[-1]), value=NEG_INF
    )


def _top_k_outcomes(
    student: Tensor, target: TopK, temperature: float, divergence: str
) -> tuple[Tensor, Tensor]:
    """Log-probabilities over the k entries and, as one more outcome, everything else: (N, k + 1) each."""
    log_t = top_k_at(target, temperature)
    if restricted(target, divergence):
        return log_softmax(student.gather(-1, target.indices), temperature), log_t
    log_s = log_softmax(student, temperature)
    kept = log_s.gather(-1, target.indices)
    if kept.shape[-1] == log_s.shape[-1]:
        return kept, log_t
    others = log_s.scatter(-1, target.indices, NEG_INF)
    none = (others == NEG_INF).all(-1, keepdim=True)  # whose logsumexp has the gradient NaN
    nothing = NEG_INF - (student / temperature).logsumexp(-1, keepdim=True)  # and this the normaliser's
    others = torch.where(none, nothing, torch.where(none, 0, others).logsumexp(-1, keepdim=True))
    return torch.cat([kept, others], -1), torch.cat([log_t, _log_rest(target, log_t)], -1)


def top_k_at(target: TopK, temperature: float) -> Tensor:
    """The k log-probabilities at the temperature of the call; renormalised where the target asks for it."""
    log_t = wide(target.log_probs)
    if target.rest == "renormalise":
        log_t = log_softmax(log_t * (target.temperature / temperature))
    return log_t


def _log_rest(target: TopK, log_t: Tensor) -> Tensor:
    if target.rest == "renormalise":
        return torch.full_like(log_t[:, :1], NEG_INF)
    if target.log_rest is not None:
        return target.log_rest[:, None].to(log_t.dtype)
    return log_of_rest(log_t)[:, None].to(log_t.dtype)


def log_of_rest(log_t: Tensor) -> Tensor:
    """Logarithm, in float64, of what k log-probabilities (N, k) leave of 1: (N,)."""
    rest = 1 - log_t.double().exp().sum(-1)  # 1 - sum cancels: float64 or nothing is left
    return torch.where(rest > LEAST_REST, rest, 0).log()


def _mask_target(target: Target, mask: Tensor) -> Target:
    keep = mask[:, None]
    if isinstance(target, TopK):
        k = target.indices.shape[-1]
        first = torch.arange(k, device=mask.device)
        indices = torch.where(keep, target.indices, first)
        log_probs = torch.where(keep, target.log_probs, -math.log(k))
        rest = None if target.log_rest is None else torch.where(mask, target.log_rest, NEG_INF)
        return replace(target, indices=indices, log_probs=log_probs, log_rest=rest)
    if isinstance(target, Sampled):
        return Sampled(torch.where(keep, target.indices, 0), torch.where(keep, target.weights, 0))
    return torch.where(keep, target, 0)
