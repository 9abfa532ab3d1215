"""The CPU kernels: rows of logits in, a loss for each row and the gradient out. Compiled by Numba, no Python inside.

A row is read once. Pass A keeps exp(student), exp(teacher) and student - teacher in a scratch row that lives in the
second-level cache, against a running reference that need not be the maximum (it is raised, and what was computed rescaled, where a block exceeds it by 2^8);
pass B reads only the scratch, so that writing over the student's logits needs no copy and still vectorises.

Widths: ``v`` columns are worked on; ``vs`` and ``vt`` of them exist in the student and the teacher, the others count
as -inf. ``wide`` is the student's row in the output; columns from ``vs`` on get gradient zero.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import math

import numpy as np
from numba import njit

from stillhouse.kernels.cpu_math import (
    FLOOR,
    absolute,
    decode_bf16,
    decode_f16,
    encode_bf16,
    encode_f16,
    exp2,
    f32,
    f32_at,
    fma,
    log,
    phi_over_square,
    reduce_add,
    reduce_max,
    u16_at,
)

BLOCK = 2048  # columns at a time: buffers of 8 KB stay in the first-level cache
FIRST = 256  # columns whose maximum is the first reference
ROOM = f32(8.0)  # how far, in powers of two, an exponential may exceed its reference: rounding grows with it
LOG2E = 1.4426950408889634
NEG_INF = f32(-np.inf)
FORWARD, REVERSE, JSD = 0, 1, 2


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
    return top


@njit(error_model="numpy")
def exponentials(s, t, es, et, diff, n, rs, rt, k):
    """Pass A on one block: sums, maxima, and the largest difference."""
    zs = f32(0.0)
    zt = f32(0.0)
    top_s = FLOOR
    top_t = FLOOR
    far = f32(0.0)
    for i in range(n):
        a = s[i] - rs
        b = t[i] - rt
        a = FLOOR if a < FLOOR else a
        b = FLOOR if b < FLOOR else b
        x = exp2(a * k)
        y = exp2(b * k)
        d = a - b
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
def pass_a(sa, ta, sd, td, vs, vt, v, k, es_at, et_at, diff_at, buffer):
    """Fill the scratch row. Sums in float64, their logarithms' difference, the largest difference of logits."""
    zs = 0.0
    zt = 0.0
    far = f32(0.0)
    rs = reference_of(sa, sd, vs, v, buffer)
    rt = reference_of(ta, td, vt, v, buffer)
    for j in range(0, v, BLOCK):
        n = min(BLOCK, v - j)
        s = f32_at(block(sa, sd, j, n, vs, buffer))
        t = f32_at(block(ta, td, j, n, vt, buffer + BLOCK * 4))
        es = f32_at(es_at + j * 4)
        et = f32_at(et_at + j * 4)
        diff = f32_at(diff_at + j * 4)
        a, b, top_s, top_t, most = exponentials(s, t, es, et, diff, n, rs, rt, k)
        if top_s * k > ROOM or top_t * k > ROOM:  # raise the references and do the block again
            up_s = max(maximum(s, n), rs) - rs
            up_t = max(maximum(t, n), rt) - rt
            zs *= rescale(f32_at(es_at), j, up_s * k)
            zt *= rescale(f32_at(et_at), j, up_t * k)
            shift(f32_at(diff_at), j, up_t - up_s)
            rs += up_s
            rt += up_t
            a, b, top_s, top_t, most = exponentials(s, t, es, et, diff, n, rs, rt, k)
        zs += a
        zt += b
        far = max(far, most)
    return zs, zt, f32(math.log(zs) - math.log(zt)), far


@njit(error_model="numpy")
def forward_block(es, et, diff, g, n, it, c, izs, izt, scale):
    """KL(t || s): gradient s - t, loss t phi(log s - log t); both without cancellation where s is near t."""
    loss = f32(0.0)
    total = f32(0.0)
    size = f32(0.0)
    for i in range(n):
        ps = es[i] * izs
        pt = et[i] * izt
        x = fma(diff[i], it, -c)
        first = pt * x
        second = first * (phi_over_square(x) * x)
        gap = ps - pt
        near = absolute(x) < f32(0.25)
        grad = first + second if near else gap
        loss = reduce_add(loss, second if near else gap - first)
        total = reduce_add(total, grad)
        size = reduce_add(size, absolute(grad))
        g[i] = grad * scale
    return loss, total, size


@njit(error_model="numpy")
def weighted_sum(p, x, n):
    total = f32(0.0)
    for i in range(n):
        total = reduce_add(total, p[i] * x[i])
    return total


@njit(error_model="numpy")
def reverse_block(es, et, diff, g, n, it, c, centre, izs, izt, scale):
    """KL(s || t): gradient s (log s/t - its mean), loss s phi(log t - log s)."""
    loss = f32(0.0)
    total = f32(0.0)
    size = f32(0.0)
    for i in range(n):
        ps = es[i] * izs
        grad = ps * fma(diff[i], it, -centre)
        total = reduce_add(total, grad)
        size = reduce_add(size, absolute(grad))
        g[i] = grad * scale
        x = fma(-diff[i], it, c)
        first = ps * x
        second = first * (phi_over_square(x) * x)
        far = (et[i] * izt - ps) - first
        loss = reduce_add(loss, second if absolute(x) < f32(0.25) else far)
    return loss, total, size


@njit(error_model="numpy")
def jsd_block(es, et, diff, n, it, c, izs, izt, beta, series):
    """Loss, and the mean of w = log(s/m) + log(1 - beta), which replaces the difference in the scratch row.

    Where the two sides share little, log(s/m) is log 1/(1 - beta) nearly everywhere, and only w tells entries apart.
    """
    loss = f32(0.0)
    mean = f32(0.0)
    b1, b2, b3, b4, b5, b6, l2, l3, l4, l5, l6, l7, log_beta, log_rest, odds, inverse = series
    rest = f32(1.0) - beta
    for i in range(n):
        ps = es[i] * izs
        pt = et[i] * izt
        x = fma(diff[i], it, -c)
        low = pt if pt < ps else ps
        high = ps if pt < ps else pt
        high = f32(1e-37) if high < f32(1e-37) else high
        swap = x < f32(0.0)
        q = (inverse if swap else odds) * (low / high)
        u = f32(1.0) + q
        grown = log(u) + (q - (u - f32(1.0)))  # log(1 + q)
        negative = x if swap else f32(0.0)
        base = (log_beta if swap else log_rest) + grown
        term = -fma(beta * pt, base + (x - negative), rest * ps * (base - negative))
        poly = fma(fma(fma(fma(fma(b6, x, b5), x, b4), x, b3), x, b2), x, b1) * x
        close = fma(fma(fma(fma(fma(l7, x, l6), x, l5), x, l4), x, l3), x, l2) * x * (x * pt)
        near = absolute(x) < f32(0.25)
        far = ((log_beta - log_rest) - negative if swap else f32(0.0)) + grown
        to_s = poly - log_rest if near else far
        loss = reduce_add(loss, close if near else term)
        mean = reduce_add(mean, -ps * to_s)
        diff[i] = -to_s
    return loss, mean


@njit(error_model="numpy")
def jsd_gradient(es, diff, g, n, centre, factor, scale):
    total = f32(0.0)
    size = f32(0.0)
    for i in range(n):
        grad = es[i] * (diff[i] - centre) * factor
        total = reduce_add(total, grad)
        size = reduce_add(size, absolute(grad))
        g[i] = grad * scale
    return total, size


@njit
def impossible(p, diff, n, sign):
    """Does p have mass where the other side has none?"""
    for i in range(n):  # noqa: SIM110 Numba has no generators in any()
        if p[i] > f32(0.0) and sign * diff[i] > f32(1e29):
            return True
    return False


@njit
def centre_gradient(es, g, n, factor):
    """The gradient sums to zero: what it sums to is the error of a normaliser, spread as the softmax."""
    for i in range(n):
        g[i] = fma(es[i], factor, g[i])


@njit(error_model="numpy")
def row_loss(divergence, v, es_at, et_at, diff_at, zs, zt, c, it, beta, series):
    """The passes over the scratch that come before a gradient can be written: (loss so far, centre)."""
    izs = f32(1.0 / zs)
    izt = f32(1.0 / zt)
    loss = 0.0
    centre = 0.0
    for j in range(0, v, BLOCK):
        n = min(BLOCK, v - j)
        es = f32_at(es_at + j * 4)
        diff = f32_at(diff_at + j * 4)
        if divergence == REVERSE:
            centre += weighted_sum(es, diff, n)
        elif divergence == JSD:
            part, mean = jsd_block(es, f32_at(et_at + j * 4), diff, n, it, c, izs, izt, beta, series)
            loss += part
            centre += mean
    if divergence == REVERSE:
        centre *= it / zs
    return loss, f32(centre)


@njit(error_model="numpy")
def row_gradient(divergence, j, n, es_at, et_at, diff_at, out, zs, zt, c, centre, it, beta, scale):
    """One block of the gradient to ``out``: (loss not counted yet, sum and absolute sum of the gradient)."""
    izs = f32(1.0 / zs)
    izt = f32(1.0 / zt)
    es = f32_at(es_at + j * 4)
    et = f32_at(et_at + j * 4)
    diff = f32_at(diff_at + j * 4)
    g = f32_at(out)
    if divergence == FORWARD:
        return forward_block(es, et, diff, g, n, it, c, izs, izt, scale)
    if divergence == REVERSE:
        return reverse_block(es, et, diff, g, n, it, c, centre, izs, izt, scale)
    total, size = jsd_gradient(es, diff, g, n, centre, (f32(1.0) - beta) * izs, scale)
    return f32(0.0), total, size


@njit(error_model="numpy")
def write_row(divergence, out, gd, vs, v, es_at, et_at, diff_at, zs, zt, c, centre, it, beta, scale, buffer):
    """Gradient of one row and the loss that comes with it; ``out`` 0 where no gradient is asked for."""
    loss = 0.0
    total = 0.0
    size = 0.0
    for j in range(0, v, BLOCK):
        n = min(BLOCK, v - j)
        direct = out != 0 and gd == 0 and j + n <= vs
        place = out + j * 4 if direct else buffer
        part, t, a = row_gradient(
            divergence, j, n, es_at, et_at, diff_at, place, zs, zt, c, centre, it, beta, scale
        )
        loss += part
        total += t
        size += a
        if out != 0 and not direct and j < vs:
            store(out, gd, j, min(n, vs - j), buffer)
    if out != 0 and gd == 0 and abs(total) > 1e-7 * size:
        centre_gradient(f32_at(es_at), f32_at(out), min(v, vs), f32(-total / zs * scale))
    return loss


@njit(error_model="numpy")
def dense_row(divergence, sa, ta, out, sd, td, gd, vs, vt, v, wide, it, k, scale, beta, series, scratch, stride):
    """Loss of one row (before T^2), its gradient to ``out``; NaN where a side is no distribution."""
    es_at = scratch + 2 * BLOCK * 4
    et_at = es_at + stride
    diff_at = et_at + stride
    zs, zt, c, far = pass_a(sa, ta, sd, td, vs, vt, v, k, es_at, et_at, diff_at, scratch)
    if not (zs > 0.0 and zt > 0.0 and zs < np.inf and zt < np.inf):
        return np.nan
    bad = False
    if divergence == FORWARD and far > f32(1e29):
        bad = impossible(f32_at(et_at), f32_at(diff_at), v, f32(-1.0))
    if divergence == REVERSE and far > f32(1e29):
        bad = impossible(f32_at(es_at), f32_at(diff_at), v, f32(1.0))
        if bad:
            if out != 0:
                zero(out, gd, 0, wide)
            return np.inf
    loss, centre = row_loss(divergence, v, es_at, et_at, diff_at, zs, zt, c, it, beta, series)
    if divergence != JSD or out != 0:
        loss += write_row(
            divergence, out, gd, vs, v, es_at, et_at, diff_at, zs, zt, c, centre, it, beta, scale, scratch
        )
    if out != 0 and wide > vs:
        zero(out + vs * (4 if gd == 0 else 2), gd, 0, wide - vs)
    return np.inf if bad else loss
