"""The CPU kernels: rows of logits in, a loss for each row and the gradient out. Compiled by Numba, no Python inside.

A row is read once. Pass A keeps exp(student), exp(teacher) and student - teacher in a scratch row that lives in the
second-level cache, against a running reference that need not be the maximum (it is raised, and what was computed
rescaled, where a block exceeds it by 2^8); pass B reads only the scratch, so that writing over the student's logits
needs no copy and still vectorises. With a label term a fourth part of the scratch keeps exp(student) at T = 1, and pass B
adds its share of the gradient.

x = log(student / teacher) of an entry is (student - teacher) / T less the logarithm of the normalisers' ratio, which
``high`` and ``low`` hold as two float32; with 1 / T they are ``logs``. The difference is exact before it is rounded
(``gap``): a rounded one is known to the larger logit's rounding only, which shows where both sides are nearly equal, and at
low temperatures.

Widths: ``v`` columns are worked on; ``vs`` and ``vt`` of them exist in the student and the teacher, the others count
as -inf. ``wide`` is the student's row in the output; columns from ``vs`` on get gradient zero.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import numpy as np
from numba import njit

from stillhouse.kernels.cpu.arithmetic import NEAR, absolute, f32, f32_at, fma, numbers_at
from stillhouse.kernels.cpu.blocks import forward_block, jsd_block, jsd_gradient, reverse_block, weighted_sum
from stillhouse.kernels.cpu.build import BLOCK
from stillhouse.kernels.cpu.calls import INVERSE_T, OTHERS, run_rows
from stillhouse.kernels.cpu.labels import label_term
from stillhouse.kernels.cpu.lanes import load, total_wide
from stillhouse.kernels.cpu.loops import no_sums, over
from stillhouse.kernels.cpu.read import LOG2E, bytes_of, label_from, pass_a, scaled_row, zero
from stillhouse.kernels.series import JSD_APART, LOG_REST, TERMS

# the sum of |s - t|, of 2 at most, from which on closed forms serve a whole row. By Pinsker's inequality a KL is then an
# eighth at least: what they round to is a millionth of that. For a jsd see series.jsd_apart
APART = 0.5
# of the mass seen, once that is a sixteenth of all: where the sides differ by so little of it, the sum will stay small
UNLIKELY, SEEN = 0.2, 1 / 16
PROBE = 256  # columns after which both are looked at
TINY = 1e-6  # a loss below this may show the normalisers' rounding, up to 1e-13
ROUNDING = 1e-6  # and more than that in a normaliser is none
FORWARD, REVERSE, JSD = 0, 1, 2
coefficients_at, logarithms_at = numbers_at(TERMS), numbers_at(3)  # of series.jsd_series


@njit(error_model="numpy", forceinline=True)
def apart_columns(i, given, sums, seen, full):
    es, et, ratio = given
    t = load(et + i * 4)
    return (sums[0] + absolute(fma(load(es + i * 4), ratio, -t)), sums[1] + t), seen


@njit(error_model="numpy")
def apart(enough, v, es, et, zs, zt):
    """Is the sum of |s - t| that large, so that closed forms lose nothing? Read from the end until that is sure.

    Where the sides differ by little of the mass that was seen, the rest of the row is not asked: it takes the series.
    """
    sums, end = no_sums(2), v
    for j in range(max(v // PROBE - 1, 0) * PROBE, -1, -PROBE):
        sums, _ = over(apart_columns, j, end, (es, et, f32(zt / zs)), sums, (), True)
        size, mass = total_wide(sums[0]), total_wide(sums[1])
        if size >= enough * zt:
            return True
        if mass >= SEEN * zt and size < UNLIKELY * mass:
            return False
        end = j
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
def settled(divergence, beta, loss, mean, summed):
    """A loss without what rounding added to the logarithm x of the normalisers' ratio, which is seen where it is tiny.

    What that is, the gradient's sum tells of FORWARD, and the mean logarithm, less the divergence that it should be, of the others.
    The loss, whose first derivative in it vanishes, is half its square too large: beta (1 - beta) of that for a JSD.
    """
    if not 0.0 < loss < TINY:
        return loss
    off, share = summed, 1.0
    if divergence == REVERSE:
        off = mean - loss
    elif divergence == JSD:
        off, share = mean / beta - loss / (1.0 - beta), beta * (1.0 - beta)
    if abs(off) >= ROUNDING:  # it is the teacher's mass where the student has none
        return loss
    return max(loss - share * off * off / 2.0, 0.0)


@njit
def from_column(scratch, j):
    """The parts of the scratch from column j on."""
    return scratch[0] + j * 4, scratch[1] + j * 4, scratch[2] + j * 4


@njit(error_model="numpy")
def row_loss(how, scratch, v, sums, logs, constant, differ):
    """(Loss, centre) of what has to be known before a gradient is written: nothing, for FORWARD.

    For REVERSE the centre is the row's mean log(s/t), for JSD that of log(s/m) + ``constant``, which replaces the teacher.
    """
    divergence, beta, series = how
    if divergence == FORWARD:
        return 0.0, 0.0
    it, high, low = logs
    zs, zt = sums
    ends = logarithms_at(series + 8 * TERMS)
    terms = coefficients_at(series), coefficients_at(series + 4 * TERMS), ends
    loss = 0.0
    centre = 0.0
    ratio = f32((1.0 - beta) * zt / (beta * zs))
    if divergence == JSD and differ:
        offset = np.float64(high) + low + ends[2]  # x is to be log(s/t) less the odds' logarithm
        high = f32(offset)
        low = f32(offset - high)
    logs = it, high, low
    for j in range((v - 1) // BLOCK * BLOCK, -1, -BLOCK):  # from the end, which the caches still hold
        n = min(BLOCK, v - j)
        here = from_column(scratch, j)
        if divergence == REVERSE:
            centre += weighted_sum(here[0], here[2], n, logs)
        else:
            if differ:
                part, weighted = jsd_block(here, n, logs, ratio, terms, constant, True)
            else:
                part, weighted = jsd_block(here, n, logs, ratio, terms, constant, False)
            loss += part
            centre += weighted
    if divergence == REVERSE:
        return loss, centre / zs
    return loss * beta / zt, centre * beta / (zt * (1.0 - beta))


@njit(error_model="numpy")
def row_gradient(how, n, scratch, out, sums, logs, centre, scale, differ, label):
    """One block: (loss not counted yet, sums of the gradient and its size)."""
    divergence, beta, _ = how
    g, gd, m = out
    if divergence == FORWARD and differ:
        if gd == 0:  # of float32 a loop of its own
            return forward_block(scratch, (g, 0, m), n, logs, sums, scale, True, label)
        return forward_block(scratch, out, n, logs, sums, scale, True, label)
    if divergence == FORWARD:
        return forward_block(scratch, out, n, logs, sums, scale, False, label)
    if divergence == REVERSE and differ:
        return reverse_block(scratch, out, n, logs, sums, centre, scale, True, label)
    if divergence == REVERSE:
        return reverse_block(scratch, out, n, logs, sums, centre, scale, False, label)
    es, et, _ = scratch
    summed, size = jsd_gradient(es, et, out, n, centre, f32((1.0 - beta) / sums[0]), scale, label)
    return 0.0, summed, size


@njit(error_model="numpy")
def write_row(how, out, scratch, v, sums, logs, centre, scale, differ, label):
    """Gradient of one row: (the loss that comes with it, the gradient's sum, and that of its absolute values).

    ``out``: where to, its dtype and how many of the v columns. Where none is asked for, it is the teacher's place in the
    scratch, which nothing reads any more: sums keep their order.
    """
    divergence = how[0]
    place, gd, width = out
    loss = 0.0
    summed = 0.0
    size = 0.0
    last = (v - 1) // BLOCK * BLOCK
    for i in range(0, v, BLOCK):
        j = last - i if divergence == FORWARD else i  # the pass before ended where this one begins
        n = min(BLOCK, v - j)
        here = place + j * bytes_of(gd), gd, min(n, width - j)
        part, t, a = row_gradient(
            how, n, from_column(scratch, j), here, sums, logs, centre, scale, differ, label_from(label, j)
        )
        loss += part
        summed += t
        size += a
    zs, zt = sums
    if divergence == JSD:
        return loss, summed, size
    if divergence == FORWARD and differ:
        size = 2.0 * zt  # at most; not summed
    unit = 1.0 / (zt if divergence == FORWARD else zs)  # what the blocks were summed in
    return loss * unit, summed * unit, size * unit


@njit(error_model="numpy")
def infinite_row(divergence, far, v, scratch):
    """Is KL(p || q) of the row infinite, for q lacks an entry that p has?"""
    es, et, diff = scratch
    if divergence == JSD or far <= f32(1e29):
        return False
    if divergence == FORWARD:
        return impossible(f32_at(et), f32_at(diff), v, f32(-1.0))
    return impossible(f32_at(es), f32_at(diff), v, f32(1.0))


@njit(error_model="numpy", forceinline=True)
def row_of(q, d, r, how, student, out, scale, scratch, label_of):
    """(Loss of one row before T^2, its label term's), the gradient of both to ``out``; NaN where a side is no distribution.

    Of a call whose other integers are the teacher, its stride and dtype, vs, vt, v, and bytes of a part of the scratch.
    """
    teacher, stride, td, vs, vt, v, part = (
        q[OTHERS], q[OTHERS + 1], q[OTHERS + 2], q[OTHERS + 3], q[OTHERS + 4], q[OTHERS + 5], q[OTHERS + 6],
    )  # fmt: skip
    divergence, beta, series = how
    s, sd, wide = student
    it, e1 = f32(d[INVERSE_T]), label_of[0]
    k = f32(d[INVERSE_T] * LOG2E)
    power = k, f32(np.float64(it) * LOG2E - np.float64(k))
    parts = scratch, scratch + part, scratch + 2 * part
    es, et, diff = parts
    read = s, teacher + r * stride, sd, td, vs, vt, out if out != 0 else es
    (zs, zt, z1), ratio, far, rs = pass_a(read, v, it, power, parts, e1)
    if not (zs > 0.0 and zt > 0.0 and zs < np.inf and zt < np.inf):
        return np.nan, 0.0
    label_loss, label = label_term(label_of, r, student, z1, rs)
    bad = infinite_row(divergence, far, v, parts)
    if bad and divergence == REVERSE:
        if out != 0:
            scaled_row(out, sd, wide, es, f32(0.0), label)
        return np.inf, label_loss
    sums, scale = (zs, zt), f32(scale)
    high = f32(ratio)
    logs = it, high, f32(ratio - high)
    all_near = far * it + abs(high) < NEAR
    constant = f32(0.0) if all_near else f32_at(series)[LOG_REST]
    enough = f32_at(series)[JSD_APART] if divergence == JSD else APART
    differ = not all_near and apart(enough, v, es, et, zs, zt)
    loss, centre = row_loss(how, parts, v, sums, logs, constant, differ)
    summed = 0.0
    if divergence != JSD or out != 0:
        place = (out, sd, vs) if out != 0 else (et, 0, vs)
        part, summed, size = write_row(how, place, parts, v, sums, logs, f32(centre), scale, differ, label)
        loss += part
        if out != 0 and sd == 0 and abs(summed) > 1e-7 * size:  # 16 bits have no room for what that changes
            centre_gradient(f32_at(es), f32_at(out), min(v, vs), f32(-summed / zs * scale))
    if out != 0 and wide > vs:
        zero(out, sd, vs, wide)
    return np.inf if bad else settled(divergence, beta, loss, centre - constant, summed), label_loss


def dense(call):
    """Rows of a call against a teacher's logits."""
    run_rows(call, None, row_of)


def dense_labels(call):
    """The same with a label term."""
    run_rows(call, 1, row_of)
