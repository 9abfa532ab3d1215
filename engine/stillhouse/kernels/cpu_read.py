"""The first pass of the CPU kernels over a row, which is the only one that reads logits, and what writes a gradient."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import math

import numpy as np
from numba import njit

from stillhouse.kernels.cpu_jit import BLOCK
from stillhouse.kernels.cpu_math import (
    FLOOR,
    LEAST,
    absolute,
    decode_bf16,
    decode_f16,
    encode_bf16,
    encode_f16,
    exp2_of_product,
    f32,
    f32_at,
    gap,
    reduce_add,
    reduce_max,
    u16_at,
)

FIRST = 256  # columns whose maximum is the first reference
ROOM = f32(8.0)  # how far, in powers of two, an exponential may exceed its reference: rounding grows with it
LOG2E = 1.4426950408889634
NEG_INF = f32(-np.inf)


@njit
def block(address, dtype, j, n, width, buffer):
    """Columns j .. j + n of a row as float32: in place where they lie so, else decoded into ``buffer``."""
    if dtype == 0 and j + n <= width:
        return address + j * 4
    out = f32_at(buffer)
    have = min(max(width - j, 0), n)
    if dtype == 0:
        plain = f32_at(address + j * 4)
        for i in range(have):
            out[i] = plain[i]
    else:
        half = u16_at(address + j * 2)
        if dtype == 1:
            for i in range(have):
                out[i] = decode_bf16(half[i])
        else:
            for i in range(have):
                out[i] = decode_f16(half[i])
    for i in range(have, n):
        out[i] = NEG_INF
    return buffer


@njit
def store(out, dtype, j, n, source):
    """Columns j .. j + n of the gradient from float32 at ``source``."""
    x = f32_at(source)
    if dtype == 0:
        plain = f32_at(out + j * 4)
        for i in range(n):
            plain[i] = x[i]
    else:
        half = u16_at(out + j * 2)
        if dtype == 1:
            for i in range(n):
                half[i] = encode_bf16(x[i])
        else:
            for i in range(n):
                half[i] = encode_f16(x[i])


@njit
def zero(out, dtype, j, n):
    """Columns j .. j + n of the gradient to zero (all bits zero in every dtype)."""
    if dtype == 0:
        plain = f32_at(out + j * 4)
        for i in range(n):
            plain[i] = f32(0.0)
    else:
        half = u16_at(out + j * 2)
        for i in range(n):
            half[i] = np.uint16(0)


@njit
def maximum(x, n):
    top = FLOOR
    for i in range(n):
        top = reduce_max(top, x[i])
    return top


@njit
def reference_of(address, dtype, width, v, buffer):
    """A logit to subtract from the row: the maximum of its first columns, or of all where those are -inf."""
    j = 0
    n = min(FIRST, v)
    top = maximum(f32_at(block(address, dtype, 0, n, width, buffer)), n)
    while top <= FLOOR and j + n < v:
        j += n
        n = min(BLOCK, v - j)
        top = maximum(f32_at(block(address, dtype, j, n, width, buffer)), n)
    return top if top > FLOOR else f32(0.0)  # nothing but -inf: all is zero against any other number


@njit(error_model="numpy")
def exponentials(s, t, es, et, diff, n, rs, rt, offset, k, k_low):
    """Pass A on one block: sums, maxima, and the largest difference."""
    zs = f32(0.0)
    zt = f32(0.0)
    top_s = FLOOR
    top_t = FLOOR
    far = f32(0.0)
    least = LEAST / k
    for i in range(n):
        a = FLOOR if s[i] < FLOOR else s[i]
        b = FLOOR if t[i] < FLOOR else t[i]
        d = gap(a, b, offset)
        a = a - rs
        b = b - rt
        a = least if a < least else a
        b = least if b < least else b
        x = exp2_of_product(a, k, k_low)
        y = exp2_of_product(b, k, k_low)
        es[i] = x
        et[i] = y
        diff[i] = d
        zs = reduce_add(zs, x)
        zt = reduce_add(zt, y)
        top_s = reduce_max(top_s, a)
        top_t = reduce_max(top_t, b)
        far = reduce_max(far, absolute(d))
    return zs, zt, top_s, top_t, far


@njit
def rescale(x, n, up):
    factor = 2.0 ** -np.float64(up)
    for i in range(n):
        x[i] = x[i] * f32(factor)
    return factor


@njit
def shift(x, n, by):
    for i in range(n):
        x[i] = x[i] + by


@njit(error_model="numpy")
def pass_a(sa, ta, sd, td, vs, vt, v, it, k, k_low, es_at, et_at, diff_at, buffer):
    """Fill the scratch row: both sums, the logarithm of the normalisers' ratio, the largest difference of logits."""
    zs = 0.0
    zt = 0.0
    far = f32(0.0)
    rs = reference_of(sa, sd, vs, v, buffer)
    rt = reference_of(ta, td, vt, v, buffer)
    offset = rs - rt  # of the differences: any number that makes them small, the same for the row
    for j in range(0, v, BLOCK):
        n = min(BLOCK, v - j)
        s = f32_at(block(sa, sd, j, n, vs, buffer))
        t = f32_at(block(ta, td, j, n, vt, buffer + BLOCK * 4))
        es = f32_at(es_at + j * 4)
        et = f32_at(et_at + j * 4)
        diff = f32_at(diff_at + j * 4)
        a, b, top_s, top_t, most = exponentials(s, t, es, et, diff, n, rs, rt, offset, k, k_low)
        if top_s * k > ROOM or top_t * k > ROOM:  # raise the references and do the block again
            up_s = max(maximum(s, n), rs) - rs
            up_t = max(maximum(t, n), rt) - rt
            zs *= rescale(f32_at(es_at), j, up_s * k)
            zt *= rescale(f32_at(et_at), j, up_t * k)
            rs += up_s
            rt += up_t
            shift(f32_at(diff_at), j, offset - (rs - rt))
            offset = rs - rt
            a, b, top_s, top_t, most = exponentials(s, t, es, et, diff, n, rs, rt, offset, k, k_low)
        zs += a
        zt += b
        far = max(far, most)
    ratio = math.log(zs) - math.log(zt) + (np.float64(rs) - np.float64(rt) - np.float64(offset)) * it
    return zs, zt, ratio, far
