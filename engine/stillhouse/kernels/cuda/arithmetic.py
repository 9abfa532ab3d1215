"""Logarithms, tuples of a vector's elements, and the running softmax of a row.

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
from collections.abc import Callable

import numpy as np

from stillhouse.kernels import series
from stillhouse.kernels.cuda import intrinsics as ptx

device = ptx.device

I32, U32, F32 = np.int32, np.uint32, np.float32
LOWEST = F32(-3.0e38)  # a finite start for running maxima: -inf minus -inf is NaN
LN2, LOG2E = F32(0.6931471805599453), F32(math.log2(math.e))
TWO_OVER_LN2 = F32(2.8853900817779268)
ODD = tuple(F32(1 / n) for n in (1, 3, 5, 7, 9))
ZERO, ONE, LARGE = F32(0.0), F32(1.0), F32(1.0e30)
LOG = tuple(F32(c / math.log(2)) for c in series.LOG1P)
RATIO_HIGH = F32(1.4)


def unrolled(count: int, arguments: str, result: str, body: str = "", **names: object) -> Callable:
    """A device function written out for ``count`` elements, over which Numba has no loop that stays in registers.

    ``body``: a line for each element, whose number is ``#`` there. In ``result`` ``*(x)`` is the tuple of the elements' x, and
    ``+(x)`` and ``^(x)`` are their sum and their maximum, by halves.
    """

    def each(text: str) -> list[str]:
        return [text.replace("#", str(i)) for i in range(count)]

    def halves(parts: list[str], joined: str) -> str:
        while len(parts) > 1:
            parts = [joined.format(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    for mark, form in (("*", None), ("+", "({} + {})"), ("^", "fmax({}, {})")):
        while f"{mark}(" in result:
            before, _, rest = result.partition(f"{mark}(")
            end = next(i for i in range(len(rest)) if rest[: i + 1].count(")") > rest[: i + 1].count("("))
            parts = each(rest[:end])
            made = halves(parts, form) if form else f"({', '.join(parts)},)"
            result = before + made + rest[end + 1 :]
    lines = [*(each(body) if body else []), f"return {result}"]
    scope = {
        "fma": ptx.fma,
        "exp2": ptx.exp2,
        "fmax": ptx.fmax,
        "fmin": ptx.fmin,
        "I32": I32,
        "ZERO": ZERO,
        **names,
    }
    exec(f"def made({arguments}):\n    " + "\n    ".join(lines), scope)  # noqa: S102 of literals in these modules
    return device(scope["made"])


def polynomial(count: int) -> Callable:
    """Device function of x and a tuple of so many coefficients, lowest power first."""
    made = f"c[{count - 1}]"
    for i in reversed(range(count - 1)):
        made = f"fma(x, {made}, c[{i}])"
    return unrolled(1, "x, c", made)


odd_of, one_plus_of = polynomial(len(ODD)), polynomial(len(LOG))


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
    return ptx.fma(u * odd_of(u * u, ODD), TWO_OVER_LN2, F32(exponent))


@device
def quotient(a, b):
    """The quotient a / b, corrected once, so that it is one where a = b: identical rows then lose nothing."""
    inverse = ptx.reciprocal(b)
    first = a * inverse
    return ptx.fma(ptx.fma(-first, b, a), inverse, first)


@device
def log2_one_plus(r):
    """log2(1 + r) for r from 0 to 1, to 2e-7 of itself: the approximate logarithm of 1 + r loses the digits of r."""
    return r * one_plus_of(r, LOG)


def running(count: int) -> Callable:
    """Device function ``absorb(x, k2, c, d)``: so many more logits into the running (C, D)."""
    whole = unrolled(count, "x, k2, n", "+(exp2(fma(x[#], k2, n)))")
    top_of = unrolled(count, "x", "^(x[#])")

    @device
    def absorb(x, k2, c, d):
        higher = ptx.fmax(top_of(x) * k2, c)
        return higher, ptx.fma(d, ptx.exp2(c - higher), whole(x, k2, -higher))

    return absorb


def butterflies(width: int) -> tuple[Callable, Callable]:
    """Device functions (maximum, sum) over groups of ``width`` lanes, a power of two; every lane gets the result."""
    steps = [2**i for i in reversed(range(width.bit_length() - 1))]
    scope = {"fmax": ptx.fmax, "other": ptx.shuffle_xor}
    for name, form in (("top", "fmax(x, other(x, {}))"), ("total", "x + other(x, {})")):
        lines = "".join(f"    x = {form.format(step)}\n" for step in steps)
        exec(f"def {name}(x):\n{lines}    return x", scope)  # noqa: S102 as above
    return device(scope["top"]), device(scope["total"])
