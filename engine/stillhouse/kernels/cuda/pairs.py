"""The arithmetic of one pair of logits, for rows whose two sides differ and for those that nearly agree.

Where a row's loss is not small its terms are summed as they are: what rounds off in one is small beside their sum. Where
it is small, terms and gradients are differences of nearly equal numbers. There log2(p / q) is had from the
difference of the logits, exactly (the rounding of either, scaled, would be as large as what is left), and the rest by
series; the gradient is taken less its sum over the row, which is the error of a normaliser.

p is the teacher's side, of reverse the student's. ``sides`` is what a row's first pass makes of both (``compare``), and
``known`` what is made of that for a pair function, whose results lack the factor known[3], and what
``arguments.factors`` has.
"""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

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
    quotient,
)

F32 = np.float32
FAR = F32(1.0e4)
ROUNDER = F32(1.5 * 2**23)  # added and taken away, it leaves a float32 rounded to a whole number
NEAR_ROW = {"forward": F32(0.125), "reverse": F32(0.125), "jsd": F32(0.25)}  # bits of KL(p || q)
NEAR_JSD = F32(
    0.125
)  # bits of a JSD over beta (1 - beta): about a KL where that is small, and less elsewhere
TINY = F32(1.0e-6)  # a loss below which a normaliser's error may show, up to 1e-13
MANY = F32(4.0)  # bits that an entry which the student lacks counts for
PHI = tuple(F32(c) for c in series.PHI)
NEAR = F32(series.RADIUS)


@device
def compare(k2, cp, dp, cq, dq):
    """(k2, C_p, C_q, 1 / D_p, D_p / D_q, log2 of that): the logarithm is that of the very float, so that the two agree."""
    ratio = quotient(dp, dq)
    return k2, cp, cq, ptx.reciprocal(dp), ratio, log2_of_normal(ratio)


def agreement(divergence: str):
    """Device function: is KL(p || q), to some digits, small? ``cross`` is the sum of 2^(k2 x - C) (x - y).

    Not where q lacks an entry that p has, or has next to nothing of. The JSD may be small there all the same, which
    ``near_after_all`` sees.
    """
    limit = NEAR_ROW[divergence]

    @device
    def nearly_agree(sides, cross):
        k2, cp, cq, inverse, ratio, log_ratio = sides
        return ptx.fma(k2, cross * inverse, cq - cp) - log_ratio < limit

    return nearly_agree


# -- KL, rows that differ


@device
def kl_known(sides, coin):
    k2, cp, cq, inverse, ratio, log_ratio = sides
    return k2, -cp, -cq, inverse, ratio, log_ratio


@device
def kl_pair(xp, xq, known):
    """(p phi(log q/p), p, q - p, p log2(p / q)) with phi(x) = exp(x) - 1 - x."""
    k2, n_p, n_q, base, ratio, log_ratio = known
    zp, zq = ptx.fma(xp, k2, n_p), ptx.fma(xq, k2, n_q)
    p = ptx.exp2(zp)
    change = ptx.fma(ptx.exp2(zq), ratio, -p)
    weighted = p * ((zp - zq) - log_ratio) if p > ZERO else ZERO
    return ptx.fma(weighted, LN2, change), p, change, weighted


@device
def forward_pair(xt, xs, known):
    """(loss, p_s - p_t, unused): the gradient needs no sum over the row."""
    loss, p, change, weighted = kl_pair(xt, xs, known)
    return loss, change, ZERO


@device
def reverse_pair(xt, xs, known):
    """(loss, p_s, p_s log2(p_s / p_t)): the gradient is p_s (log(p_s / p_t) - its mean)."""
    loss, p, change, weighted = kl_pair(xs, xt, known)
    return loss, p, weighted


# -- KL, rows that nearly agree


@device
def level(k2, cp, cq):
    """(offset, rest): the logits' difference at which 2^(k2 x - C) of both are equal, and k2 times what it is off by."""
    apart = cp - cq
    back = apart - cp
    rounded = (cp - (apart - back)) - (cq + back)
    offset = apart * ptx.reciprocal(k2)
    return offset, ptx.fma(k2, offset, -apart) - rounded


@device
def rounded_gap(x, y, k2, offset, rest):
    """K2 (x - y - offset) + rest, for 16-bit logits, which were rounded more than their difference is."""
    return ptx.fma((x - y) - offset, k2, rest)


@device
def exact_gap(x, y, k2, offset, rest):
    """The same for float32: what rounds off in x - y is found and added back.

    Infinite where q lacks an entry that p has, and no number where p lacks it.
    """
    apart = ptx.fmin(x - y, LARGE)
    back = apart - x
    rounded = (x - (apart - back)) - (y + back)
    return ptx.fma((apart - offset) + rounded, k2, rest)


@device
def kl_near_known(sides, coin):
    k2, cp, cq, inverse, ratio, log_ratio = sides
    offset, rest = level(k2, cp, cq)
    return k2, -cp, -cq, inverse, ratio, offset, rest - log_ratio


# -- the Jensen-Shannon divergence


@device
def jsd_known(sides, coin):
    """What ``jsd_apart`` takes: (1 - beta) p_s over beta p_t / D_t, as a whole power of two and a rest near one, and logs.

    The first goes to the student's maximum, where it is exact, so that the logarithm added to each has few digits; what
    a maximum of 1e7 or more leaves of it goes to the rest.
    """
    k2, ct, cs, inverse, ratio, log_ratio = sides
    shift = log_ratio - coin[1]
    whole = (shift + ROUNDER) - ROUNDER
    unit = coin[0] * (inverse + ZERO * ratio)  # NaN where the student has no logit above -inf
    moved = whole - cs
    back = moved - whole
    lost = (whole - (moved - back)) - (cs + back)
    return k2, -ct, moved, unit, (shift - whole) + lost, coin[1], coin[2], coin[3]


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


@device
def jsd_pair(xt, xs, known):
    """(loss, p_s, p_s (log2(m / p_s) - log2(1 - beta))).

    The gradient takes the last relative to its mean, so the constant is free, and it keeps the digits of what is
    left where the student has nearly all of the mass.
    """
    loss, ps, log_m, pt = jsd_apart(xt, xs, known)
    return loss, ps, ps * log_m


@device
def jsd_near_known(sides, coin):
    """Besides: the level of the logits' difference, and what is added to log2(m / p_s) for entries apart and near."""
    offset, rest = level(sides[0], sides[1], sides[2])
    return *jsd_known(sides, coin), offset, rest - sides[5], coin[3], ZERO, *coin[4:]


@device
def relative_to_constant(known):
    """The same for rows that differ, whose log2(m / p_s) is had less log2(1 - beta), as in ``jsd_pair``."""
    return *known[:10], ZERO, -known[10], *known[12:]


@device
def polynomial(x, c):
    high = ptx.fma(x, ptx.fma(x, ptx.fma(x, c[7], c[6]), c[5]), c[4])
    return ptx.fma(x, ptx.fma(x, ptx.fma(x, ptx.fma(x, high, c[3]), c[2]), c[1]), c[0])


# -- pair functions of rows that nearly agree, by how the gap is had


def near_pair(divergence: str, gap_of, centred: bool = True):
    """The pair function: (loss, p_s, what the gradient is made of), which is less p_s times its sum over the row.

    That is p_s - p_t for forward, p_s log2(p_s / p_t) for reverse and p_s log2(m / p_s) for jsd. Without ``centred`` the
    second result of forward is p_s - p_t.
    """

    @device
    def kl(xp, xq, known):
        """(p phi(log q/p), p, q, q - p, p log2(p / q)), by series where p and q nearly agree."""
        k2, n_p, n_q, base, ratio, offset, rest = known
        p, q = ptx.exp2(ptx.fma(xp, k2, n_p)), ptx.exp2(ptx.fma(xq, k2, n_q)) * ratio
        gap = gap_of(xp, xq, k2, offset, rest)
        weighted = p * gap if p > ZERO else ZERO
        x, first = gap * -LN2, weighted * -LN2
        phi = ptx.fma(x, ptx.fma(x, ptx.fma(x, ptx.fma(x, PHI[6], PHI[5]), PHI[4]), PHI[3]), PHI[2])
        second = first * (x * ptx.fma(x, ptx.fma(x, phi, PHI[1]), PHI[0]))
        near = abs(x) < NEAR
        change = first + second if near else q - p
        return second if near else change - first, p, q, change, weighted

    @device
    def forward(xt, xs, known):
        loss, p, q, change, weighted = kl(xt, xs, known)
        return loss, q if centred else change, change

    @device
    def reverse(xt, xs, known):
        loss, p, q, change, weighted = kl(xs, xt, known)
        return loss, p, weighted

    @device
    def jsd(xt, xs, known):
        """By the polynomials of ``series.jsd_series`` where p_t and p_s nearly agree."""
        apart, ps, log_m, pt = jsd_apart(xt, xs, known[:8])
        offset, rest, add_apart, add_near = known[8:12]
        gap = gap_of(xt, xs, known[0], offset, rest)
        x = gap * -LN2
        near = abs(x) < NEAR
        loss = pt * (gap * x) * polynomial(x, known[20:])
        log_m = ptx.fma(gap, polynomial(x, known[12:20]), add_near) if near else log_m + add_apart
        return loss if near else apart, ps, ps * log_m

    return {"forward": forward, "reverse": reverse, "jsd": jsd}[divergence]


@device
def near_after_all(total, coin):
    """Is the JSD of a row that was taken for one that differs small? Then it is to be done again."""
    return -total * (ONE + coin[0]) < NEAR_JSD * coin[0]


@device
def any_agreement(sides, xt, xs):
    """An entry's part of KL(p_t || p_s) in bits, but no more than some for one that the student lacks."""
    k2, ct, cs, inverse, ratio, log_ratio = sides
    gap = ptx.fmin(ptx.fma(xt, k2, -ct) - ptx.fma(xs, k2, -cs) - log_ratio, MANY)
    p = ptx.exp2(ptx.fma(xt, k2, -ct)) * inverse
    return p * gap if p > ZERO else ZERO


# -- the loss less half the square of what rounding added to log2(p / q), which is seen where a loss is tiny


@device
def forward_corrected(total, mean, coin):
    return ptx.fmax(ptx.fma(mean * F32(-0.5), mean, total), ZERO) if total < TINY else total


@device
def reverse_corrected(total, mean, coin):
    off = ptx.fma(mean, LN2, -total)
    return ptx.fmax(ptx.fma(off * F32(-0.5), off, total), ZERO) if total < TINY else total


@device
def jsd_corrected(total, mean, coin):
    """In units of (beta - 1) ln 2, so below zero; the mean is beta times the total but for beta times the error."""
    beta = coin[0] * ptx.reciprocal(ONE + coin[0])
    off = mean * ptx.reciprocal(beta) - total
    return ptx.fmin(ptx.fma(beta * F32(0.5) * LN2 * off, off, total), ZERO) if -total < TINY else total


# -- log2-probabilities in the place of logits, near or not, with the constant of rows that differ


@device
def kl_of_logs(coin):
    return ONE, ZERO, ZERO, ONE, ONE, ZERO, ZERO


@device
def jsd_of_logs(coin):
    apart = (ONE, ZERO, ZERO, coin[0], -coin[1], coin[1], coin[2], coin[3])
    return *apart, ZERO, ZERO, ZERO, -coin[3], *coin[4:]


PAIRS = {"forward": forward_pair, "reverse": reverse_pair, "jsd": jsd_pair}
KNOWN = {"forward": kl_known, "reverse": kl_known, "jsd": jsd_known}
NEAR_KNOWN = {"forward": kl_near_known, "reverse": kl_near_known, "jsd": jsd_near_known}
CORRECTED = {"forward": forward_corrected, "reverse": reverse_corrected, "jsd": jsd_corrected}
OF_LOGS = {"forward": kl_of_logs, "reverse": kl_of_logs, "jsd": jsd_of_logs}
