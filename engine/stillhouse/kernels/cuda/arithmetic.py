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
PHI = tuple(
    F32(math.log(2) ** n / math.factorial(n)) for n in range(2, 6)
)  # of the series of 2^g - 1 - g ln 2
CUMULANT = tuple(F32(-(math.log(2) ** (n - 1)) * (n - 1) / math.factorial(n)) for n in range(2, 6))
ONE_PLUS = tuple(F32((-1) ** n / (n + 1) / math.log(2)) for n in range(5))
SIX, TWELVE = F32(6.0), F32(12.0)
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
def log2_ratio(a, b):
    """log2(a / b); near a = b with a relative error of 1e-7, where a rounded quotient would leave nothing."""
    if a > RATIO_LOW * b and a < RATIO_HIGH * b:
        u = (a - b) * ptx.reciprocal(a + b)
        v = u * u
        series = ptx.fma(v, ptx.fma(v, ptx.fma(v, ptx.fma(v, NINTH, SEVENTH), FIFTH), THIRD), ONE)
        result = u * series * TWO_OVER_LN2
    else:
        result = ptx.log2_approx(a) - ptx.log2_approx(b)
    return result


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
    """What ``kl_pair`` takes besides the logits: 1 / D_p, which it leaves out, and D_p / D_q.

    The logarithm is that of the very float that scales q, so that the two agree.
    """
    ratio = quotient(dp, dq)
    return k2, -cp, -cq, ptx.reciprocal(dp), ratio, log2_of(ratio)


@device
def forward_known(k2, ct, dt, cs, ds, beta):
    return kl_known(k2, ct, dt, cs, ds)


@device
def reverse_known(k2, ct, dt, cs, ds, beta):
    return kl_known(k2, cs, ds, ct, dt)


@device
def jsd_known(k2, ct, dt, cs, ds, beta):
    it, is_ = ptx.reciprocal(dt), ptx.reciprocal(ds)
    return k2, -ct, -cs, ONE, it, is_, (cs - ct) + log2_ratio(it, is_), beta, *mixture_known(beta)


@device
def kl_of_logs(beta):
    return ONE, ZERO, ZERO, ONE, ONE, ZERO


@device
def jsd_of_logs(beta):
    return ONE, ZERO, ZERO, ONE, ONE, ONE, ZERO, beta, *mixture_known(beta)


@device
def mixture_known(beta):
    """What ``jsd_pair`` takes of beta: its logarithm, that of 1 - beta, their odds, and the series' coefficients.

    The coefficients are cumulants of a coin of that bias, in log2 units, divided by ln 2.
    """
    other = ONE - beta
    b, skew = beta * other, other - beta
    fourth, fifth = b * (ONE - SIX * b), b * skew * (ONE - TWELVE * b)
    odds = beta * ptx.reciprocal(other)
    logs = (ptx.log2_approx(beta), ptx.log2_approx(other))
    return *logs, odds, b * CUMULANT[0], b * skew * CUMULANT[1], fourth * CUMULANT[2], fifth * CUMULANT[3]


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
    """(p phi(log q/p), p, q - p, p log2(p / q)), all short of the factor 1 / D_p, which is known[3] for any divergence."""
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
    """(loss, p_s, p_s (log2(m / p_s) - log2(1 - beta))), the loss short of a factor of -ln 2, the last of ln 2.

    The gradient takes the last relative to its mean, so the constant is free, and it keeps the digits of what is
    left where the student has nearly all of the mass.

    By the ratio q <= 1 of the smaller probability to the larger, so that nothing overflows. With the mixture
    m = w_big + w_small q over the larger probability, loss / p_big = -(m log m + w_small q log(1 / q)).
    Near q = 1 that cancels. There loss / m = L' x - L with x = log(p_t / p_s) and L = log(1 + beta (exp(x) - 1)),
    which generates the cumulants of a coin: its series has no terms that cancel.
    The gap is clamped to finite numbers, also where it is -inf minus -inf; its probabilities are then zero.
    """
    k2, nt, ns, base, it, is_, shift, beta, log_t, log_s, odds, c2, c3, c4, c5 = known
    signed = ptx.fmin(ptx.fmax(ptx.fma(xt - xs, k2, shift), -FAR), FAR)
    teacher_bigger = signed > ZERO
    z_big = ptx.fma(xt if teacher_bigger else xs, k2, nt if teacher_bigger else ns)
    big = ptx.exp2(z_big) * (it if teacher_bigger else is_)
    w_big = beta if teacher_bigger else ONE - beta
    gap = abs(signed)
    ratio = ptx.exp2(-gap)
    rest = ratio * ((ONE - beta) if teacher_bigger else beta)
    mixture = w_big + rest
    one_plus = log2_one_plus(ratio * (ptx.reciprocal(odds) if teacher_bigger else odds))
    log_mixture = (log_t if teacher_bigger else log_s) + one_plus
    series = ptx.fma(signed, ptx.fma(signed, ptx.fma(signed, c5, c4), c3), c2) * signed * signed * mixture
    loss = big * (series if gap < NEAR_MIXTURE else ptx.fma(mixture, log_mixture, rest * gap))
    ps = big * (ratio if teacher_bigger else ONE)
    return loss, ps, ps * ((gap + (log_t - log_s) if teacher_bigger else ZERO) + one_plus)


PAIRS = {"forward": forward_pair, "reverse": reverse_pair, "jsd": jsd_pair}
KNOWN = {"forward": forward_known, "reverse": reverse_known, "jsd": jsd_known}
OF_LOGS = {"forward": kl_of_logs, "reverse": kl_of_logs, "jsd": jsd_of_logs}  # for log2-probabilities


@device
def forward_factors(loss_factor, grad_factor, beta):
    return loss_factor, grad_factor


@device
def reverse_factors(loss_factor, grad_factor, beta):
    return loss_factor, grad_factor * LN2


@device
def jsd_factors(loss_factor, grad_factor, beta):
    return -loss_factor * LN2, grad_factor * (beta - ONE) * LN2


FACTORS = {
    "forward": forward_factors,
    "reverse": reverse_factors,
    "jsd": jsd_factors,
}  # what the pairs leave out
