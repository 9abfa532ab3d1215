"""The label term of a row: cross-entropy of its labels with softmax(student), beside a divergence from a teacher.

Pass A leaves exp(student), relative to a reference, in a scratch row ``e1``, and their sum ``z1``. From that the labels'
probabilities times ``z1`` are subtracted, before the gradient is written, which then is the scratch row times one factor.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import math

import numpy as np
from numba import njit

from stillhouse.kernels.cpu.arithmetic import FLOOR, decode_bf16, decode_f16, f32, f32_at, fma, i64_at, u16_at
from stillhouse.kernels.cpu.lanes import load, store, total_wide, where
from stillhouse.kernels.cpu.loops import no_sums, over_row
from stillhouse.kernels.cpu.read import take
from stillhouse.kernels.series import NO_LABEL

OUT_OF_RANGE = -np.inf  # the loss that reports an index outside the row
NOTHING, MINUS_INFINITY, NOT_A_NUMBER = f32(0.0), f32(-np.inf), f32(np.nan)


@njit
def logit(row, j):
    address, dtype, _ = row
    if dtype == 0:
        return np.float64(f32_at(address)[j])
    bits = u16_at(address)[j]
    return np.float64(decode_bf16(bits)) if dtype == 1 else np.float64(decode_f16(bits))


@njit(error_model="numpy", forceinline=True)
def probabilities_of(place, i, v, times, share, full):
    """(What lies at ``place`` times a number, that and ``share``) of sixteen labels; 0 beyond the row, NaN below 0."""
    given = take(place, 0, i, v, full)
    beyond = given < f32(-1e29)
    own = where(beyond, NOTHING, given * times)
    own = where(own < NOTHING, NOT_A_NUMBER, own)
    return own, where(beyond, NOTHING, own + share)


@njit(error_model="numpy", forceinline=True)
def target_columns(i, given, sums, seen, full):
    (student, dtype, v), rs, place, times, share = given
    a = take(student, dtype, i, v, full)
    own, q = probabilities_of(place, i, v, times, share, full)
    gap = where(a < FLOOR, MINUS_INFINITY, a - rs)
    mean = where(q > NOTHING, q * gap, NOTHING)
    return (sums[0] + own, sums[1] + q, sums[2] + mean), seen


@njit(error_model="numpy", forceinline=True)
def subtract_columns(i, given, sums, seen, full):
    e1, v, place, times, share, unit = given
    _, q = probabilities_of(place, i, v, times, share, full)
    store(e1 + i * 4, fma(q, -unit, load(e1 + i * 4)))
    return (sums[0],), seen


@njit(error_model="numpy")
def spread_labels(row, e1, z1, rs, place, times, share, whole):
    """(What the labels sum to, or 0 if none but ``share`` is there, their mean of the logits less the reference), and ``e1``
    less the labels times z1 over their sum. ``whole``: what that sum is taken for, 0 for itself.
    """
    v, given = row[2], (row, rs, place, times, share)
    sums, _ = over_row(target_columns, 0, v, v, given, no_sums(3), ())
    own, weight, mean = total_wide(sums[0]), total_wide(sums[1]), total_wide(sums[2])
    of = whole if whole > 0.0 else weight
    unit = f32(z1 / of) if of > 0.0 else NOTHING
    over_row(subtract_columns, 0, v, v, (e1, v, place, times, share, unit), no_sums(1), ())
    return 0.0 if own == 0.0 else weight, mean


@njit(error_model="numpy")
def label_term(labels, r, student, z1, rs):
    """(Cross-entropy of row r, what ``read.with_label`` writes its gradient from).

    ``labels``: scratch row, or None where the kernel has no label term; addresses of indices and of float32 probabilities, of which
    one is 0; the smoothing, and what the gradient is multiplied by.
    """
    e1, indices, probabilities, smoothing, scale = labels
    return term_of(e1, indices, probabilities, smoothing, scale, r, student, z1, rs)


@njit(error_model="numpy")
def term_of(e1, indices, probabilities, smoothing, scale, r, student, z1, rs):
    if e1 is None:  # which Numba tells, when it compiles, of an argument alone
        return 0.0, None
    v = student[2]
    whole, share = 1.0 - smoothing, f32(smoothing / v)
    none = e1, NOTHING
    log_z = math.log(z1)
    if probabilities != 0:
        place = probabilities + r * v * 4
        weight, mean = spread_labels(student, e1, z1, rs, place, f32(whole), share, 0.0)
        if weight == 0.0:  # no label
            return 0.0, none
        return weight * log_z - mean, (e1, f32(scale * weight / z1))
    y = i64_at(indices)[r]
    if y == NO_LABEL:
        return 0.0, none
    if y < 0 or y >= v:
        return OUT_OF_RANGE, none
    x = logit(student, y)
    loss = log_z - whole * (x - rs if x >= FLOOR else -np.inf)
    if smoothing > 0.0:
        _, mean = spread_labels(student, e1, z1, rs, e1, NOTHING, share, 1.0)
        loss -= mean
    plain = f32_at(e1)
    plain[y] = f32(plain[y] - whole * z1)
    return loss, (e1, f32(scale / z1))
