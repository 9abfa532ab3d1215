"""Entry point of the CPU kernel for dense teachers: a range of rows, with no lock held."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from numba import njit

from stillhouse.kernels.cpu_math import bool_at, f32, f32_at
from stillhouse.kernels.cpu_read import LOG2E, zero
from stillhouse.kernels.cpu_rows import dense_row


@njit
def coefficients(address):
    """What series.jsd_series gives."""
    x = f32_at(address)
    return (
        x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9],
        x[10], x[11], x[12], x[13], x[14], x[15], x[16], x[17], x[18], x[19],
    )  # fmt: skip


def dense_rows(
    first, last, divergence, student, teacher, gradient, losses, mask, student_stride, teacher_stride,
    student_dtype, teacher_dtype, vs, vt, v, wide, scratch, scratch_stride, series, inverse_t, scale,
    beta, loss_scale,
):  # fmt: skip
    """Rows first .. last: addresses, 0 for no mask or no gradient; strides in bytes; T^2 is in both scales."""
    it = f32(inverse_t)
    k = f32(inverse_t * LOG2E)
    loss = f32_at(losses)
    terms = coefficients(series)
    keep = bool_at(mask)
    item = 4 if student_dtype == 0 else 2
    for r in range(first, last):
        out = gradient + r * wide * item if gradient != 0 else gradient
        if mask != 0 and keep[r] == 0:
            loss[r] = f32(0.0)
            if out != 0:
                zero(out, student_dtype, 0, wide)
            continue
        loss[r] = loss_scale * dense_row(
            divergence, student + r * student_stride, teacher + r * teacher_stride, out, student_dtype,
            teacher_dtype, student_dtype, vs, vt, v, wide, it, k, f32(scale * inverse_t), f32(beta), terms,
            scratch, scratch_stride,
        )  # fmt: skip
