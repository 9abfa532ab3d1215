"""What a top-k teacher is compared with: the k entries, and everything outside of them as one outcome more."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import math

import numpy as np
from numba import njit

from stillhouse.kernels.cpu_lanes import LANES, store, where
from stillhouse.kernels.cpu_math import (
    FLOOR,
    LEAST,
    absolute,
    decode_bf16,
    decode_f16,
    exp2_of_product,
    exp_wide,
    f32,
    f32_at,
    fma_wide,
    maximum_of,
    reduce_add_wide,
    u16_at,
)
from stillhouse.kernels.cpu_read import LOG2E, take
from stillhouse.kernels.cpu_rows import FORWARD, REVERSE

LITTLE = 1e-20  # of a row: below, exponentials of float32 relative to the row's maximum are not all there


@njit
def logit(address, dtype, j):
    if dtype == 0:
        return np.float64(f32_at(address)[j])
    bits = u16_at(address)[j]
    return np.float64(decode_bf16(bits)) if dtype == 1 else np.float64(decode_f16(bits))


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
def teacher_probabilities(values, pt_at, k, power, top_t, mass):
    """Of the k entries: their logarithms are ``power`` times what the values are relative to ``top_t``, less that of ``mass``."""
    wide_k = power * LOG2E
    narrow_k = f32(wide_k)
    least = LEAST / narrow_k
    for i in range(0, k, LANES):
        b = take(values, 0, i, k, False) - f32(top_t)
        b = where(b < least, least, b)
        p = exp2_of_product(b, narrow_k, f32(wide_k - np.float64(narrow_k)))
        store(pt_at + i * 4, p * f32(1.0 / mass))


@njit(error_model="numpy", forceinline=True)
def compare(logits, values, x, k, rs, it, log_z, power, top_t, mass):
    """Writes x = log(student / teacher) of the k entries; the largest of |x|. The teacher's as in :func:`teacher_probabilities`."""
    log_t = f32_at(values)
    constant = (0.0 if mass == 1.0 else math.log(mass)) - log_z
    far = f32(0.0)
    if all_possible(logits, log_t, k):
        for i in range(k):
            d = f32(logarithm(logits[i], log_t[i], rs, it, power, top_t, constant))
            x[i] = d
            far = maximum_of(far, absolute(d))
        return far
    for i in range(k):
        no_s = logits[i] < FLOOR
        no_t = log_t[i] < FLOOR
        a = FLOOR if no_s else logits[i]
        b = FLOOR if no_t else log_t[i]
        d = f32(logarithm(a, b, rs, it, power, top_t, constant))
        d = (f32(0.0) if no_t else FLOOR) if no_s else (-FLOOR if no_t else d)
        x[i] = d
        far = maximum_of(far, absolute(d))
    return far


@njit(forceinline=True)
def logarithm(a, b, rs, it, power, top_t, constant):
    """Log(student / teacher) of one entry, in float64: where both are nearly equal, little is left of it."""
    return fma_wide(np.float64(a) - rs, it, fma_wide(top_t - np.float64(b), power, constant))


@njit
def all_possible(logits, log_t, k):
    """Does no entry have probability zero? Nearly always, and then nothing needs to be asked of each."""
    zero = False
    for i in range(k):
        zero |= (logits[i] < FLOOR) | (log_t[i] < FLOOR)
    return not zero


@njit(error_model="numpy")
def lift_rest(student, dtype, v, indices, k, rs, it, es):
    """Exponentials of all but the k entries, relative to the largest of them: (their sum, its logarithm to ``rs``).

    For a rest so small that relative to the row's maximum it is nothing in float32, or has lost a part.
    """
    for i in range(k):
        es[indices[i]] = f32(-1.0)
    highest = -np.inf
    for j in range(v):
        x = logit(student, dtype, j)
        if es[j] >= f32(0.0) and x > highest:
            highest = x
    rest = 0.0
    for j in range(v):
        p = 0.0
        if es[j] >= f32(0.0) and highest >= FLOOR:
            p = math.exp((logit(student, dtype, j) - highest) * it)
        rest += p
        es[j] = f32(p)
    return rest, (highest - rs) * it if rest > 0.0 else 0.0


@njit(error_model="numpy")
def ghost_of_student(rest, z, log_z, student, dtype, v, indices, k, rs, it, es):
    """(Sum of the exponentials that are its own, logarithm of its mass, its mass)."""
    if k == v:
        return rest, -np.inf, 0.0
    if rest >= LITTLE * z:
        return rest, math.log(rest) - log_z, rest / z
    rest, lower = lift_rest(student, dtype, v, indices, k, rs, it, es)
    log_mass = math.log(rest) + lower - log_z if rest > 0.0 else -np.inf
    return rest, log_mass, math.exp(log_mass)


@njit(error_model="numpy")
def ghost_of_teacher(log_rest, log_t, k, v):
    """(Logarithm of its mass, its mass)."""
    if k == v or log_rest < FLOOR:
        return -np.inf, 0.0
    if not math.isnan(log_rest):
        return log_rest, math.exp(log_rest)
    mass = max(1.0 - mass_of(log_t, k, 1.0, 0.0), 0.0)
    return math.log(mass) if mass > 0.0 else -np.inf, mass
