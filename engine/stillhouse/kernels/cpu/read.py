"""The first pass of the CPU kernels over a row, which is the only one that reads logits, and what writes a gradient."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import math

import numpy as np
from numba import njit

from stillhouse.kernels.cpu.arithmetic import (
    FLOOR,
    LEAST,
    absolute,
    byte_at,
    exp2_of_product,
    f32,
    f32_at,
    fma,
    gap,
    maximum_of,
    prefetch,
    prefetch_to_write,
)
from stillhouse.kernels.cpu.build import BLOCK
from stillhouse.kernels.cpu.lanes import (
    LANES,
    fill,
    load,
    load_bf16,
    load_f16,
    load_f32,
    store,
    store_bf16,
    store_f16,
    store_f32,
    top,
    total_wide,
    where,
)
from stillhouse.kernels.cpu.loops import no_sums, over_row

FIRST = 64  # columns whose maximum is the first reference
ROOM = f32(8.0)  # how far, in powers of two, an exponential may exceed its reference: rounding grows with it
# bytes that are asked for before they are read: the processor's own prefetching ends where a page does, and a page's first
# line and its translation take longer than what it looks ahead. Two fifths of the time at large shapes went there
AHEAD = 4096
LOG2E = 1.4426950408889634
E_HIGH = f32(LOG2E)
E_LOW = f32(LOG2E - float(E_HIGH))


@njit(forceinline=True)
def bytes_of(dtype):
    return 4 if dtype == 0 else 2


@njit(forceinline=True)
def look_ahead(address, dtype, i):
    """Before :func:`take` of these columns, where a row is read for the first time."""
    prefetch(address + bytes_of(dtype) * i + AHEAD)


@njit(forceinline=True)
def look_ahead_to_write(address, dtype, i):
    """While a row is read: stores that come later in one go would wait for each line of another array."""
    prefetch_to_write(address + bytes_of(dtype) * i)


@njit(forceinline=True)
def take(address, dtype, i, n, full):
    """Columns i .. i + 16 of a row of n, as float32; what is beyond them has probability zero.

    ``full``: all sixteen are there, which is not looked at.
    """
    count = LANES if full else n - i
    if dtype == 0:
        return load_f32(address + 4 * i, count, FLOOR)
    return load_bf16(address + 2 * i, count, FLOOR) if dtype == 1 else load_f16(address + 2 * i, count, FLOOR)


@njit(forceinline=True)
def put(address, dtype, i, n, value, full):
    """Columns i .. i + 16 of a row of n, none beyond them; ``full``: all sixteen are there."""
    count = LANES if full else n - i
    if dtype == 0:
        store_f32(address + 4 * i, count, value)
    elif dtype == 1:
        store_bf16(address + 2 * i, count, value)
    else:
        store_f16(address + 2 * i, count, value)


@njit(forceinline=True)
def by_dtype(loop, dtype, given):
    """``loop(dtype, given)``, compiled for each dtype: asking in the loop costs a twentieth."""
    if dtype == 0:
        return loop(0, given)
    return loop(1, given) if dtype == 1 else loop(2, given)


@njit
def zero(out, dtype, first, last):
    """Columns first .. last of the gradient to zero (all bits zero in every dtype)."""
    size = bytes_of(dtype)
    for i in range(first * size, last * size):
        byte_at(out)[i] = np.uint8(0)


@njit(error_model="numpy", forceinline=True)
def largest_columns(i, given, sums, seen, full):
    x, dtype, last = given
    return sums, maximum_of(seen, take(x, dtype, i, last, full))


@njit
def maximum(x, dtype, first, last):
    """The largest logit of these columns; FLOOR where all are below."""
    _, highest = over_row(largest_columns, first, last, last, (x, dtype, last), no_sums(1), fill(FLOOR))
    return top(highest)


@njit
def reference_of(x, dtype, width):
    """A logit to subtract from the row: the maximum of its first columns, or of all where those are -inf."""
    highest = maximum(x, dtype, 0, min(FIRST, width))
    if highest <= FLOOR:
        highest = maximum(x, dtype, 0, width)
    return highest if highest > FLOOR else f32(0.0)  # nothing but -inf: all is zero against any other number


# -- the label term's exponentials, exp(student), whatever the temperature is; ``e1`` is None in a kernel without that term,
# for which Numba compiles none of this


@njit(forceinline=True)
def label_exponentials(a, i, e1, z1):
    """Those of sixteen logits less their reference go to the scratch row ``e1``, and are added to ``z1``."""
    if e1 is None:
        return z1
    x = exp2_of_product(a, E_HIGH, E_LOW, LEAST / E_HIGH)
    store(e1 + i * 4, x)
    return z1 + x


@njit(forceinline=True)
def steepest(k, e1):
    """The larger of the factors that logits are multiplied by before a power of two is taken."""
    if e1 is None:
        return k
    return max(k, E_HIGH)


@njit(error_model="numpy")
def rescale(at, n, up):
    """Exponentials that are to be relative to a reference 2^up as high; the factor that they took."""
    if at is None:
        return 1.0
    x, factor = f32_at(at), 2.0**-up
    for i in range(n):
        x[i] = x[i] * f32(factor)
    return factor


@njit(forceinline=True)
def with_label(value, i, label):
    """The gradient of sixteen columns and that of the label term: ``label`` is (scratch row, factor), or None."""
    if label is None:
        return value
    e1, factor = label
    return fma(load(e1 + i * 4), factor, value)


@njit(forceinline=True)
def label_from(label, j):
    """The same from column j on."""
    if label is None:
        return None
    e1, factor = label
    return e1 + j * 4, factor


# -- a dense row


@njit(error_model="numpy", forceinline=True)
def exponential_columns(i, given, sums, seen, full):
    """Pass A on sixteen columns."""
    row, scratch, references, power, e1 = given
    s, t, sd, td, vs, vt, out = row
    es, et, diff = scratch
    rs, rt = references
    k, k_low = power
    zs, zt, z1 = sums
    top_s, top_t, far = seen
    look_ahead(s, sd, i)
    look_ahead(t, td, i)
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
    x = exp2_of_product(a, k, k_low, LEAST / k)
    y = exp2_of_product(b, k, k_low, LEAST / k)
    store(es + i * 4, x)
    store(et + i * 4, y)
    store(diff + i * 4, d)
    z1 = label_exponentials(a, i, e1, z1)
    seen = maximum_of(top_s, a), maximum_of(top_t, b), maximum_of(far, absolute(d))
    return (zs + x, zt + y, z1), seen


@njit(error_model="numpy", forceinline=True)
def any_exponentials(row, first, last, scratch, references, power, e1):
    """Pass A on one block: sums, maxima, and the largest difference, all of logits less their references.

    Of float32 logits it is rounded once, with what the references' difference rounds to (``gap``). 16-bit ones less
    their reference are exact, unless they are tiny beside it, and are subtracted as they are.
    """
    given = row, scratch, references, power, e1
    seen = fill(FLOOR), fill(FLOOR), fill(f32(0.0))
    sums, seen = over_row(exponential_columns, first, last, min(row[4], row[5]), given, no_sums(3), seen)
    sums = total_wide(sums[0]), total_wide(sums[1]), total_wide(sums[2])
    return sums, (top(seen[0]), top(seen[1]), top(seen[2]))


@njit(error_model="numpy")
def exponentials(row, first, last, scratch, references, power, e1):
    """A loop of its own for each dtype: asking in the loop costs a twentieth."""
    s, t, sd, td, vs, vt, out = row
    if sd == 0 and td == 0:
        return any_exponentials((s, t, 0, 0, vs, vt, out), first, last, scratch, references, power, e1)
    if sd == 1 and td == 1:
        return any_exponentials((s, t, 1, 1, vs, vt, out), first, last, scratch, references, power, e1)
    if sd == 2 and td == 2:
        return any_exponentials((s, t, 2, 2, vs, vt, out), first, last, scratch, references, power, e1)
    return any_exponentials(row, first, last, scratch, references, power, e1)


@njit
def shift(x, n, by):
    for i in range(n):
        x[i] = x[i] + by


@njit(error_model="numpy")
def pass_a(row, v, it, power, scratch, e1):
    """Fill the scratch row: (both sums, the label term's), the logarithm of the first two's ratio, the largest difference
    of logits, and the logit that the student's exponentials refer to.

    ``row``: student, teacher, their dtypes and widths, and where the gradient will be written.
    """
    s, t, sd, td, vs, vt, _ = row
    es, et, diff = scratch
    k = power[0]
    zs = 0.0
    zt = 0.0
    z1 = 0.0
    far = f32(0.0)
    rs = reference_of(s, sd, vs)
    rt = reference_of(t, td, vt)
    offset = rs - rt  # which the differences are taken less, one for the row
    for j in range(0, v, BLOCK):
        n = min(j + BLOCK, v)
        sums, seen = exponentials(row, j, n, scratch, (rs, rt), power, e1)
        if seen[0] * steepest(k, e1) > ROOM or seen[1] * k > ROOM:  # raise the references, do the block again
            new_s = max(maximum(s, sd, j, min(n, vs)), rs)
            new_t = max(maximum(t, td, j, min(n, vt)), rt)
            exact_k = np.float64(it) * LOG2E
            zs *= rescale(es, j, (np.float64(new_s) - rs) * exact_k)
            zt *= rescale(et, j, (np.float64(new_t) - rt) * exact_k)
            z1 *= rescale(e1, j, (np.float64(new_s) - rs) * LOG2E)
            rs = new_s
            rt = new_t
            shift(f32_at(diff), j, offset - (rs - rt))
            far += abs(offset - (rs - rt))
            offset = rs - rt
            sums, seen = exponentials(row, j, n, scratch, (rs, rt), power, e1)
        zs += sums[0]
        zt += sums[1]
        z1 += sums[2]
        far = max(far, seen[2])
    ratio = math.log(zs / zt)
    if sd == 0 or td == 0:
        back = offset - rs  # what rounds off in rs - rt, exactly: float64 has no room for 1 beside 1e20
        ratio += np.float64((rs - (offset - back)) - (rt + back)) * it
    return (zs, zt, z1), ratio, far, rs


# -- a row of the student alone, whose gradient is the scratch row times a factor, but for a top k's entries


@njit(error_model="numpy", forceinline=True)
def student_columns(i, given, sums, seen, full):
    """Pass A on sixteen columns of a student alone."""
    dtype, (s, v, es, rs, k, k_low, out, e1) = given
    z, z1 = sums
    look_ahead(s, dtype, i)
    look_ahead_to_write(out, dtype, i)
    a = take(s, dtype, i, v, full) - rs
    x = exp2_of_product(a, k, k_low, LEAST / k)
    store(es + i * 4, x)
    return (z + x, label_exponentials(a, i, e1, z1)), maximum_of(seen, a)


@njit(error_model="numpy", forceinline=True)
def student_loop(dtype, given):
    (first, last), of = given
    sums, highest = over_row(student_columns, first, last, of[1], (dtype, of), no_sums(2), fill(FLOOR))
    return total_wide(sums[0]), total_wide(sums[1]), top(highest)


@njit(error_model="numpy")
def student_exponentials(dtype, given):
    """Pass A on one block of a student alone."""
    return by_dtype(student_loop, dtype, given)


@njit(error_model="numpy", forceinline=True)
def student_pass(student, it, es, out, e1):
    """Fill the scratch row with exponentials of the student; (their sum, the label term's, the logit that they refer to).

    ``out`` is where the gradient will be written.
    """
    s, dtype, v = student
    z = 0.0
    z1 = 0.0
    k = f32(it * LOG2E)
    k_low = f32(it * LOG2E - np.float64(k))
    rs = reference_of(s, dtype, v)
    for j in range(0, v, BLOCK):
        n = min(j + BLOCK, v)
        part, part_1, highest = student_exponentials(dtype, ((j, n), (s, v, es, rs, k, k_low, out, e1)))
        if highest * steepest(k, e1) > ROOM:
            reference = maximum(s, dtype, j, n)
            z *= rescale(es, j, (np.float64(reference) - rs) * (it * LOG2E))
            z1 *= rescale(e1, j, (np.float64(reference) - rs) * LOG2E)
            rs = reference
            part, part_1, highest = student_exponentials(dtype, ((j, n), (s, v, es, rs, k, k_low, out, e1)))
        z += part
        z1 += part_1
    return z, z1, rs


@njit(error_model="numpy", forceinline=True)
def scaled_loop(dtype, given):
    out, v, es, factor, label = given
    split = v & -LANES
    # where v is a multiple of sixteen, what is loaded lies beyond the row and is not stored
    put(out, dtype, split, v, with_label(load(es + split * 4) * factor, split, label), False)
    for i in range(split - LANES, -1, -LANES):  # from the end, which the caches still hold
        put(out, dtype, i, v, with_label(load(es + i * 4) * factor, i, label), True)


@njit(error_model="numpy")
def scaled_row(out, dtype, v, es, factor, label):
    """The scratch row times ``factor``, and the label term's gradient, to ``out``."""
    by_dtype(scaled_loop, dtype, (out, v, es, factor, label))
