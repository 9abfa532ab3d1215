"""The arithmetic of one pair of logits, and sums over a warp and over eight elements.

Everything is in powers of two. With k2 = log2(e) / T, a row keeps C = max(k2 * x) and D = sum 2^(k2 x - C), so that
p = 2^z / D for z = k2 x - C. The product is never rounded on its own (one fused multiply-add), and C is the same
float in every place, so its rounding cancels. log2(p_t / p_s) = z_t - z_s + delta with delta = log2(1/D_t : 1/D_s)
taken from the very floats that scale the exponentials: logarithms and probabilities then agree, and an error in a
normaliser enters the loss squared (see the Bregman form in ``kernels/reference.py``).
"""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

import math

import numpy as np

from stillhouse.kernels.cuda import intrinsics as ptx

device = ptx.device

I32, U32, F32 = np.int32, np.uint32, np.float32
LOWEST = F32(-3.0e38)  # a finite start for running maxima: -inf minus -inf is NaN
LN2 = F32(0.6931471805599453)
TWO_OVER_LN2 = F32(2.8853900817779268)
THIRD, FIFTH, SEVENTH, NINTH = F32(1 / 3), F32(1 / 5), F32(1 / 7), F32(1 / 9)
ZERO, ONE, FAR = F32(0.0), F32(1.0), F32(1.0e4)
ROUNDER = F32(1.5 * 2**23)  # added and taken away, it leaves a float32 rounded to a whole number
PHI = tuple(
    F32(math.log(2) ** n / math.factorial(n)) for n in range(2, 6)
)  # of the series of 2^g - 1 - g ln 2
ONE_PLUS = tuple(F32((-1) ** n / (n + 1) / math.log(2)) for n in range(5))
NEAR, NEAR_MIXTURE = F32(0.0625), F32(0.125)
RATIO_LOW, RATIO_HIGH = F32(0.7), F32(1.4)


@device
def sum8(x):
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))


@device
def max8(x):
    ab = ptx.fmax(ptx.fmax(x[0], x[1]), ptx.fmax(x[2], x[3]))
    return ptx.fmax(ab, ptx.fmax(ptx.fmax(x[4], x[5]), ptx.fmax(x[6], x[7])))


def butterflies(width: int):
    """Device functions (maximum, sum) over groups of ``width`` lanes, a power of two; every lane gets the result."""

    @device
    def top(x):
        if width >= 32:
            x = ptx.fmax(x, ptx.shuffle_xor(x, 16))
        if width >= 16:
            x = ptx.fmax(x, ptx.shuffle_xor(x, 8))
        if width >= 8:
            x = ptx.fmax(x, ptx.shuffle_xor(x, 4))
        if width >= 4:
            x = ptx.fmax(x, ptx.shuffle_xor(x, 2))
        if width >= 2:
            x = ptx.fmax(x, ptx.shuffle_xor(x, 1))
        return x

    @device
    def total(x):
        if width >= 32:
            x = x + ptx.shuffle_xor(x, 16)
        if width >= 16:
            x = x + ptx.shuffle_xor(x, 8)
        if width >= 8:
            x = x + ptx.shuffle_xor(x, 4)
        if width >= 4:
            x = x + ptx.shuffle_xor(x, 2)
        if width >= 2:
            x = x + ptx.shuffle_xor(x, 1)
        return x

    return top, total


@device
def exponentials(x, k2, c):
    n = -c
    return (
        ptx.exp2(ptx.fma(x[0], k2, n)), ptx.exp2(ptx.fma(x[1], k2, n)),
        ptx.exp2(ptx.fma(x[2], k2, n)), ptx.exp2(ptx.fma(x[3], k2, n)),
        ptx.exp2(ptx.fma(x[4], k2, n)), ptx.exp2(ptx.fma(x[5], k2, n)),
        ptx.exp2(ptx.fma(x[6], k2, n)), ptx.exp2(ptx.fma(x[7], k2, n)),
    )  # fmt: skip


@device
def absorb(x, k2, c, d):
    """Eight more logits into the running (C, D): one rescaling for the eight."""
    higher = ptx.fmax(max8(x) * k2, c)
    return higher, ptx.fma(d, ptx.exp2(c - higher), sum8(exponentials(x, k2, higher)))


@device
def log2_of(x):
    """log2 of a normal float32 to its last bits, for what a whole row shares: exponent, and a series around one."""
    bits = ptx.float_as_word(x)
    exponent = I32(bits >> U32(23)) - I32(127)
    m = ptx.word_as_float(U32((bits & U32(0x7FFFFF)) | U32(0x3F800000)))
    if m > RATIO_HIGH:
        m = m * F32(0.5)
        exponent = I32(exponent + 1)
    u = (m - ONE) * ptx.reciprocal(m + ONE)
    v = u * u
    series = ptx.fma(v, ptx.fma(v, ptx.fma(v, ptx.fma(v, NINTH, SEVENTH), FIFTH), THIRD), ONE)
    result = F32(exponent) + u * series * TWO_OVER_LN2
    return result if x > ZERO and x < F32(np.inf) else ptx.log2_approx(x)


@device
def quotient(a, b):
    """The quotient a / b, corrected once, so that it is one where a = b: identical rows then lose nothing."""
    inverse = ptx.reciprocal(b)
    first = a * inverse
    return ptx.fma(ptx.fma(-first, b, a), inverse, first)


@device
def kl_known(k2, cp, dp, cq, dq):
    """What ``kl_pair`` takes besides the logits: 1 / D_p, which its results lack, and D_p / D_q.

    The logarithm is that of the very float that scales q, so that the two agree.
    """
    ratio = quotient(dp, dq)
    return k2, -cp, -cq, ptx.reciprocal(dp), ratio, log2_of(ratio)


@device
def forward_known(k2, ct, dt, cs, ds, coin):
    return kl_known(k2, ct, dt, cs, ds)


@device
def reverse_known(k2, ct, dt, cs, ds, coin):
    return kl_known(k2, cs, ds, ct, dt)


@device
def jsd_known(k2, ct, dt, cs, ds, coin):
    """What ``jsd_pair`` takes: (1 - beta) p_s over beta p_t / D_t, as a whole power of two and a rest near one.

    The first goes to the student's maximum, where it is exact, so that the logarithm added to each has few digits.
    """
    log_ratio = log2_of(quotient(dt, ds))
    shift = log_ratio - coin[1]
    whole = (shift + ROUNDER) - ROUNDER
    it = ptx.reciprocal(dt) + ZERO * ptx.reciprocal(ds)  # NaN where the student has no logit above -inf
    return k2, -ct, whole - cs, coin[0] * it, shift - whole, (cs - ct) - log_ratio, *coin[1:]


@device
def kl_of_logs(coin):
    return ONE, ZERO, ZERO, ONE, ONE, ZERO


@device
def jsd_of_logs(coin):
    return ONE, ZERO, ZERO, coin[0], -coin[1], ZERO, *coin[1:]


@device
def log2_one_plus(y):
    """log2(1 + y) for y >= 0, with a relative error also where 1 + y loses the digits of y."""
    series = ptx.fma(
        y, ptx.fma(y, ptx.fma(y, ptx.fma(y, ONE_PLUS[4], ONE_PLUS[3]), ONE_PLUS[2]), ONE_PLUS[1]), ONE_PLUS[0]
    )
    return y * series if y < NEAR else ptx.log2_approx(ONE + y)


@device
def bregman(weighted, gap, change):
    """One term p phi(log q/p) with phi(x) = exp(x) - 1 - x, from gap = log2(p / q), weighted = p gap and change = q - p.

    Where p and q nearly agree the three terms cancel, and phi's series takes over.
    """
    series = ptx.fma(gap, ptx.fma(gap, ptx.fma(gap, -PHI[3], PHI[2]), -PHI[1]), PHI[0])
    direct = ptx.fma(weighted, LN2, change)
    return weighted * (gap * series) if abs(gap) < NEAR else direct


@device
def kl_pair(xp, xq, known):
    """(p phi(log q/p), p, q - p, p log2(p / q)), all short of the factor 1 / D_p."""
    k2, n_p, n_q, base, ratio, log_ratio = known
    zp, zq = ptx.fma(xp, k2, n_p), ptx.fma(xq, k2, n_q)
    p = ptx.exp2(zp)
    change = ptx.fma(ptx.exp2(zq), ratio, -p)
    gap = (zp - zq) - log_ratio
    weighted = p * gap if p > ZERO else ZERO
    return bregman(weighted, gap, change), p, change, weighted


@device
def forward_pair(xt, xs, known):
    """(loss, p_s - p_t, unused), short of the factor: the gradient needs no sum over the row."""
    loss, p, change, weighted = kl_pair(xt, xs, known)
    return loss, change, ZERO


@device
def reverse_pair(xt, xs, known):
    """(loss, p_s, p_s log2(p_s / p_t)), short of the factor: the gradient is p_s (log(p_s / p_t) - its mean)."""
    loss, p, change, weighted = kl_pair(xs, xt, known)
    return loss, p, weighted


@device
def jsd_pair(xt, xs, known):
    """(loss, p_s, p_s (log2(m / p_s) + log2(1 - beta))), short of some factors.

    The gradient takes the last relative to its mean, so the constant is free, and it keeps the digits of what is
    left where the student has nearly all of the mass.

    With P = beta p_t and Q = (1 - beta) p_s, both in units of beta / D_t, from the larger and the ratio r <= 1 of the
    smaller to it, so that nothing overflows and log2(1 + r) is the only logarithm. In units of the larger the loss is
    -(1 + r) (log2(1 + r) + log2 w) - r gap, with w the weight of the larger side and gap = log2(p_t / p_s), or its
    negative where Q is larger. Where p_t and p_s nearly agree that cancels. There loss / m = L' x - L with
    x = log(p_t / p_s) and L = log(1 + beta (exp(x) - 1)), which generates the cumulants of a coin: its series has no
    terms that cancel. Logarithms are clamped to finite ones; their probabilities are zero.
    """
    k2, nt, ns, base, shift, between, log_odds, log_t, log_s, c2, c3, c4, c5 = known
    zt = ptx.fmax(ptx.fma(xt, k2, nt), -FAR)
    zs = ptx.fmax(ptx.fma(xs, k2, ns) + shift, -FAR)
    weighted = zt - zs
    gap = weighted - log_odds
    teacher_larger = weighted > ZERO
    larger, ratio = ptx.exp2(ptx.fmax(zt, zs)), ptx.exp2(-abs(weighted))
    mixture = ONE + ratio
    log_mixture = log2_one_plus(ratio)
    if abs(gap) < NEAR_MIXTURE:
        # its own digits count here, and zt - zs has lost them; the maximum stands in for -inf minus -inf
        gap = ptx.fmax(ptx.fma(xt - xs, k2, between), -ONE)
        loss = ptx.fma(gap, ptx.fma(gap, ptx.fma(gap, c5, c4), c3), c2) * (gap * gap) * mixture
    else:
        known_log = log_t if teacher_larger else log_s
        loss = ptx.fma(mixture, log_mixture + known_log, ratio * (gap if teacher_larger else -gap))
    ps = larger * (ratio if teacher_larger else ONE)
    return larger * loss, ps, ps * (ptx.fmax(weighted, ZERO) + log_mixture)


# What a pair function returns lacks the factor known[3], and what arguments.factors has.
PAIRS = {"forward": forward_pair, "reverse": reverse_pair, "jsd": jsd_pair}
KNOWN = {"forward": forward_known, "reverse": reverse_known, "jsd": jsd_known}
OF_LOGS = {"forward": kl_of_logs, "reverse": kl_of_logs, "jsd": jsd_of_logs}  # for log2-probabilities
