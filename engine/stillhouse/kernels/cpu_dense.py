"""Entry point of the CPU kernel for dense teachers: rows of a call, until none is left."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

from numba import njit

from stillhouse.kernels.cpu_jit import HEADER, NEXT, PART, ROWS, SCRATCH, SIZE, STEP
from stillhouse.kernels.cpu_math import bool_at, f32, f32_at, f64_at, fetch_add, i64_at
from stillhouse.kernels.cpu_read import LOG2E, zero
from stillhouse.kernels.cpu_rows import dense_row


@njit
def coefficients(address):
    """What series.jsd_series gives."""
    x = f32_at(address)
    return (
        x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9],
        x[10], x[11], x[12], x[13], x[14], x[15], x[16], x[17], x[18],
    )  # fmt: skip


@njit
def begin(call):
    """This thread's part of the scratch, and the first row that it takes."""
    q = i64_at(call)
    part = fetch_add(call + 8 * PART, 1)
    return q[SCRATCH] + part * q[SIZE], fetch_add(call + 8 * NEXT, q[STEP])


def dense_rows(call):
    """Rows of a call until none is left; addresses, 0 for no mask or no gradient; strides in bytes."""
    scratch, first = begin(call)
    header = i64_at(call)
    rows, step = header[ROWS], header[STEP]
    q = i64_at(call + 8 * HEADER)
    divergence, student, teacher, gradient, losses, mask, student_stride, teacher_stride = (
        q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7],
    )  # fmt: skip
    dtype, teacher_dtype, vs, vt, v, wide, scratch_stride, series = (
        q[8], q[9], q[10], q[11], q[12], q[13], q[14], q[15],
    )  # fmt: skip
    d = f64_at(call + 8 * (HEADER + 16))
    inverse_t, scale, beta, loss_scale = d[0], d[1], d[2], d[3]  # T^2 is in both scales
    it = f32(inverse_t)
    k = f32(inverse_t * LOG2E)
    loss = f32_at(losses)
    terms = coefficients(series)
    keep = bool_at(mask)
    item = 4 if dtype == 0 else 2
    while first < rows:
        for r in range(first, min(first + step, rows)):
            out = gradient + r * wide * item if gradient != 0 else gradient
            if mask != 0 and keep[r] == 0:
                loss[r] = f32(0.0)
                if out != 0:
                    zero(out, dtype, 0, wide)
                continue
            loss[r] = loss_scale * dense_row(
                divergence, student + r * student_stride, teacher + r * teacher_stride, out, dtype,
                teacher_dtype, dtype, vs, vt, v, wide, it, k, f32(scale * inverse_t), beta, terms,
                scratch, scratch_stride,
            )  # fmt: skip
        first = fetch_add(call + 8 * NEXT, step)
