"""What a top-k teacher is compared with: the k entries, and everything outside of them as one outcome more."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import math

import numpy as np
from numba import njit

from stillhouse.kernels.cpu.arithmetic import (
    FLOOR,
    LEAST,
    absolute,
    exp2_of_product,
    exp_wide,
    f32,
    maximum_of,
    reduce_add_wide,
)
from stillhouse.kernels.cpu.dense import FORWARD, REVERSE
from stillhouse.kernels.cpu.labels import logit
from stillhouse.kernels.cpu.lanes import LANES, fill, narrow, scaled_gap, store, top, total_wide, where
from stillhouse.kernels.cpu.loops import added, no_sums
from stillhouse.kernels.cpu.read import LOG2E, take
from stillhouse.kernels.series import LEAST_REST

ABOVE_FLOOR = np.nextafter(FLOOR, f32(0.0))
LITTLE = 1e-20  # of a row: below, exponentials of float32 relative to the row's maximum are not all there


@njit
def term(p, q, x):
    """One outcome of KL(p || q) in Bregman form, p phi(x) with x = log q - log p and phi(x) = exp(x) - 1 - x."""
    if p == 0.0:
        return q
    if abs(x) < 0.01:
        return p * x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120)))
    return q - p - p * x


@njit
def outcome(divergence, beta, log_s, log_t, s, t):
    """(loss, d): one outcome's part of the loss; the gradient of log s's entry is s (d - mean d).

    For FORWARD, whose d may be too large a number, s d in its place.
    """
    if divergence == FORWARD:
        return term(t, s, log_s - log_t), -t
    if log_s == -np.inf:
        return (t, 0.0) if divergence == REVERSE else (-beta * t * math.log(beta), 0.0)
    if divergence == REVERSE:
        return term(s, t, log_t - log_s), log_s - log_t
    if log_t == -np.inf:
        return -(1.0 - beta) * s * math.log(1.0 - beta), -(1.0 - beta) * math.log(1.0 - beta)
    x = log_t - log_s
    to_s = math.log1p(beta * math.expm1(x)) if x < 40.0 else math.log(beta) + x
    to_t = to_s - x if x < 40.0 else math.log(beta)
    if abs(x) < 1.0:
        to_t = math.log1p((1.0 - beta) * math.expm1(-x))
        m = beta * (math.expm1(to_t) - to_t) * t + (1.0 - beta) * (math.expm1(to_s) - to_s) * s
        return m, -(1.0 - beta) * to_s
    return -beta * t * to_t - (1.0 - beta) * s * to_s, -(1.0 - beta) * to_s


@njit(error_model="numpy")
def mass_of(log_t, k, power, top_t):
    """Sum over the k entries, in float64, of exponentials of ``power`` times what they are relative to ``top_t``."""
    mass = 0.0
    for i in range(k):
        b = np.float64(FLOOR if log_t[i] < FLOOR else log_t[i])
        mass = reduce_add_wide(mass, exp_wide((b - top_t) * power))
    return mass


@njit(error_model="numpy")
def normaliser(log_t, k, power):
    """(Largest of the k logarithms, their mass relative to it), the latter NaN where none of them has any."""
    highest = FLOOR
    for i in range(k):
        highest = maximum_of(highest, log_t[i])
    if highest <= FLOOR:
        return 0.0, np.nan
    return np.float64(highest), mass_of(log_t, k, power, np.float64(highest))


@njit(error_model="numpy", forceinline=True)
def entry_exponentials(logs, out, k, power, reference, mass):
    """Of k entries, exp(``power`` times what they are relative to ``reference``) / ``mass``; their sum, all of it in float64.

    0 in the lanes beyond them.
    """
    wide = power * LOG2E
    high = f32(wide)
    low = f32(wide - np.float64(high))
    least = LEAST / high
    sums = no_sums(1)
    for i in range(0, k, LANES):
        a = take(logs, 0, i, k, False) - f32(reference)
        x = exp2_of_product(a, high, low, least) * f32(1.0 / mass)
        store(out + i * 4, x)
        sums = added(sums, (x,))
    return total_wide(sums[0])


@njit(error_model="numpy", forceinline=True)
def compare(logits, log_t, x, k, rs, it, log_z, power, top_t, mass):
    """Writes x = log(student / teacher) of the k entries; the largest of |x|. The teacher's as in :func:`entry_exponentials`."""
    constant = (0.0 if mass == 1.0 else math.log(mass)) - log_z
    far = fill(f32(0.0))
    for i in range(0, k, LANES):
        a = take(logits, 0, i, k, False)
        b = take(log_t, 0, i, k, False)
        # in float64: where both are nearly equal, little is left of it
        d = narrow(scaled_gap(a, rs, it, scaled_gap(b, top_t, -power, constant)))
        # FLOOR itself is what lanes beyond the k entries hold: 0 there. A NaN stays one
        d = where(b < ABOVE_FLOOR, -FLOOR, d)
        d = where(a < ABOVE_FLOOR, where(b < ABOVE_FLOOR, f32(0.0), FLOOR), d)
        store(x + i * 4, d)
        far = maximum_of(far, absolute(d))
    return top(far)


@njit(error_model="numpy")
def lift_rest(student, indices, k, rs, it, es):
    """Exponentials of all but the k entries, relative to the largest of them: (their sum, its logarithm to ``rs``).

    For a rest so small that relative to the row's maximum it is nothing in float32, or has lost a part.
    """
    for i in range(k):
        es[indices[i]] = f32(-1.0)
    highest = -np.inf
    for j in range(student[2]):
        if es[j] >= f32(0.0):
            highest = max(highest, logit(student, j))
    rest = 0.0
    for j in range(student[2]):
        inside = es[j] < f32(0.0) or highest < FLOOR
        es[j] = f32(0.0 if inside else math.exp((logit(student, j) - highest) * it))
        rest += es[j]
    return rest, (highest - rs) * it if rest > 0.0 else 0.0


@njit(error_model="numpy")
def ghost_of_student(rest, z, log_z, student, indices, k, rs, it, es):
    """(Sum of the exponentials that are its own, logarithm of its mass, its mass)."""
    if k == student[2]:
        return rest, -np.inf, 0.0
    if rest >= LITTLE * z:
        return rest, math.log(rest) - log_z, rest / z
    rest, lower = lift_rest(student, indices, k, rs, it, es)
    log_mass = math.log(rest) + lower - log_z if rest > 0.0 else -np.inf
    return rest, log_mass, math.exp(log_mass)


@njit(error_model="numpy")
def ghost_of_teacher(log_rest, log_t, k, v):
    """(Logarithm of its mass, its mass)."""
    if k == v or log_rest < FLOOR:
        return -np.inf, 0.0
    if not math.isnan(log_rest):
        return log_rest, math.exp(log_rest)
    mass = 1.0 - mass_of(log_t, k, 1.0, 0.0)
    return (math.log(mass), mass) if mass > LEAST_REST else (-np.inf, 0.0)
