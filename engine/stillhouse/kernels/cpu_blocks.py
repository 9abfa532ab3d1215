"""What the CPU kernels do with a block of the scratch row: the loss and the gradient of each divergence.

Sums are of float32 over ``CHUNK`` columns and go on in float64: equal numbers round alike, so that what thousands of them
are off by does not average out.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

from numba import njit

from stillhouse.kernels.cpu_lanes import LANES, add_wide, fill, load, store, total_wide, where, zero_wide
from stillhouse.kernels.cpu_math import (
    LEAST_MASS,
    NEAR,
    absolute,
    f32,
    fma,
    log1p_of_ratio,
    maximum_of,
    minimum_of,
    phi_over_square,
)
from stillhouse.kernels.cpu_read import CHUNK, put


@njit(error_model="numpy", forceinline=True)
def forward_columns(es, et, diff, g, gd, i, m, it, high, low, ratio, factor, sums, differ, full):
    loss, summed, size = sums
    t = load(et + i * 4)  # all of it in multiples of 1 / zt
    x = fma(load(diff + i * 4), it, -high) - low
    grad = fma(load(es + i * 4), ratio, -t)
    if differ:
        loss = loss + fma(-t, x, grad)
    else:
        first = t * x
        second = first * (phi_over_square(x) * x)
        near = absolute(x) < NEAR
        loss = loss + where(near, second, grad - first)
        grad = where(near, first + second, grad)
        size = size + absolute(grad)
    put(g, gd, i, m, grad * factor, full)
    return loss, summed + grad, size


@njit(error_model="numpy", forceinline=True)
def forward_span(es, et, diff, g, gd, first, last, m, it, high, low, ratio, factor, sums, differ, full):
    none = fill(f32(0.0))
    loss, summed, size = sums
    for j in range(first, last, CHUNK):
        part = none, none, none
        for i in range(j, min(j + CHUNK, last), LANES):
            part = forward_columns(
                es, et, diff, g, gd, i, m, it, high, low, ratio, factor, part, differ, full
            )
        x, y, z = part
        loss = add_wide(loss, x)
        summed = add_wide(summed, y)
        if not differ:
            size = add_wide(size, z)
    return loss, summed, size


@njit(error_model="numpy", forceinline=True)
def forward_block(es, et, diff, g, gd, m, n, it, high, low, zs, zt, scale, differ):
    """KL(t || s): gradient s - t, loss t phi(log s - log t); neither cancels where s is near t, unless the sides ``differ``.

    A short loop, so one of its own for each dtype where they do, as in pass A.
    """
    sums = zero_wide(), zero_wide(), zero_wide()
    ratio = f32(zt / zs)
    factor = f32(scale / zt)
    split = max(m, 0) // LANES * LANES
    sums = forward_span(es, et, diff, g, gd, 0, split, m, it, high, low, ratio, factor, sums, differ, True)
    sums = forward_span(es, et, diff, g, gd, split, n, m, it, high, low, ratio, factor, sums, differ, False)
    loss, summed, size = sums
    return total_wide(loss), total_wide(summed), total_wide(size)


@njit(error_model="numpy")
def weighted_sum(p, diff, n, it, high, low):
    weighted = zero_wide()
    for j in range(0, n, CHUNK):
        part = fill(f32(0.0))
        for i in range(j, min(j + CHUNK, n), LANES):
            part = fma(load(p + i * 4), fma(load(diff + i * 4), it, -high) - low, part)
        weighted = add_wide(weighted, part)
    return total_wide(weighted)


@njit(error_model="numpy", forceinline=True)
def reverse_columns(es, et, diff, g, gd, i, m, it, high, low, centre, ratio, factor, sums, differ, full):
    loss, summed, size = sums
    s = load(es + i * 4)  # all of it in multiples of 1 / zs
    x = fma(load(diff + i * 4), it, -high) - low
    grad = s * (x - centre)
    first = s * x
    term = fma(load(et + i * 4), ratio, first - s)
    if not differ:
        second = first * (phi_over_square(-x) * x)
        term = where(absolute(x) < NEAR, second, term)
    put(g, gd, i, m, grad * factor, full)  # last, since g may be et
    return loss + term, summed + grad, size + absolute(grad)


@njit(error_model="numpy", forceinline=True)
def reverse_span(
    es, et, diff, g, gd, first, last, m, it, high, low, centre, ratio, factor, sums, differ, full
):
    none = fill(f32(0.0))
    loss, summed, size = sums
    for j in range(first, last, CHUNK):
        part = none, none, none
        for i in range(j, min(j + CHUNK, last), LANES):
            part = reverse_columns(
                es, et, diff, g, gd, i, m, it, high, low, centre, ratio, factor, part, differ, full
            )
        x, y, z = part
        loss = add_wide(loss, x)
        summed = add_wide(summed, y)
        size = add_wide(size, z)
    return loss, summed, size


@njit(error_model="numpy", forceinline=True)
def reverse_block(es, et, diff, g, gd, m, n, it, high, low, centre, zs, zt, scale, differ):
    """KL(s || t): gradient s (log s/t - its mean), loss s phi(log t - log s), whose closed form serves where they ``differ``."""
    sums = zero_wide(), zero_wide(), zero_wide()
    ratio = f32(zs / zt)
    factor = f32(scale / zs)
    split = max(m, 0) // LANES * LANES
    sums = reverse_span(
        es, et, diff, g, gd, 0, split, m, it, high, low, centre, ratio, factor, sums, differ, True
    )
    sums = reverse_span(
        es, et, diff, g, gd, split, n, m, it, high, low, centre, ratio, factor, sums, differ, False
    )
    loss, summed, size = sums
    return total_wide(loss), total_wide(summed), total_wide(size)


@njit(error_model="numpy", forceinline=True)
def jsd_block(es, et, diff, n, it, high, low, to_a, to_b, series, constant, differ):
    """Loss, and the sum of b w with w = log(s/m) + log(1 - beta), which replaces the teacher in the scratch row.

    With a = beta t and b = (1 - beta) s, whose factors are ``to_a`` and ``to_b``, log(a / (a + b)) and log(b / (a + b))
    are had from the ratio of the smaller to the larger, and from x. Where the two sides share little, log(s/m) is
    log 1/(1 - beta) nearly everywhere, and only w tells entries apart. Where they nearly agree it is near 0, and only
    without that constant are entries told apart: ``constant`` is 0 if all entries of the row are near, else
    log(1 - beta), as it always is where the sides ``differ``.
    """
    loss = zero_wide()
    weighted = zero_wide()
    s0, s1, s2, s3, s4, s5, s6, s7, l0, l1, l2, l3, l4, l5, l6, l7, log_beta, log_rest, log_odds = series
    for j in range(0, n, CHUNK):
        part = fill(f32(0.0))
        sum_w = fill(f32(0.0))
        for i in range(j, min(j + CHUNK, n), LANES):
            a = load(et + i * 4) * to_a
            b = load(es + i * 4) * to_b
            x = fma(load(diff + i * 4), it, -high) - low
            more = maximum_of(maximum_of(a, b), LEAST_MASS)  # neither side may have any
            grown = log1p_of_ratio(minimum_of(a, b) / more)
            w = minimum_of(x - log_odds, f32(0.0)) - grown
            t_over_m = minimum_of(-log_rest - x, -log_beta) - grown
            term = fma(a, t_over_m, b * (w - log_rest))
            if not differ:
                near = absolute(x) < NEAR
                close = fma(fma(fma(fma(fma(fma(fma(l7, x, l6), x, l5), x, l4), x, l3), x, l2), x, l1), x, l0)
                term = where(near, a * x * (x * close), term)
                s_over_m = fma(
                    fma(fma(fma(fma(fma(fma(s7, x, s6), x, s5), x, s4), x, s3), x, s2), x, s1), x, s0
                )
                w = where(near, fma(s_over_m, x, constant), w)
            part = part + term
            sum_w = fma(b, w, sum_w)
            store(et + i * 4, w)
        loss = add_wide(loss, part)
        weighted = add_wide(weighted, sum_w)
    return total_wide(loss), total_wide(weighted)


@njit(error_model="numpy", forceinline=True)
def jsd_span(es, w, g, gd, first, last, m, centre, factor, scale, sums, full):
    summed, size = sums
    for j in range(first, last, CHUNK):
        part = fill(f32(0.0))
        absolutes = fill(f32(0.0))
        for i in range(j, min(j + CHUNK, last), LANES):
            grad = load(es + i * 4) * ((load(w + i * 4) - centre) * factor)
            part = part + grad
            absolutes = absolutes + absolute(grad)
            put(g, gd, i, m, grad * scale, full)
        summed = add_wide(summed, part)
        size = add_wide(size, absolutes)
    return summed, size


@njit(error_model="numpy")
def jsd_gradient(es, w, g, gd, m, n, centre, factor, scale):
    sums = zero_wide(), zero_wide()
    split = max(m, 0) // LANES * LANES
    sums = jsd_span(es, w, g, gd, 0, split, m, centre, factor, scale, sums, True)
    sums = jsd_span(es, w, g, gd, split, n, m, centre, factor, scale, sums, False)
    summed, size = sums
    return total_wide(summed), total_wide(size)
