"""The arithmetic of one pair of logits, and sums over a warp and over eight elements.

Everything is in powers of two. With k2 = log2(e) / T, a row keeps C = max(k2 * x) and D = sum 2^(k2 x - C), so that
p = 2^z / D for z = k2 x - C. The product is never rounded on its own (one fused multiply-add), and C is the same
float in every place, so its rounding cancels. log2(p_t / p_s) = z_t - z_s + delta with delta = log2(1/D_t : 1/D_s)
taken from the very floats that scale the exponentials: logarithms and probabilities then agree, and an error in a
normaliser enters the loss squared (see the Bregman form in ``kernels/reference.py``).
"""

from __future__ import annotations

import numpy as np
from numba import cuda

from stillhouse.kernels.cuda import intrinsics as ptx

device = cuda.jit(device=True, forceinline=True)

I32, F32 = np.int32, np.float32
LOWEST = F32(-3.0e38)  # a finite start for running maxima: -inf minus -inf is NaN
LN2 = F32(0.6931471805599453)
TWO_OVER_LN2 = F32(2.8853900817779268)
THIRD, FIFTH, SEVENTH, NINTH = F32(1 / 3), F32(1 / 5), F32(1 / 7), F32(1 / 9)
ZERO, ONE = F32(0.0), F32(1.0)
RATIO_LOW, RATIO_HIGH = F32(0.7), F32(1.4)


@device
def sum8(x):
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))


@device
def max8(x):
    ab = ptx.fmax(ptx.fmax(x[0], x[1]), ptx.fmax(x[2], x[3]))
    return ptx.fmax(ab, ptx.fmax(ptx.fmax(x[4], x[5]), ptx.fmax(x[6], x[7])))


@device
def warp_max(x):
    x = ptx.fmax(x, ptx.shuffle_xor(x, 16))
    x = ptx.fmax(x, ptx.shuffle_xor(x, 8))
    x = ptx.fmax(x, ptx.shuffle_xor(x, 4))
    x = ptx.fmax(x, ptx.shuffle_xor(x, 2))
    return ptx.fmax(x, ptx.shuffle_xor(x, 1))


@device
def warp_sum(x):
    x = x + ptx.shuffle_xor(x, 16)
    x = x + ptx.shuffle_xor(x, 8)
    x = x + ptx.shuffle_xor(x, 4)
    x = x + ptx.shuffle_xor(x, 2)
    return x + ptx.shuffle_xor(x, 1)


@device
def eight_max(x):
    """Over eight lanes, the width of a row's group for V <= 64."""
    x = ptx.fmax(x, ptx.shuffle_xor(x, 4))
    x = ptx.fmax(x, ptx.shuffle_xor(x, 2))
    return ptx.fmax(x, ptx.shuffle_xor(x, 1))


@device
def eight_sum(x):
    x = x + ptx.shuffle_xor(x, 4)
    x = x + ptx.shuffle_xor(x, 2)
    return x + ptx.shuffle_xor(x, 1)


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
    ratio = a * ptx.reciprocal(b)
    u = (a - b) * ptx.reciprocal(a + b)
    v = u * u
    series = ptx.fma(v, ptx.fma(v, ptx.fma(v, ptx.fma(v, NINTH, SEVENTH), FIFTH), THIRD), ONE)
    near = u * series * TWO_OVER_LN2
    return near if ratio > RATIO_LOW and ratio < RATIO_HIGH else ptx.log2_approx(ratio)


@device
def forward_pair(zt, zs, inv_t, inv_s, delta, beta):
    """(loss, p_s - p_t, unused): the gradient needs no sum over the row."""
    pt = ptx.exp2(zt) * inv_t
    change = ptx.exp2(zs) * inv_s - pt
    weighted = pt * ((zt - zs) + delta)
    return ptx.fma(weighted if pt > ZERO else ZERO, LN2, change), change, ZERO


@device
def reverse_pair(zt, zs, inv_t, inv_s, delta, beta):
    """(loss, p_s, p_s log(p_s / p_t)): the gradient is p_s (log(p_s / p_t) - its mean)."""
    ps = ptx.exp2(zs) * inv_s
    weighted = ps * ((zs - zt) - delta) * LN2
    weighted = weighted if ps > ZERO else ZERO
    return weighted + (ptx.exp2(zt) * inv_t - ps), ps, weighted


@device
def jsd_pair(zt, zs, inv_t, inv_s, delta, beta):
    """(loss, p_s, p_s log(p_s / m) (1 - beta)), by the ratio of the smaller probability to the larger.

    With q that ratio and m = w_big + w_small q the mixture over the larger probability:
    loss / p_big = -(m log m + w_small q log(1 / q)). The ratio is at most 1, so nothing overflows.
    """
    gap = (zt - zs) + delta
    teacher_bigger = gap > ZERO
    big = ptx.exp2(zt if teacher_bigger else zs) * (inv_t if teacher_bigger else inv_s)
    w_small = ONE - beta if teacher_bigger else beta
    gap = abs(gap)
    ratio = ptx.exp2(-gap)
    small = big * ratio
    weighted_ratio = w_small * ratio
    mixture = (ONE - w_small) + weighted_ratio
    log_mixture = ptx.log2_approx(mixture)
    rest = weighted_ratio * gap if ratio > ZERO else ZERO
    loss = -big * ptx.fma(mixture, log_mixture, rest) * LN2
    ps = small if teacher_bigger else big
    log_ps = (gap if teacher_bigger else ZERO) + log_mixture
    weighted = ps * log_ps * (beta - ONE) * LN2
    empty = big == ZERO  # neither side has the entry; a NaN is not empty, and goes on
    return ZERO if empty else loss, ZERO if empty else ps, weighted if ps > ZERO else ZERO


PAIRS = {"forward": forward_pair, "reverse": reverse_pair, "jsd": jsd_pair}
