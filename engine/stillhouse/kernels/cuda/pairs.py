"""The arithmetic of one pair of logits, and what of a row is known before it.

Where both sides nearly agree, terms and gradients are differences of nearly equal numbers. So log2(p / q) is had from the
difference of the logits, exactly (the rounding of either, scaled, would be as large as what is left), and where it is small the
rest by series; where it is not, closed forms lose nothing.

p is the teacher's side, of reverse the student's. ``sides`` is what a row's first pass makes of both (``compare``), and
``known`` what is made of that for a pair function, whose results lack the factor known[3], and what
``arguments.constants`` has.
"""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stillhouse.kernels import series
from stillhouse.kernels.cuda import intrinsics as ptx
from stillhouse.kernels.cuda.arithmetic import (
    LARGE,
    LN2,
    ONE,
    ZERO,
    device,
    log2_of_normal,
    log2_one_plus,
    polynomial,
    quotient,
)

F32 = np.float32
FAR = F32(1.0e4)
ROUNDER = F32(1.5 * 2**23)  # added and taken away, it leaves a float32 rounded to a whole number
# bits of a JSD over beta (1 - beta): about a KL where that is small, and less elsewhere
NEAR_JSD = F32(0.125)
TINY = F32(1.0e-6)  # a loss below which a normaliser's error may show, up to 1e-13
PHI = tuple(F32(c) for c in series.PHI)
NEAR = F32(series.RADIUS)
phi_of, series_of = polynomial(len(PHI)), polynomial(series.TERMS)


@device
def compare(k2, cp, dp, cq, dq):
    """(k2, C_p, C_q, 1 / D_p, D_p / D_q, log2 of that): the logarithm is that of the very float, so that the two agree."""
    ratio = quotient(dp, dq)
    return k2, cp, cq, ptx.reciprocal(dp), ratio, log2_of_normal(ratio)


@device
def level(k2, cp, cq):
    """(offset, rest): the logits' difference at which 2^(k2 x - C) of both are equal, and k2 times what it is off by."""
    apart = cp - cq
    back = apart - cp
    rounded = (cp - (apart - back)) - (cq + back)
    offset = apart * ptx.reciprocal(k2)
    return offset, ptx.fma(k2, offset, -apart) - rounded


@device
def gap_of_halves(x, y, k2, offset, rest):
    """K2 (x - y - offset) + rest, for 16-bit logits, which were rounded more than their difference is."""
    return ptx.fma((x - y) - offset, k2, rest)


@device
def gap_of_floats(x, y, k2, offset, rest):
    """The same for float32: what rounds off in x - y is found and added back.

    Infinite where q lacks an entry that p has, and no number where p lacks it.
    """
    apart = ptx.fmin(x - y, LARGE)
    back = apart - x
    rounded = (x - (apart - back)) - (y + back)
    return ptx.fma((apart - offset) + rounded, k2, rest)


@device
def kl_known(sides, coin):
    k2, cp, cq, inverse, ratio, log_ratio = sides
    offset, rest = level(k2, cp, cq)
    return k2, -cp, -cq, inverse, ratio, offset, rest - log_ratio


@device
def jsd_known(sides, coin):
    """What ``jsd_apart`` takes: (1 - beta) p_s over beta p_t / D_t, as a whole power of two and a rest near one, and logs.

    The first goes to the student's maximum, where it is exact, so that the logarithm added to each has few digits; what
    a maximum of 1e7 or more leaves of it goes to the rest. Then the level of the logits' difference, and the polynomials.
    """
    k2, ct, cs, inverse, ratio, log_ratio = sides
    shift = log_ratio - coin[1]
    whole = (shift + ROUNDER) - ROUNDER
    unit = coin[0] * (inverse + ZERO * ratio)  # NaN where the student has no logit above -inf
    moved = whole - cs
    back = moved - whole
    lost = (whole - (moved - back)) - (cs + back)
    offset, rest = level(k2, ct, cs)
    logs = coin[1], coin[2], coin[3]
    return k2, -ct, moved, unit, (shift - whole) + lost, *logs, offset, rest - log_ratio, *coin[4:]


@device
def jsd_apart(xt, xs, known):
    """(loss, p_s, log2(m / p_s) - log2(1 - beta), P), for entries that differ.

    With P = beta p_t and Q = (1 - beta) p_s, both in units of beta / D_t, from the larger and the ratio r <= 1 of the
    smaller to it, so that nothing overflows and log2(1 + r) is the only logarithm. In units of the larger the loss is
    -(1 + r) (log2(1 + r) + log2 w) - r gap, with w the weight of the larger side and gap = log2(p_t / p_s), or its
    negative where Q is larger. Logarithms are clamped to finite ones; their probabilities are zero.
    """
    k2, nt, ns, base, shift, log_odds, log_t, log_s = known
    zt = ptx.fmax(ptx.fma(xt, k2, nt), -FAR)
    zs = ptx.fmax(ptx.fma(xs, k2, ns) + shift, -FAR)
    weighted = zt - zs
    gap = weighted - log_odds
    teacher_larger = weighted > ZERO
    larger, ratio = ptx.exp2(ptx.fmax(zt, zs)), ptx.exp2(-abs(weighted))
    mixture = ONE + ratio
    log_mixture = log2_one_plus(ratio)
    known_log = log_t if teacher_larger else log_s
    loss = larger * ptx.fma(mixture, log_mixture + known_log, ratio * (gap if teacher_larger else -gap))
    pt, ps = larger * (ONE if teacher_larger else ratio), larger * (ratio if teacher_larger else ONE)
    return loss, ps, ptx.fmax(weighted, ZERO) + log_mixture, pt


def pair_of(divergence: str, gap_of: Callable, centred: bool = False) -> Callable:
    """The pair function of the teacher's logit and the student's: (loss, b, c, d).

    The gradient is b of forward, and c - b sum(c) of the others; of forward too where it is ``centred``. Of jsd c is p_s log2(m / p_s), and d the same less log2(1 - beta),
    which tells entries apart where the student has nearly all of its mass alone: which one serves is for the row to say.
    """

    @device
    def kl(xp, xq, known):
        """(p phi(log q/p), p, q, q - p, p log2(p / q)) with phi(x) = exp(x) - 1 - x, by series where p and q nearly agree."""
        k2, n_p, n_q, base, ratio, offset, rest = known
        p, q = ptx.exp2(ptx.fma(xp, k2, n_p)), ptx.exp2(ptx.fma(xq, k2, n_q)) * ratio
        gap = gap_of(xp, xq, k2, offset, rest)
        weighted = p * gap if p > ZERO else ZERO
        x, first = gap * -LN2, weighted * -LN2
        second = first * (x * phi_of(x, PHI))
        near = abs(x) < NEAR
        change = first + second if near else q - p
        return second if near else change - first, p, q, change, weighted

    @device
    def forward(xt, xs, known):
        loss, p, q, change, weighted = kl(xt, xs, known)
        return loss, q if centred else change, change, ZERO

    @device
    def reverse(xt, xs, known):
        loss, p, q, change, weighted = kl(xs, xt, known)
        return loss, p, weighted, ZERO

    @device
    def jsd(xt, xs, known):
        """By the polynomials of ``series.jsd_series`` where p_t and p_s nearly agree."""
        apart, ps, log_m, pt = jsd_apart(xt, xs, known[:8])
        gap = gap_of(xt, xs, known[0], known[8], known[9])
        x = gap * -LN2
        near = abs(x) < NEAR
        loss = pt * (gap * x) * series_of(x, known[18:])
        by_series = gap * series_of(x, known[10:18])
        together = by_series if near else log_m + known[7]
        alone = by_series - known[7] if near else log_m
        return loss if near else apart, ps, ps * together, ps * alone

    return {"forward": forward, "reverse": reverse, "jsd": jsd}[divergence]


# -- what is done to a row's loss and mean (of which jsd has two) before they are used: (loss, mean)
# The loss is less half the square of what rounding added to log2(p / q), which is seen where it is tiny


@device
def forward_settled(total, mean, other, coin):
    return ptx.fmax(ptx.fma(mean * F32(-0.5), mean, total), ZERO) if total < TINY else total, mean


@device
def reverse_settled(total, mean, other, coin):
    off = ptx.fma(mean, LN2, -total)
    return ptx.fmax(ptx.fma(off * F32(-0.5), off, total), ZERO) if total < TINY else total, mean


@device
def jsd_is_small(total, coin):
    return -total * (ONE + coin[0]) < NEAR_JSD * coin[0]


@device
def jsd_settled(total, mean, other, coin):
    """In units of (beta - 1) ln 2, so below zero; the mean is beta times the total but for beta times the error."""
    beta = coin[0] * ptx.reciprocal(ONE + coin[0])
    off = mean * ptx.reciprocal(beta) - total
    corrected = ptx.fmin(ptx.fma(beta * F32(0.5) * LN2 * off, off, total), ZERO) if -total < TINY else total
    return corrected, mean if jsd_is_small(total, coin) else other


# -- log2-probabilities in the place of logits


@device
def kl_of_logs(coin):
    return ONE, ZERO, ZERO, ONE, ONE, ZERO, ZERO


@device
def jsd_of_logs(coin):
    return ONE, ZERO, ZERO, coin[0], -coin[1], coin[1], coin[2], coin[3], ZERO, ZERO, *coin[4:]


KNOWN = {"forward": kl_known, "reverse": kl_known, "jsd": jsd_known}
SETTLED = {"forward": forward_settled, "reverse": reverse_settled, "jsd": jsd_settled}
OF_LOGS = {"forward": kl_of_logs, "reverse": kl_of_logs, "jsd": jsd_of_logs}
