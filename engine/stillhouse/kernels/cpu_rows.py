"""The CPU kernels: rows of logits in, a loss for each row and the gradient out. Compiled by Numba, no Python inside.

A row is read once. Pass A keeps exp(student), exp(teacher) and student - teacher in a scratch row that lives in the
second-level cache, against a running reference that need not be the maximum (it is raised, and what was computed
rescaled, where a block exceeds it by 2^8); pass B reads only the scratch, so that writing over the student's logits
needs no copy and still vectorises.

x = log(student / teacher) of an entry is (student - teacher) / T less the logarithm of the normalisers' ratio, which
``high`` and ``low`` hold as two float32. The difference is exact before it is rounded (``gap``): a rounded one is known
to the larger logit's rounding only, which shows where both sides are nearly equal, and at low temperatures.

Widths: ``v`` columns are worked on; ``vs`` and ``vt`` of them exist in the student and the teacher, the others count
as -inf. ``wide`` is the student's row in the output; columns from ``vs`` on get gradient zero.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import numpy as np
from numba import njit

from stillhouse.kernels.cpu_blocks import forward_block, jsd_block, jsd_gradient, reverse_block, weighted_sum
from stillhouse.kernels.cpu_jit import BLOCK
from stillhouse.kernels.cpu_lanes import LANES, fill, load, total, where
from stillhouse.kernels.cpu_math import NEAR, absolute, exp2, f32, f32_at, fma, phi_over_square
from stillhouse.kernels.cpu_read import LOG2E, pass_a, put, zero
from stillhouse.kernels.series import JSD_APART, LOG_ODDS, LOG_REST

# the sum of |s - t|, of 2 at most, from which on closed forms serve a whole row. By Pinsker's inequality a KL is then an
# eighth at least: what they round to is a millionth of that. For a jsd see series.jsd_apart
APART = 0.5
# of the mass seen, once that is a sixteenth of all: where the sides differ by so little of it, the sum will stay small
UNLIKELY, SEEN = 0.2, 1 / 16
PROBE = 256  # columns after which both are looked at
TINY = 1e-6  # a loss below this may show the normalisers' rounding, up to 1e-13
ROUNDING = 1e-6  # and more than that in a normaliser is none
FORWARD, REVERSE, JSD = 0, 1, 2


@njit(error_model="numpy")
def apart(enough, v, es_at, et_at, zs, zt):
    """Is the sum of |s - t| that large, so that closed forms lose nothing? Read from the end until that is sure.

    Where the sides differ by little of the mass that was seen, the rest of the row is not asked: it takes the series.
    """
    ratio = f32(zt / zs)
    size = 0.0
    mass = 0.0
    end = v
    for j in range(max(v // PROBE - 1, 0) * PROBE, -1, -PROBE):
        part = fill(f32(0.0))
        here = fill(f32(0.0))
        for i in range(j, end, LANES):
            t = load(et_at + i * 4)
            part = part + absolute(fma(load(es_at + i * 4), ratio, -t))
            here = here + t
        size += total(part)
        mass += total(here)
        end = j
        if size >= enough * zt:
            return True
        if mass >= SEEN * zt and size < UNLIKELY * mass:
            return False
    return False


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
def write_centred(divergence, out, gd, n, es, et, diff, zs, zt, high, low, centre, it, beta, scale):
    """A 16-bit gradient again, by way of a float32 one, which takes the place of ``et`` in the scratch."""
    _, summed, _ = write_row(
        divergence, et, 0, n, n, es, et, diff, zs, zt, high, low, centre, it, beta, scale, False
    )
    factor = f32(-summed / zs * scale)
    for i in range(0, n, LANES):
        put(out, gd, i, n, fma(load(es + i * 4), factor, load(et + i * 4)), False)


@njit(error_model="numpy")
def normaliser_error(v, es_at, diff_at, zs, it, high, low):
    """What rounding added to the logarithm of the normalisers' ratio: sum of p_s (p_t / p_s - 1), which should be 0.

    The loss, whose first derivative in it vanishes, is half its square too large: beta (1 - beta) of that for a JSD.
    """
    whole = 0.0
    for j in range(0, v, BLOCK):
        part = fill(f32(0.0))
        for i in range(j, min(j + BLOCK, v), LANES):
            x = low - fma(load(diff_at + i * 4), it, -high)
            near = fma(phi_over_square(x) * x, x, x)
            far = exp2(where(x < f32(80.0), x, f32(80.0)) * f32(LOG2E)) - f32(1.0)
            part = fma(load(es_at + i * 4), where(absolute(x) < NEAR, near, far), part)
        whole += total(part)
    return whole / zs


@njit
def coefficients(address):
    """What series.jsd_series gives, from where it lies."""
    x = f32_at(address)
    return (
        x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9],
        x[10], x[11], x[12], x[13], x[14], x[15], x[16], x[17], x[18],
    )  # fmt: skip


@njit(error_model="numpy")
def row_loss(divergence, v, es_at, et_at, diff_at, zs, zt, high, low, it, beta, series, constant, differ):
    """The passes over the scratch that come before a gradient can be written: (loss so far, centre)."""
    loss = 0.0
    centre = 0.0
    if divergence == FORWARD:
        return loss, f32(centre)
    terms = coefficients(series)
    ratio = f32((1.0 - beta) * zt / (beta * zs))
    if divergence == JSD and differ:
        offset = np.float64(high) + low + terms[LOG_ODDS]  # x is to be log(s/t) less the odds' logarithm
        high = f32(offset)
        low = f32(offset - high)
    for j in range((v - 1) // BLOCK * BLOCK, -1, -BLOCK):  # from the end, which the caches still hold
        n = min(BLOCK, v - j)
        es = es_at + j * 4
        et = et_at + j * 4
        diff = diff_at + j * 4
        if divergence == REVERSE:
            centre += weighted_sum(es, diff, n, it, high, low)
        else:
            if differ:
                part, weighted = jsd_block(es, et, diff, n, it, high, low, ratio, terms, constant, True)
            else:
                part, weighted = jsd_block(es, et, diff, n, it, high, low, ratio, terms, constant, False)
            loss += part
            centre += weighted
    if divergence == REVERSE:
        return loss, f32(centre / zs)
    return loss * beta / zt, f32(centre * beta / (zt * (1.0 - beta)))


@njit(error_model="numpy")
def row_gradient(
    divergence, j, n, es_at, et_at, diff_at, out, gd, m, zs, zt, high, low, centre, it, beta, scale, differ
):
    """One block, of whose gradient m columns go to ``out``: (loss not counted yet, sums of the gradient and its size)."""
    es = es_at + j * 4
    et = et_at + j * 4
    diff = diff_at + j * 4
    if divergence == FORWARD and differ and gd == 0:
        return forward_block(es, et, diff, out, 0, m, n, it, high, low, zs, zt, scale, True)
    if divergence == FORWARD and differ and gd == 1:
        return forward_block(es, et, diff, out, 1, m, n, it, high, low, zs, zt, scale, True)
    if divergence == FORWARD and differ:
        return forward_block(es, et, diff, out, 2, m, n, it, high, low, zs, zt, scale, True)
    if divergence == FORWARD:
        return forward_block(es, et, diff, out, gd, m, n, it, high, low, zs, zt, scale, False)
    if divergence == REVERSE and differ:
        return reverse_block(es, et, diff, out, gd, m, n, it, high, low, centre, zs, zt, scale, True)
    if divergence == REVERSE:
        return reverse_block(es, et, diff, out, gd, m, n, it, high, low, centre, zs, zt, scale, False)
    summed, size = jsd_gradient(es, et, out, gd, m, n, centre, f32((1.0 - beta) / zs), scale)
    return 0.0, summed, size


@njit(error_model="numpy")
def write_row(
    divergence, out, gd, vs, v, es_at, et_at, diff_at, zs, zt, high, low, centre, it, beta, scale, differ
):
    """Gradient of one row: (the loss that comes with it, the gradient's sum, and that of its absolute values).

    Where none is asked for, ``out`` is the teacher's place in the scratch, which nothing reads any more: sums keep their order.
    """
    loss = 0.0
    summed = 0.0
    size = 0.0
    last = (v - 1) // BLOCK * BLOCK
    for i in range(0, v, BLOCK):
        j = last - i if divergence == FORWARD else i  # the pass before ended where this one begins
        n = min(BLOCK, v - j)
        m = min(n, vs - j)
        place = out + j * (4 if gd == 0 else 2)
        part, t, a = row_gradient(
            divergence, j, n, es_at, et_at, diff_at, place, gd, m, zs, zt, high, low, centre, it, beta, scale,
            differ,
        )  # fmt: skip
        loss += part
        summed += t
        size += a
    if divergence == JSD:
        return loss, summed, size
    if divergence == FORWARD and differ:
        size = 2.0 * zt  # at most; not summed
    unit = 1.0 / (zt if divergence == FORWARD else zs)  # what the blocks were summed in
    return loss * unit, summed * unit, size * unit


@njit(error_model="numpy", forceinline=True)
def dense_row(
    divergence, sa, ta, out, sd, td, gd, vs, vt, v, wide, it, k, scale, beta, series, scratch, stride
):
    """Loss of one row (before T^2), its gradient to ``out``; NaN where a side is no distribution."""
    es_at = scratch
    et_at = es_at + stride
    diff_at = et_at + stride
    k_low = f32(np.float64(it) * LOG2E - np.float64(k))
    zs, zt, ratio, far = pass_a(
        sa, ta, sd, td, vs, vt, v, it, k, k_low, es_at, et_at, diff_at, out if out != 0 else es_at
    )
    if not (zs > 0.0 and zt > 0.0 and zs < np.inf and zt < np.inf):
        return np.nan
    high = f32(ratio)
    low = f32(ratio - high)
    bad = False
    if divergence == FORWARD and far > f32(1e29):
        bad = impossible(f32_at(et_at), f32_at(diff_at), v, f32(-1.0))
    if divergence == REVERSE and far > f32(1e29):
        bad = impossible(f32_at(es_at), f32_at(diff_at), v, f32(1.0))
        if bad:
            if out != 0:
                zero(out, gd, 0, wide)
            return np.inf
    all_near = far * it + abs(high) < NEAR
    constant = f32(0.0) if all_near else f32_at(series)[LOG_REST]
    enough = f32_at(series)[JSD_APART] if divergence == JSD else APART
    differ = not all_near and apart(enough, v, es_at, et_at, zs, zt)
    loss, centre = row_loss(
        divergence, v, es_at, et_at, diff_at, zs, zt, high, low, it, beta, series, constant, differ
    )
    if divergence != JSD or out != 0:
        place, stored = (out, gd) if out != 0 else (et_at, 0)
        part, summed, size = write_row(
            divergence, place, stored, vs, v, es_at, et_at, diff_at, zs, zt, high, low, centre, it, beta, scale,
            differ,
        )  # fmt: skip
        loss += part
        if out != 0 and gd == 0 and abs(summed) > 1e-7 * size:
            centre_gradient(f32_at(es_at), f32_at(out), min(v, vs), f32(-summed / zs * scale))
        if out != 0 and gd != 0 and abs(summed) > 1e-3 * size:
            write_centred(
                divergence, out, gd, min(v, vs), es_at, et_at, diff_at, zs, zt, high, low, centre, it, beta,
                scale,
            )  # fmt: skip
    if 0.0 < loss < TINY:
        off = normaliser_error(v, es_at, diff_at, zs, it, high, low)
        off = off if abs(off) < ROUNDING else 0.0  # it is the teacher's mass where the student has none
        loss = max(loss - (beta * (1.0 - beta) if divergence == JSD else 1.0) * off * off / 2.0, 0.0)
    if out != 0 and wide > vs:
        zero(out, gd, vs, wide)
    return np.inf if bad else loss
