"""Entry point of the CPU kernel for top-k and sampled teachers: reads the student once, writes the gradient once."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import math

import numpy as np
from numba import njit

from stillhouse.kernels.cpu_jit import compiled
from stillhouse.kernels.cpu_math import (
    FLOOR,
    bool_at,
    decode_bf16,
    decode_f16,
    exp2,
    f32,
    f32_at,
    i64_at,
    reduce_add,
    reduce_max,
    u16_at,
)
from stillhouse.kernels.cpu_rows import (
    BLOCK,
    FORWARD,
    LOG2E,
    REVERSE,
    ROOM,
    block,
    maximum,
    reference_of,
    rescale,
    store,
    zero,
)

OUT_OF_RANGE = -np.inf  # the loss that reports an index outside the row
SIGNATURE = "void(" + "int64, " * 16 + "float64, float64, float64)"


@njit(error_model="numpy")
def student_exponentials(s, es, n, rs, k):
    """Pass A for a student alone."""
    zs = f32(0.0)
    top = FLOOR
    for i in range(n):
        a = s[i] - rs
        x = exp2(a * k)
        es[i] = x
        zs = reduce_add(zs, x)
        top = reduce_max(top, a)
    return zs, top


@njit(error_model="numpy")
def student_pass(sa, sd, vs, k, es_at, buffer):
    """Fill the scratch row with exponentials of the student; (their sum, the logit that they refer to)."""
    z = 0.0
    rs = reference_of(sa, sd, vs, vs, buffer)
    for j in range(0, vs, BLOCK):
        n = min(BLOCK, vs - j)
        s = f32_at(block(sa, sd, j, n, vs, buffer))
        part, top = student_exponentials(s, f32_at(es_at + j * 4), n, rs, k)
        if top * k > ROOM:
            up = maximum(s, n) - rs
            z *= rescale(f32_at(es_at), j, up * k)
            rs += up
            part, top = student_exponentials(s, f32_at(es_at + j * 4), n, rs, k)
        z += part
    return z, rs


@njit(error_model="numpy")
def scaled_row(out, gd, vs, es_at, factor, buffer):
    """The scratch row times ``factor`` to ``out``."""
    for j in range(0, vs, BLOCK):
        n = min(BLOCK, vs - j)
        es = f32_at(es_at + j * 4)
        place = out + j * 4 if gd == 0 else buffer
        g = f32_at(place)
        for i in range(n):
            g[i] = es[i] * factor
        if gd != 0:
            store(out, gd, j, n, buffer)


@njit(error_model="numpy")
def row_sum(es_at, vs):
    total = 0.0
    for j in range(0, vs, BLOCK):
        es = f32_at(es_at + j * 4)
        part = f32(0.0)
        for i in range(min(BLOCK, vs - j)):
            part = reduce_add(part, es[i])
        total += part
    return total

@njit
def logit(address, dtype, j):
    if dtype == 0:
        return np.float64(f32_at(address)[j])
    bits = u16_at(address)[j]
    return np.float64(decode_bf16(bits)) if dtype == 1 else np.float64(decode_f16(bits))


@njit
def term(log_p, log_q):
    """One outcome of KL(p || q) in Bregman form, p (log p - log q) - p + q."""
    q = math.exp(log_q)
    if log_p == -np.inf:
        return q
    x = log_q - log_p
    return math.exp(log_p) * (math.expm1(x) - x) if x < 1.0 else q + math.exp(log_p) * (-1.0 - x)


@njit
def outcome(divergence, beta, log_s, log_t):
    """(loss, d): one outcome's part of the loss; the gradient of log s's entry is exp(log_s) (d - mean d)."""
    if divergence == FORWARD:
        ratio = math.exp(log_t - log_s) if log_t > -np.inf and log_s > -np.inf else 0.0
        return term(log_t, log_s), -ratio
    if log_s == -np.inf:
        return (term(log_s, log_t), 0.0) if divergence == REVERSE else (-beta * math.exp(log_t) * math.log(beta), 0.0)
    if divergence == REVERSE:
        return term(log_s, log_t), log_s - log_t
    s = math.exp(log_s)
    t = math.exp(log_t)
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
def top_k_row(divergence, student, out, dtype, v, wide_indices, values, k, ghost, it, scale, beta, scratch, es_at):
    es = f32_at(es_at)
    coefficients = f32_at(es_at + v * 4)
    indices = i64_at(wide_indices)
    log_t = f32_at(values)
    z, rs = student_pass(student, dtype, v, f32(it * LOG2E), es_at, scratch)
    if not (z > 0.0 and z < np.inf):
        return np.nan
    kept = 0.0
    mass = 0.0
    for i in range(k):
        j = indices[i]
        if j < 0 or j >= v:
            return OUT_OF_RANGE
        kept += es[j]
        es[j] = f32(0.0)
        mass += math.exp(log_t[i])
    rest = row_sum(es_at, v)
    z = kept + rest
    log_z = math.log(z)
    log_ghost_s = math.log(rest / z) if rest > 0.0 and k < v else -np.inf
    log_ghost_t = math.log(1.0 - mass) if ghost != 0 and k < v and mass < 1.0 else -np.inf
    loss, d_ghost = outcome(divergence, beta, log_ghost_s, log_ghost_t)
    mean = math.exp(log_ghost_s) * d_ghost if rest > 0.0 and k < v else 0.0
    for i in range(k):
        log_s = (logit(student, dtype, indices[i]) - rs) * it - log_z
        if divergence == FORWARD:  # as outcome() has it, but for two exponentials an entry: k of them add up
            p = math.exp(np.float64(log_t[i]))
            x = log_s - log_t[i]
            gap = p * math.expm1(x) if p > 0.0 and x < 1.0 else math.exp(log_s) - p
            loss += gap - p * x if p > 0.0 else gap
            coefficients[i] = f32(gap * scale)
            continue
        part, d = outcome(divergence, beta, log_s, np.float64(log_t[i]))
        loss += part
        mean += math.exp(log_s) * d
    if out == 0:
        return loss
    if divergence == REVERSE and loss == np.inf:
        zero(out, dtype, 0, v)
        return loss
    if divergence != FORWARD:
        for i in range(k):
            log_s = (logit(student, dtype, indices[i]) - rs) * it - log_z
            part, d = outcome(divergence, beta, log_s, np.float64(log_t[i]))
            coefficients[i] = f32(math.exp(log_s) * (d - mean) * scale)
    alpha = 1.0 + d_ghost if divergence == FORWARD else d_ghost - mean
    scaled_row(out, dtype, v, es_at, f32(alpha / z * scale), scratch)
    for i in range(k):
        store(out, dtype, indices[i], 1, es_at + (v + i) * 4)
    return loss


@njit(error_model="numpy")
def sampled_row(student, out, dtype, v, wide_indices, values, k, it, scale, scratch, es_at):
    es = f32_at(es_at)
    indices = i64_at(wide_indices)
    weights = f32_at(values)
    z, rs = student_pass(student, dtype, v, f32(it * LOG2E), es_at, scratch)
    if not (z > 0.0 and z < np.inf):
        return np.nan
    log_z = math.log(z)
    loss = 0.0
    total = 0.0
    for i in range(k):
        j = indices[i]
        if j < 0 or j >= v:
            return OUT_OF_RANGE
        if weights[i] > f32(0.0):
            loss -= weights[i] * ((logit(student, dtype, j) - rs) * it - log_z)
            total += weights[i]
    if out != 0:
        for i in range(k):  # in the scratch, where a repeated index adds up in float32
            es[indices[i]] -= f32(weights[i] * z / total) if total > 0.0 else f32(0.0)
        scaled_row(out, dtype, v, es_at, f32(total / z * scale), scratch)
    return loss


def _factory(source: str):
    def sparse_rows(
        first, last, divergence, student, gradient, losses, mask, student_stride, dtype, v, indices, values, k,
        sampled, ghost, scratch, inverse_t, scale, beta,
    ):  # fmt: skip
        """Rows first .. last: addresses, 0 for no mask or no gradient; strides in bytes; losses before T^2."""
        source  # noqa: B018 closed over for the cache's key
        loss = f32_at(losses)
        keep = bool_at(mask)
        item = 4 if dtype == 0 else 2
        es_at = scratch + 2 * BLOCK * 4
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
            if sampled != 0:
                loss[r] = sampled_row(
                    row, out, dtype, v, place, value, k, inverse_t, scale * inverse_t, scratch, es_at
                )
            else:
                loss[r] = top_k_row(
                    divergence, row, out, dtype, v, place, value, k, ghost, inverse_t, scale * inverse_t, beta,
                    scratch, es_at,
                )  # fmt: skip

    return sparse_rows


sparse_rows = compiled(SIGNATURE, _factory)
