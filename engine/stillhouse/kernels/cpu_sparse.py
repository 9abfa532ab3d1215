"""Entry point of the CPU kernel for top-k and sampled teachers: reads the student once, writes the gradient once."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import math

import numpy as np
from numba import njit

from stillhouse.kernels.cpu_blocks import forward_block
from stillhouse.kernels.cpu_dense import leave_rows, own_scratch, take_rows
from stillhouse.kernels.cpu_jit import HEADER, ROWS
from stillhouse.kernels.cpu_lanes import LANES, load, total_wide
from stillhouse.kernels.cpu_loops import no_sums, over
from stillhouse.kernels.cpu_math import (
    FLOOR,
    NEAR,
    bool_at,
    f32,
    f32_at,
    f64_at,
    i64_at,
)
from stillhouse.kernels.cpu_outcomes import (
    compare,
    entry_exponentials,
    ghost_of_student,
    ghost_of_teacher,
    logit,
    normaliser,
    outcome,
)
from stillhouse.kernels.cpu_read import zero
from stillhouse.kernels.cpu_rows import (
    FORWARD,
    JSD,
    REVERSE,
    centre_gradient,
    impossible,
    row_loss,
    write_row,
)
from stillhouse.kernels.cpu_student import entries_of, finish, scatter, student_pass
from stillhouse.kernels.series import LOG_REST

OUT_OF_RANGE = -np.inf  # the loss that reports an index outside the row


@njit(error_model="numpy", forceinline=True)
def plain_columns(i, row, sums, seen, full):
    return (sums[0] + load(row + i * 4),), seen


@njit(error_model="numpy")
def sum_of_others(es_at, v, indices, k):
    """Sum of a scratch row without k entries, which become 0 there."""
    es = f32_at(es_at)
    for i in range(k):
        es[indices[i]] = f32(0.0)
    sums, _ = over(plain_columns, 0, v, es_at, no_sums(1), (), True)
    return total_wide(sums[0])


@njit
def outside(indices, k, v):
    """Is one of the indices none of the row's? Apart from :func:`gather`, where the question would keep each from the next."""
    wrong = False
    for i in range(k):
        wrong |= np.uint64(indices[i]) >= np.uint64(v)
    return wrong


@njit
def holds_nan(x, n):
    """Asked before a loss is said to be infinite, which would hide that."""
    for i in range(n):  # noqa: SIM110 Numba has no generators in any()
        if math.isnan(x[i]):
            return True
    return False


@njit(error_model="numpy", forceinline=True)
def gather(student, dtype, v, wide_indices, k, logits_at):
    """The k entries' logits to ``logits_at``, before the row is read; is each index one of the row's (if not, none is read)?

    Vectors of them are read when it has been: at once, that would wait for the single stores that they are written by.
    """
    indices, logits = i64_at(wide_indices), f32_at(logits_at)
    if outside(indices, k, v):
        return False
    if dtype == 0:
        plain = f32_at(student)
        for i in range(k):
            logits[i] = plain[indices[i]]
        return True
    for i in range(k):
        logits[i] = f32(logit(student, dtype, indices[i]))
    return True


@njit(error_model="numpy", forceinline=True)
def top_k_row(
    divergence, student, out, dtype, v, wide_indices, values, ghost, log_rest, power, k, it, scale, beta, series,
    es_at, z, rs, in_range,
):  # fmt: skip
    """One row, read already, against k entries, compared as a dense row of their own, and the rest as one outcome.

    (Loss, factor, whether a gradient is to be written): that is the scratch row times the factor, but for the k entries.

    ``log_rest`` is the logarithm of the teacher's mass there, NaN where it is what the entries leave of 1. Without a
    ``ghost`` the k log-probabilities are taken to the call's temperature by ``power``, and normalised.
    """
    es = f32_at(es_at)
    room = (k + LANES - 1) & -LANES
    g_at = entries_of(es_at, v)
    kept_at = g_at + room * 4
    pt_at = kept_at + room * 4
    x_at = pt_at + room * 4
    indices = i64_at(wide_indices)
    if not (z > 0.0 and z < np.inf):
        return np.nan, 0.0, False
    if not in_range:
        return OUT_OF_RANGE, 0.0, False
    logits_at = g_at  # until the gradient takes their place
    inside = entry_exponentials(logits_at, kept_at, k, it, rs, 1.0)
    log_ghost_t, ghost_t = ghost_of_teacher(log_rest, f32_at(values), k, v)
    top_t, mass = (0.0, 1.0) if ghost != 0 else normaliser(f32_at(values), k, power)
    entry_exponentials(values, pt_at, k, power, top_t, mass)
    if inside < 0.5 * z:
        rest = z - inside
    else:  # would cancel, and is summed
        rest = sum_of_others(es_at, v, indices, k)
        z = inside + rest
    unit = scale / z  # divided early: at the end the next row's first store would wait for it
    log_z = math.log(z)
    rest, log_ghost_s, ghost_s = ghost_of_student(rest, z, log_z, student, dtype, v, indices, k, rs, it, es)
    over_rest = scale / rest if rest > 0.0 else 0.0
    loss, d_ghost = outcome(divergence, beta, log_ghost_s, log_ghost_t, ghost_s, ghost_t)
    far = compare(logits_at, values, x_at, k, rs, it, log_z, power, top_t, mass)
    bad = False
    if far > f32(1e29) and divergence != JSD:
        p, sign = (pt_at, f32(-1.0)) if divergence == FORWARD else (kept_at, f32(1.0))
        bad = impossible(f32_at(p), f32_at(x_at), k, sign)
    if (bad or loss == np.inf) and holds_nan(f32_at(values), k):
        return np.nan, 0.0, False
    if divergence == REVERSE and (bad or loss == np.inf):
        if out != 0:
            zero(out, dtype, 0, v)
        return np.inf, 0.0, False
    one = f32(1.0)
    none = f32(0.0)
    constant = none if far < NEAR else f32_at(series)[LOG_REST]
    part, centre = row_loss(
        divergence, k, kept_at, pt_at, x_at, z, 1.0, none, none, one, beta, series, constant, False
    )
    loss += part
    if divergence == JSD:  # its mean is of log(s/m) + constant, times 1 - beta
        d_ghost = d_ghost / (1.0 - beta) + constant
    middle = centre + (ghost_s * d_ghost if ghost_s > 0.0 else 0.0)
    if divergence == FORWARD:  # what write_row comes to
        part, summed, size = forward_block(
            kept_at, pt_at, x_at, g_at, 0, k, k, one, none, none, z, 1.0, f32(scale), False
        )
    else:
        part, summed, size = write_row(
            divergence, g_at, 0, k, k, kept_at, pt_at, x_at, z, 1.0, none, none, f32(middle), one, beta,
            f32(scale), False,
        )  # fmt: skip
    loss += part
    factor = 0.0
    if out != 0:
        if divergence == FORWARD:
            alpha = ghost_s + d_ghost
        else:
            alpha = ghost_s * (d_ghost - middle) if ghost_s > 0.0 else 0.0
        if divergence == JSD:
            alpha *= 1.0 - beta
        # a gradient of a softmax sums to zero, also where the teacher's outcomes do not sum to one
        summed += alpha
        centre_gradient(f32_at(kept_at), f32_at(g_at), k, f32(-summed * unit))
        alpha -= summed * ghost_s
        factor = alpha * over_rest
    return np.inf if bad else loss, factor, out != 0


@njit(error_model="numpy", forceinline=True)
def sampled_row(student, out, dtype, v, wide_indices, values, k, it, scale, es_at, z, rs):
    """One row, read already, against labels drawn, which go into the scratch row itself; gives what :func:`top_k_row` does."""
    es = f32_at(es_at)
    drawn = f64_at(entries_of(es_at, v))  # where repeated draws add up
    indices = i64_at(wide_indices)
    weights = f32_at(values)
    if not (z > 0.0 and z < np.inf):
        return np.nan, 0.0, False
    if outside(indices, k, v):
        return OUT_OF_RANGE, 0.0, False
    log_z = math.log(z)
    loss = 0.0
    weight = 0.0
    for i in range(k):
        j = indices[i]
        if weights[i] > f32(0.0):
            x = logit(student, dtype, j)
            loss -= weights[i] * (((x if x >= FLOOR else -np.inf) - rs) * it - log_z)
            weight += weights[i]
    factor = 0.0
    if out != 0:
        for i in range(k):
            drawn[indices[i]] = 0.0
        for i in range(k):
            drawn[indices[i]] += max(np.float64(weights[i]), 0.0)
        unit = z / weight if weight > 0.0 else 0.0
        for i in range(k):  # the first of the draws takes all of their weight
            j = indices[i]
            es[j] -= f32(drawn[j] * unit)
            drawn[j] = 0.0
        factor = weight / z * scale
    return loss, factor, out != 0


def sparse_rows(call):
    """Rows of a call until none is left; addresses, 0 for no mask or no gradient; strides in bytes."""
    scratch, rows = own_scratch(call), i64_at(call)[ROWS]
    q = i64_at(call + 8 * HEADER)
    divergence, student, gradient, losses, mask, student_stride, dtype = (
        q[0], q[1], q[2], q[3], q[4], q[5], q[6],
    )  # fmt: skip
    v, indices, values, rests, k, sampled, ghost, series, stride = (
        q[7], q[8], q[9], q[10], q[11], q[12], q[13], q[14], q[15],
    )  # fmt: skip
    d = f64_at(call + 8 * (HEADER + 16))
    inverse_t, scale, beta, loss_scale, power = d[0], d[1], d[2], d[3], d[4]  # T^2 is in both scales
    loss = f32_at(losses)
    keep = bool_at(mask)
    item = 4 if dtype == 0 else 2
    entries = 0 if sampled != 0 else k  # that the gradient has values of their own for
    first, last = take_rows(call)
    while first < rows:
        # a row that was compared and is written while the next is read: where to, its entries, its scratch row, the factor
        late, late_place, late_es, late_factor = 0, indices, scratch, f32(0.0)
        for r in range(first, last):
            out = gradient + r * v * item if gradient != 0 else gradient
            if mask != 0 and keep[r] == 0:
                loss[r] = f32(0.0)
                if out != 0:
                    zero(out, dtype, 0, v)
                continue
            row = student + r * student_stride
            place = indices + r * k * 8
            value = values + r * k * 4
            es = scratch + stride if late_es == scratch else scratch
            log_rest = np.float64(f32_at(rests)[r]) if rests != 0 else np.nan if ghost != 0 else -np.inf
            in_range = True
            if sampled == 0:
                in_range = gather(row, dtype, v, place, k, entries_of(es, v))
            z, rs = student_pass(
                row, dtype, v, inverse_t, es, out if out != 0 else es, late, late_es, late_factor
            )
            if rests != 0 and math.isnan(log_rest):  # given, and no number; otherwise it stands for none
                z = np.nan
            if late != 0:
                scatter(late, dtype, v, late_es, late_place, entries)
            if sampled != 0:
                part, factor, write = sampled_row(
                    row, out, dtype, v, place, value, k, inverse_t, scale * inverse_t, es, z, rs
                )
            else:
                part, factor, write = top_k_row(
                    divergence, row, out, dtype, v, place, value, ghost, log_rest, power, k, inverse_t, scale * inverse_t,
                    beta, series, es, z, rs, in_range,
                )  # fmt: skip
            loss[r] = loss_scale * part
            late, late_place, late_es, late_factor = out if write else 0, place, es, f32(factor)
            if late != 0 and stride == 0:
                finish(late, dtype, v, late_es, late_factor, late_place, entries)
                late = 0
        if late != 0:
            finish(late, dtype, v, late_es, late_factor, late_place, entries)
        leave_rows(call, last - first, losses)
        first, last = take_rows(call)
