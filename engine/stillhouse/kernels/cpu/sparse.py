"""Entry points of the CPU kernel for top-k and sampled teachers: reads the student once, writes the gradient once."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import math

import numpy as np
from numba import njit

from stillhouse.kernels.cpu.arithmetic import (
    FLOOR,
    NEAR,
    encode_bf16,
    encode_f16,
    f32,
    f32_at,
    f64_at,
    i64_at,
    u16_at,
)
from stillhouse.kernels.cpu.blocks import forward_block
from stillhouse.kernels.cpu.calls import INVERSE_T, OTHERS, POWER, run_rows
from stillhouse.kernels.cpu.dense import (
    FORWARD,
    JSD,
    REVERSE,
    centre_gradient,
    impossible,
    row_loss,
    write_row,
)
from stillhouse.kernels.cpu.labels import OUT_OF_RANGE, label_term, logit
from stillhouse.kernels.cpu.lanes import LANES, load, total_wide
from stillhouse.kernels.cpu.loops import no_sums, over
from stillhouse.kernels.cpu.outcomes import (
    compare,
    entry_exponentials,
    ghost_of_student,
    ghost_of_teacher,
    normaliser,
    outcome,
)
from stillhouse.kernels.cpu.read import scaled_row, student_pass
from stillhouse.kernels.series import LOG_REST


@njit
def entries_of(es, v):
    """Where the gradient of single entries lies: behind the scratch row, which is padded."""
    return es + ((v + LANES - 1) & -LANES) * 4


@njit
def label_of(label, j):
    """The label term's gradient of one entry."""
    if label is None:
        return f32(0.0)
    e1, factor = label
    return f32_at(e1)[j] * factor


@njit(forceinline=True)
def scatter(out, dtype, v, es, wide_indices, k, label):
    """The k entries that have a gradient of their own."""
    indices, g = i64_at(wide_indices), f32_at(entries_of(es, v))
    plain, half = f32_at(out), u16_at(out)
    for i in range(k):
        j = indices[i]
        x = g[i] + label_of(label, j)
        if dtype == 0:
            plain[j] = x
        else:
            half[j] = encode_bf16(x) if dtype == 1 else encode_f16(x)


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
def gather(student, wide_indices, k, logits_at):
    """The k entries' logits to ``logits_at``, before the row is read; is each index one of the row's (if not, none is read)?

    Vectors of them are read when it has been: at once, that would wait for the single stores that they are written by.
    """
    indices, logits = i64_at(wide_indices), f32_at(logits_at)
    if outside(indices, k, student[2]):
        return False
    if student[1] == 0:  # a loop of its own, which takes several at a time
        plain = f32_at(student[0])
        for i in range(k):
            logits[i] = plain[indices[i]]
        return True
    for i in range(k):
        logits[i] = f32(logit(student, indices[i]))
    return True


@njit(error_model="numpy", forceinline=True)
def top_k_row(how, row, target, power, scale, scratch, in_range):
    """One row, read already, against k entries, compared as a dense row of their own, and the rest as one outcome.

    (Loss, factor): the gradient is the scratch row times the factor, but for the k entries.

    ``row``: student, dtype, width, 1 / T; ``target``: indices, log-probabilities, k, ghost or not, the logarithm of the
    teacher's mass outside (NaN where it is what the entries leave of 1), what those are multiplied by; ``scratch``: address of
    the exponentials, their sum, what they are relative to. Without a ghost the k log-probabilities are taken to the call's
    temperature by ``power``, and normalised.
    """
    divergence, beta, series = how
    student, it = row
    v = student[2]
    wide_indices, values, k, ghost, log_rest = target
    es_at, z, rs = scratch
    room = ((k + LANES - 1) & -LANES) * 4
    g_at = entries_of(es_at, v)
    parts = g_at + room, g_at + 2 * room, g_at + 3 * room
    kept_at, pt_at, x_at = parts
    indices, g = i64_at(wide_indices), f32_at(g_at)
    if not in_range:
        return OUT_OF_RANGE, 0.0
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
    log_z = math.log(z)
    rest, log_ghost_s, ghost_s = ghost_of_student(rest, z, log_z, student, indices, k, rs, it, f32_at(es_at))
    loss, d_ghost = outcome(divergence, beta, log_ghost_s, log_ghost_t, ghost_s, ghost_t)
    far = compare(logits_at, values, x_at, k, rs, it, log_z, power, top_t, mass)
    bad = False
    if far > f32(1e29) and divergence != JSD:
        p, sign = (pt_at, f32(-1.0)) if divergence == FORWARD else (kept_at, f32(1.0))
        bad = impossible(f32_at(p), f32_at(x_at), k, sign)
    if (bad or loss == np.inf) and holds_nan(f32_at(values), k):
        return np.nan, 0.0
    if divergence == REVERSE and (bad or loss == np.inf):
        for i in range(k):
            g[i] = f32(0.0)
        return np.inf, 0.0
    sums = z, 1.0
    logs = f32(1.0), f32(0.0), f32(0.0)
    constant = f32(0.0) if far < NEAR else f32_at(series)[LOG_REST]
    part, centre = row_loss(how, parts, k, sums, logs, constant, False)
    loss += part
    if divergence == JSD:  # its mean is of log(s/m) + constant, times 1 - beta
        d_ghost = d_ghost / (1.0 - beta) + constant
    middle = centre + (ghost_s * d_ghost if ghost_s > 0.0 else 0.0)
    if divergence == FORWARD:  # what write_row comes to
        part, summed, _ = forward_block(parts, (g_at, 0, k), k, logs, sums, f32(scale), False, None)
        alpha = ghost_s + d_ghost
    else:
        part, summed, _ = write_row(
            how, (g_at, 0, k), parts, k, sums, logs, f32(middle), f32(scale), False, None
        )
        alpha = ghost_s * (d_ghost - middle) if ghost_s > 0.0 else 0.0
    loss += part
    if divergence == JSD:
        alpha *= 1.0 - beta
    # a gradient of a softmax sums to zero, also where the teacher's outcomes do not sum to one
    summed += alpha
    centre_gradient(f32_at(kept_at), g, k, f32(-summed / z * scale))
    alpha -= summed * ghost_s
    return np.inf if bad else loss, alpha * scale / rest if rest > 0.0 else 0.0


@njit(error_model="numpy", forceinline=True)
def sampled_row(row, target, scale, scratch):
    """One row, read already, against labels drawn, which go into the scratch row itself; gives what :func:`top_k_row` does."""
    student, it = row
    v = student[2]
    wide_indices, values, k, _, _ = target
    es_at, z, rs = scratch
    es = f32_at(es_at)
    drawn = f64_at(entries_of(es_at, v))  # where repeated draws add up
    indices = i64_at(wide_indices)
    weights = f32_at(values)
    if outside(indices, k, v):
        return OUT_OF_RANGE, 0.0
    log_z = math.log(z)
    loss = 0.0
    weight = 0.0
    for i in range(k):
        j = indices[i]
        if weights[i] > f32(0.0):
            x = logit(student, j)
            loss -= weights[i] * (((x if x >= FLOOR else -np.inf) - rs) * it - log_z)
            weight += weights[i]
    for i in range(k):
        drawn[indices[i]] = 0.0
    for i in range(k):
        drawn[indices[i]] += max(np.float64(weights[i]), 0.0)
    unit = z / weight if weight > 0.0 else 0.0
    for i in range(k):  # the first of the draws takes all of their weight
        j = indices[i]
        es[j] -= f32(drawn[j] * unit)
        drawn[j] = 0.0
    return loss, weight / z * scale


@njit(error_model="numpy", forceinline=True)
def row_of(q, d, r, how, student, out, scale, es, labels):
    """Of a call whose other integers are indices, values, a ghost's logarithms, k, whether they are samples, and is there a ghost."""
    indices, values, rests, k, sampled, ghost = (
        q[OTHERS], q[OTHERS + 1], q[OTHERS + 2], q[OTHERS + 3], q[OTHERS + 4], q[OTHERS + 5],
    )  # fmt: skip
    (_, dtype, v), it, place = student, d[INVERSE_T], indices + r * k * 8
    log_rest = np.float64(f32_at(rests)[r]) if rests != 0 else np.nan if ghost != 0 else -np.inf
    in_range = True
    if sampled == 0:
        in_range = gather(student, place, k, entries_of(es, v))
    z, z1, rs = student_pass(student, it, es, out if out != 0 else es, labels[0])
    given = not (rests != 0 and math.isnan(log_rest))  # and no number; otherwise NaN stands for none
    if not (given and z > 0.0 and z < np.inf):
        return np.nan, 0.0
    of_labels, label = label_term(labels, r, student, z1, rs)
    target, scratch = (place, values + r * k * 4, k, ghost, log_rest), (es, z, rs)
    if sampled != 0:
        of_teacher, factor = sampled_row((student, it), target, scale, scratch)
    else:
        of_teacher, factor = top_k_row(how, (student, it), target, d[POWER], scale, scratch, in_range)
    if out != 0 and of_teacher > -np.inf:
        scaled_row(out, dtype, v, es, f32(factor), label)
        if sampled == 0:  # entries that have values of their own
            scatter(out, dtype, v, es, place, k, label)
    return of_teacher, of_labels


def sparse(call):
    """Rows of a call against a top k or samples."""
    run_rows(call, None, row_of)


def sparse_labels(call):
    """The same with a label term."""
    run_rows(call, 1, row_of)
