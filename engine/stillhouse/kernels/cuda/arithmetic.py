"""Logarithms, sums over a warp and over eight elements, and the running softmax of a row.

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

from stillhouse.kernels import series
from stillhouse.kernels.cuda import intrinsics as ptx

device = ptx.device

I32, U32, F32 = np.int32, np.uint32, np.float32
LOWEST = F32(-3.0e38)  # a finite start for running maxima: -inf minus -inf is NaN
LN2 = F32(0.6931471805599453)
TWO_OVER_LN2 = F32(2.8853900817779268)
THIRD, FIFTH, SEVENTH, NINTH = F32(1 / 3), F32(1 / 5), F32(1 / 7), F32(1 / 9)
ZERO, ONE, LARGE = F32(0.0), F32(1.0), F32(1.0e30)
LOG = tuple(F32(c / math.log(2)) for c in series.LOG1P)
RATIO_HIGH = F32(1.4)


@device
def sum8(x):
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))


@device
def max8(x):
    ab = ptx.fmax(ptx.fmax(x[0], x[1]), ptx.fmax(x[2], x[3]))
    return ptx.fmax(ab, ptx.fmax(ptx.fmax(x[4], x[5]), ptx.fmax(x[6], x[7])))


@device
def floats(a):
    return ptx.word_as_float(a[0]), ptx.word_as_float(a[1]), ptx.word_as_float(a[2]), ptx.word_as_float(a[3])


@device
def scaled(x, f):
    return x[0] * f, x[1] * f, x[2] * f, x[3] * f, x[4] * f, x[5] * f, x[6] * f, x[7] * f


@device
def centred(p, w, mean, f):
    """F (w - p mean), from the second and third results of the pair function."""
    n = -mean
    return scaled(
        (
            ptx.fma(p[0], n, w[0]), ptx.fma(p[1], n, w[1]), ptx.fma(p[2], n, w[2]), ptx.fma(p[3], n, w[3]),
            ptx.fma(p[4], n, w[4]), ptx.fma(p[5], n, w[5]), ptx.fma(p[6], n, w[6]), ptx.fma(p[7], n, w[7]),
        ),
        f,
    )  # fmt: skip


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
def difference(x, y):
    """X - y as a finite number, which a probability of zero makes zero where one side lacks the entry."""
    return ptx.fmin(ptx.fmax(x - y, -LARGE), LARGE)


@device
def absorb_beside(x, y, k2, c, d, cross):
    """As ``absorb``, and the sum of 2^(k2 x - C) (x - y) besides."""
    higher = ptx.fmax(max8(x) * k2, c)
    fade, e = ptx.exp2(c - higher), exponentials(x, k2, higher)
    low = ptx.fma(e[1], difference(x[1], y[1]), e[0] * difference(x[0], y[0]))
    low = ptx.fma(e[3], difference(x[3], y[3]), ptx.fma(e[2], difference(x[2], y[2]), low))
    high = ptx.fma(e[5], difference(x[5], y[5]), e[4] * difference(x[4], y[4]))
    high = ptx.fma(e[7], difference(x[7], y[7]), ptx.fma(e[6], difference(x[6], y[6]), high))
    return higher, ptx.fma(d, fade, sum8(e)), ptx.fma(cross, fade, low + high)


@device
def log2_of(x):
    """``log2_of_normal``, and what is right for zero, infinity and NaN."""
    return log2_of_normal(x) if x > ZERO and x < F32(np.inf) else ptx.log2_approx(x)


@device
def log2_of_normal(x):
    """log2 of a normal float32 to its last bits, for what a whole row shares: exponent, and a series around one.

    Some number for zero, infinity and NaN.
    """
    bits = ptx.float_as_word(x)
    exponent = I32(bits >> U32(23)) - I32(127)
    m = ptx.word_as_float(U32((bits & U32(0x7FFFFF)) | U32(0x3F800000)))
    if m > RATIO_HIGH:
        m = m * F32(0.5)
        exponent = I32(exponent + 1)
    u = (m - ONE) * ptx.reciprocal(m + ONE)
    v = u * u
    odd = ptx.fma(v, ptx.fma(v, ptx.fma(v, ptx.fma(v, NINTH, SEVENTH), FIFTH), THIRD), ONE)
    return ptx.fma(u * odd, TWO_OVER_LN2, F32(exponent))


@device
def quotient(a, b):
    """The quotient a / b, corrected once, so that it is one where a = b: identical rows then lose nothing."""
    inverse = ptx.reciprocal(b)
    first = a * inverse
    return ptx.fma(ptx.fma(-first, b, a), inverse, first)


@device
def log2_one_plus(r):
    """log2(1 + r) for r from 0 to 1, to 2e-7 of itself: the approximate logarithm of 1 + r loses the digits of r."""
    high = ptx.fma(r, ptx.fma(r, ptx.fma(r, ptx.fma(r, LOG[8], LOG[7]), LOG[6]), LOG[5]), LOG[4])
    return r * ptx.fma(r, ptx.fma(r, ptx.fma(r, ptx.fma(r, high, LOG[3]), LOG[2]), LOG[1]), LOG[0])
