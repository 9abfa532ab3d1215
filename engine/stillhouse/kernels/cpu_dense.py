"""Entry point of the CPU kernel for dense teachers: rows of a call, until none is left."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import numpy as np
from numba import njit

from stillhouse.kernels.cpu_jit import DONE, HEADER, LOSS, NEXT, PART, ROWS, SCRATCH, SIZE, THREADS, TOTAL
from stillhouse.kernels.cpu_math import bool_at, f32, f32_at, f64_at, fetch_add, i64_at, reduce_add_wide
from stillhouse.kernels.cpu_read import LOG2E, zero
from stillhouse.kernels.cpu_rows import dense_row


@njit
def own_scratch(call):
    """This thread's part of the scratch."""
    q = i64_at(call)
    return q[SCRATCH] + fetch_add(call + 8 * PART, 1) * q[SIZE]


@njit
def beginning(share, rows, threads):
    """The first row of a share: each is the (2 threads)-th part of what the ones before leave; one thread takes all."""
    left = (1.0 - 0.5 / threads) ** share if threads > 1 else 1.0 - min(share, 1)
    return rows - np.int64(rows * left)


@njit
def take_rows(call):
    """(First, last) of the rows that this thread takes next: a part of what is left, so that all threads end together.

    Few and long ones, since the first row of each waits for memory that nobody has asked for ahead. None are left when
    the first is not below the number of rows; a share may also have none.
    """
    q = i64_at(call)
    share = fetch_add(call + 8 * NEXT, 1)
    return beginning(share, q[ROWS], q[THREADS]), beginning(share + 1, q[ROWS], q[THREADS])


@njit(error_model="numpy")
def leave_rows(call, count, losses):
    """So many rows are done; who finishes the last ones adds up the losses of all, in the order of the rows."""
    q = i64_at(call)
    rows = q[ROWS]
    if count > 0 and fetch_add(call + 8 * DONE, count) + count == rows:
        loss = f32_at(losses)
        whole = 0.0
        for r in range(rows):
            whole = reduce_add_wide(whole, np.float64(loss[r]))
        f64_at(call)[TOTAL] = whole
        if q[LOSS] != 0:
            f32_at(q[LOSS])[0] = f32(whole)


def dense_rows(call):
    """Rows of a call until none is left; addresses, 0 for no mask or no gradient; strides in bytes."""
    scratch, rows = own_scratch(call), i64_at(call)[ROWS]
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
    keep = bool_at(mask)
    item = 4 if dtype == 0 else 2
    first, last = take_rows(call)
    while first < rows:
        for r in range(first, last):
            out = gradient + r * wide * item if gradient != 0 else gradient
            if mask != 0 and keep[r] == 0:
                loss[r] = f32(0.0)
                if out != 0:
                    zero(out, dtype, 0, wide)
                continue
            loss[r] = loss_scale * dense_row(
                divergence, student + r * student_stride, teacher + r * teacher_stride, out, dtype,
                teacher_dtype, dtype, vs, vt, v, wide, it, k, f32(scale * inverse_t), beta, series,
                scratch, scratch_stride,
            )  # fmt: skip
        leave_rows(call, last - first, losses)
        first, last = take_rows(call)
