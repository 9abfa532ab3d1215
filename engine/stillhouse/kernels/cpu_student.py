"""What rows of the CPU kernel for top-k and sampled teachers begin and end with, which only the student's logits take part in.

The gradient is the scratch row times a factor, but for the entries of a top k. Reading a row keeps the arithmetic busy and writing
one the memory, so that a short row's gradient is written while the next row is read (``late``).
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import numpy as np
from numba import njit

from stillhouse.kernels.cpu_jit import BLOCK, processor
from stillhouse.kernels.cpu_lanes import LANES, fill, load, store, top, total_wide
from stillhouse.kernels.cpu_loops import no_sums, over_row
from stillhouse.kernels.cpu_math import (
    FLOOR,
    LEAST,
    encode_bf16,
    encode_f16,
    exp2_of_product,
    f32,
    f32_at,
    i64_at,
    maximum_of,
    u16_at,
)
from stillhouse.kernels.cpu_read import (
    LOG2E,
    ROOM,
    look_ahead,
    look_ahead_to_write,
    maximum,
    put,
    reference_of,
    rescale,
    take,
)

# whose first-level cache waits for few lines at once: a row of one side, which does not compute long enough to hide that, is
# asked for past it where it is written late or in place. Measured there and on no other
ZEN4 = processor() == "znver4"


@njit
def entries_of(es, v):
    """Where the gradient of single entries lies: behind the scratch row, which is padded."""
    return es + ((v + LANES - 1) & -LANES) * 4


@njit(error_model="numpy", forceinline=True)
def student_columns(i, given, sums, seen, full):
    """Pass A on sixteen columns of a student alone; where ``writes``, those of the row before are written.

    ``past``: what is read is asked for past the first-level cache, and what will be written is not asked for.
    """
    s, dtype, v, es, rs, least, k, k_low, out, late, late_es, factor, writes, past = given
    look_ahead(s, dtype, i, past)
    if not past:
        look_ahead_to_write(out, dtype, i)
    a = take(s, dtype, i, v, full) - rs
    x = exp2_of_product(a, k, k_low, least)
    store(es + i * 4, x)
    if writes:
        put(late, dtype, i, v, load(late_es + i * 4) * factor, full)
    return (sums[0] + x,), maximum_of(seen, a)


@njit(error_model="numpy", forceinline=True)
def any_student_exponentials(
    s, dtype, v, first, last, es, rs, k, k_low, out, late, late_es, factor, writes, past
):
    given = s, dtype, v, es, rs, LEAST / k, k, k_low, out, late, late_es, factor, writes, past
    sums, highest = over_row(student_columns, first, last, v, given, no_sums(1), fill(FLOOR))
    return total_wide(sums[0]), top(highest)


@njit(error_model="numpy")
def student_exponentials(s, dtype, v, first, last, es, rs, k, k_low, out, late, late_es, factor):
    """Pass A on one block of a student alone; a loop of its own for each dtype, and for a ``late`` row, of float32."""
    if late != 0:
        return any_student_exponentials(
            s, 0, v, first, last, es, rs, k, k_low, out, late, late_es, factor, True, ZEN4
        )
    if ZEN4 and dtype == 0 and out == s:
        return any_student_exponentials(
            s, 0, v, first, last, es, rs, k, k_low, out, late, late_es, factor, False, True
        )
    if dtype == 0:
        return any_student_exponentials(
            s, 0, v, first, last, es, rs, k, k_low, out, late, late_es, factor, False, False
        )
    if dtype == 1:
        return any_student_exponentials(
            s, 1, v, first, last, es, rs, k, k_low, out, late, late_es, factor, False, False
        )
    return any_student_exponentials(
        s, 2, v, first, last, es, rs, k, k_low, out, late, late_es, factor, False, False
    )


@njit(error_model="numpy", forceinline=True)
def student_pass(s, dtype, v, it, es, out, late, late_es, factor):
    """Fill the scratch row with exponentials of the student; (their sum, the logit that they refer to).

    ``out`` is what will be written afterwards; ``late``, where it is not 0, what is written now: the scratch row
    ``late_es`` times ``factor``.
    """
    z = 0.0
    k = f32(it * LOG2E)
    k_low = f32(it * LOG2E - np.float64(k))
    rs = reference_of(s, dtype, v)
    for j in range(0, v, BLOCK):
        n = min(j + BLOCK, v)
        part, highest = student_exponentials(s, dtype, v, j, n, es, rs, k, k_low, out, late, late_es, factor)
        if highest * k > ROOM:
            reference = maximum(s, dtype, j, n)
            z *= rescale(f32_at(es), j, (np.float64(reference) - rs) * (it * LOG2E))
            rs = reference
            part, highest = student_exponentials(s, dtype, v, j, n, es, rs, k, k_low, out, 0, es, factor)
        z += part
    return z, rs


@njit(error_model="numpy", forceinline=True)
def any_scaled_row(out, dtype, v, es, factor):
    split = v & -LANES
    # where v is a multiple of sixteen, what is loaded lies beyond the row and is not stored
    put(out, dtype, split, v, load(es + split * 4) * factor, False)
    for i in range(split - LANES, -1, -LANES):  # from the end, which the caches still hold
        put(out, dtype, i, v, load(es + i * 4) * factor, True)


@njit(error_model="numpy")
def scaled_row(out, dtype, v, es, factor):
    """The scratch row times ``factor`` to ``out``; a loop of its own for each dtype, as in pass A."""
    if dtype == 0:
        any_scaled_row(out, 0, v, es, factor)
    elif dtype == 1:
        any_scaled_row(out, 1, v, es, factor)
    else:
        any_scaled_row(out, 2, v, es, factor)


@njit(forceinline=True)
def scatter(out, dtype, v, es, wide_indices, k):
    """The k entries that have a gradient of their own."""
    indices, g = i64_at(wide_indices), f32_at(entries_of(es, v))
    if dtype == 0:
        plain = f32_at(out)
        for i in range(k):
            plain[indices[i]] = g[i]
        return
    half = u16_at(out)
    for i in range(k):
        half[indices[i]] = encode_bf16(g[i]) if dtype == 1 else encode_f16(g[i])


@njit(error_model="numpy")
def finish(out, dtype, v, es, factor, indices, k):
    """The gradient of a row whose scratch row and entries are there."""
    scaled_row(out, dtype, v, es, factor)
    scatter(out, dtype, v, es, indices, k)
