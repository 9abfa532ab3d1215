"""The first pass of the CPU kernels over a row, which is the only one that reads logits, and what writes a gradient."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import math

import numpy as np
from numba import njit

from stillhouse.kernels.cpu_jit import BLOCK
from stillhouse.kernels.cpu_lanes import (
    LANES,
    fill,
    load,
    load_bf16,
    load_f16,
    load_first,
    load_first_bf16,
    load_first_f16,
    store,
    store_bf16,
    store_f16,
    store_first,
    store_first_bf16,
    store_first_f16,
    top,
    total_wide,
    where,
)
from stillhouse.kernels.cpu_loops import no_sums, over_row
from stillhouse.kernels.cpu_math import (
    FLOOR,
    LEAST,
    absolute,
    exp2_of_product,
    f32,
    f32_at,
    gap,
    maximum_of,
    prefetch,
    prefetch_to_second,
    prefetch_to_write,
    u16_at,
)

FIRST = 64  # columns whose maximum is the first reference
ROOM = f32(8.0)  # how far, in powers of two, an exponential may exceed its reference: rounding grows with it
# bytes that are asked for before they are read: the processor's own prefetching ends where a page does, and a page's first
# line and its translation take longer than what it looks ahead. Two fifths of the time at large shapes went there
AHEAD = 4096
LOG2E = 1.4426950408889634


@njit(forceinline=True)
def look_ahead(address, dtype, i, past):
    """Before :func:`take` of these columns, where a row is read for the first time; ``past`` the first-level cache."""
    place = address + (4 if dtype == 0 else 2) * i + AHEAD
    if past:
        prefetch_to_second(place)
    else:
        prefetch(place)


@njit(forceinline=True)
def look_ahead_to_write(address, dtype, i):
    """While a row is read: stores that come later in one go would wait for each line of another array."""
    prefetch_to_write(address + (4 if dtype == 0 else 2) * i)


@njit(forceinline=True)
def take(address, dtype, i, n, full):
    """Columns i .. i + 16 of a row of n, as float32; what is beyond them has probability zero.

    ``full``: all sixteen are there, which is not looked at.
    """
    if full or i + LANES <= n:
        if dtype == 0:
            return load(address + 4 * i)
        return load_bf16(address + 2 * i) if dtype == 1 else load_f16(address + 2 * i)
    if i >= n:
        return fill(FLOOR)
    if dtype == 0:
        return load_first(address + 4 * i, n - i, FLOOR)
    if dtype == 1:
        return load_first_bf16(address + 2 * i, n - i, FLOOR)
    return load_first_f16(address + 2 * i, n - i, FLOOR)


@njit(forceinline=True)
def put(address, dtype, i, n, value, full):
    """Columns i .. i + 16 of a row of n, none beyond them; ``full``: all sixteen are there."""
    if full or i + LANES <= n:
        if dtype == 0:
            store(address + 4 * i, value)
        elif dtype == 1:
            store_bf16(address + 2 * i, value)
        else:
            store_f16(address + 2 * i, value)
    elif i < n:
        if dtype == 0:
            store_first(address + 4 * i, n - i, value)
        elif dtype == 1:
            store_first_bf16(address + 2 * i, n - i, value)
        else:
            store_first_f16(address + 2 * i, n - i, value)


@njit
def zero(out, dtype, first, last):
    """Columns first .. last of the gradient to zero (all bits zero in every dtype)."""
    if dtype == 0:
        plain = f32_at(out)
        for i in range(first, last):
            plain[i] = f32(0.0)
    else:
        half = u16_at(out)
        for i in range(first, last):
            half[i] = np.uint16(0)


@njit
def maximum(x, dtype, first, last):
    """The largest logit of these columns; FLOOR where all are below."""
    highest = fill(FLOOR)
    for i in range(first, last, LANES):
        highest = maximum_of(highest, take(x, dtype, i, last, False))
    return top(highest)


@njit
def reference_of(x, dtype, width):
    """A logit to subtract from the row: the maximum of its first columns, or of all where those are -inf."""
    highest = maximum(x, dtype, 0, min(FIRST, width))
    if highest <= FLOOR:
        highest = maximum(x, dtype, 0, width)
    return highest if highest > FLOOR else f32(0.0)  # nothing but -inf: all is zero against any other number


@njit(error_model="numpy", forceinline=True)
def exponential_columns(i, given, sums, seen, full):
    """Pass A on sixteen columns."""
    s, t, sd, td, vs, vt, es, et, diff, rs, rt, least, k, k_low, out = given
    zs, zt = sums
    top_s, top_t, far = seen
    look_ahead(s, sd, i, False)
    look_ahead(t, td, i, False)
    look_ahead_to_write(out, sd, i)
    a = take(s, sd, i, vs, full)
    b = take(t, td, i, vt, full)
    a = where(a < FLOOR, FLOOR, a)
    b = where(b < FLOOR, FLOOR, b)
    if sd != 0 and td != 0:
        a = a - rs
        b = b - rt
        d = a - b
    else:
        d = gap(a, b, rs - rt)
        a = a - rs
        b = b - rt
    x = exp2_of_product(a, k, k_low, least)
    y = exp2_of_product(b, k, k_low, least)
    store(es + i * 4, x)
    store(et + i * 4, y)
    store(diff + i * 4, d)
    seen = maximum_of(top_s, a), maximum_of(top_t, b), maximum_of(far, absolute(d))
    return (zs + x, zt + y), seen


@njit(error_model="numpy", forceinline=True)
def any_exponentials(s, t, sd, td, vs, vt, first, last, es, et, diff, rs, rt, k, k_low, out):
    """Pass A on one block: sums, maxima, and the largest difference, all of logits less their references.

    Of float32 logits it is rounded once, with what the references' difference rounds to (``gap``). 16-bit ones less
    their reference are exact, unless they are tiny beside it, and are subtracted as they are.
    """
    given = s, t, sd, td, vs, vt, es, et, diff, rs, rt, LEAST / k, k, k_low, out
    seen = fill(FLOOR), fill(FLOOR), fill(f32(0.0))
    sums, seen = over_row(exponential_columns, first, last, min(vs, vt), given, no_sums(2), seen)
    return total_wide(sums[0]), total_wide(sums[1]), top(seen[0]), top(seen[1]), top(seen[2])


@njit(error_model="numpy")
def exponentials(s, t, sd, td, vs, vt, first, last, es, et, diff, rs, rt, k, k_low, out):
    """A loop of its own for each dtype: asking in the loop costs a twentieth."""
    if sd == 0 and td == 0:
        return any_exponentials(s, t, 0, 0, vs, vt, first, last, es, et, diff, rs, rt, k, k_low, out)
    if sd == 1 and td == 1:
        return any_exponentials(s, t, 1, 1, vs, vt, first, last, es, et, diff, rs, rt, k, k_low, out)
    if sd == 2 and td == 2:
        return any_exponentials(s, t, 2, 2, vs, vt, first, last, es, et, diff, rs, rt, k, k_low, out)
    return any_exponentials(s, t, sd, td, vs, vt, first, last, es, et, diff, rs, rt, k, k_low, out)


@njit
def rescale(x, n, up):
    factor = 2.0**-up
    for i in range(n):
        x[i] = x[i] * f32(factor)
    return factor


@njit
def shift(x, n, by):
    for i in range(n):
        x[i] = x[i] + by


@njit(error_model="numpy")
def pass_a(sa, ta, sd, td, vs, vt, v, it, k, k_low, es, et, diff, out):
    """Fill the scratch row: both sums, the logarithm of the normalisers' ratio, the largest difference of logits.

    ``out`` is where the gradient will be written.
    """
    zs = 0.0
    zt = 0.0
    far = f32(0.0)
    rs = reference_of(sa, sd, vs)
    rt = reference_of(ta, td, vt)
    offset = rs - rt  # which the differences are taken less, one for the row
    for j in range(0, v, BLOCK):
        n = min(j + BLOCK, v)
        a, b, top_s, top_t, most = exponentials(
            sa, ta, sd, td, vs, vt, j, n, es, et, diff, rs, rt, k, k_low, out
        )
        if top_s * k > ROOM or top_t * k > ROOM:  # raise the references and do the block again
            new_s = max(maximum(sa, sd, j, min(n, vs)), rs)
            new_t = max(maximum(ta, td, j, min(n, vt)), rt)
            exact_k = np.float64(it) * LOG2E
            zs *= rescale(f32_at(es), j, (np.float64(new_s) - rs) * exact_k)
            zt *= rescale(f32_at(et), j, (np.float64(new_t) - rt) * exact_k)
            rs = new_s
            rt = new_t
            shift(f32_at(diff), j, offset - (rs - rt))
            far += abs(offset - (rs - rt))
            offset = rs - rt
            a, b, top_s, top_t, most = exponentials(
                sa, ta, sd, td, vs, vt, j, n, es, et, diff, rs, rt, k, k_low, out
            )
        zs += a
        zt += b
        far = max(far, most)
    ratio = math.log(zs / zt)
    if sd == 0 or td == 0:
        back = offset - rs  # what rounds off in rs - rt, exactly: float64 has no room for 1 beside 1e20
        ratio += np.float64((rs - (offset - back)) - (rt + back)) * it
    return zs, zt, ratio, far
