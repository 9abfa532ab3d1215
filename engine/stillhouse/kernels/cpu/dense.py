"""Entry points of the CPU kernel for dense teachers: rows of a call, until none is left."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import numpy as np
from numba import njit

from stillhouse.kernels.cpu.arithmetic import (
    bool_at,
    f32,
    f32_at,
    f64_at,
    fetch_add,
    i64_at,
    reduce_add_wide,
)
from stillhouse.kernels.cpu.build import (
    DONE,
    FLOATS,
    HEADER,
    LOSS,
    NEXT,
    PART,
    ROWS,
    SCRATCH,
    SIZE,
    THREADS,
    TOTAL,
)
from stillhouse.kernels.cpu.read import LOG2E, zero
from stillhouse.kernels.cpu.rows import dense_row


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


@njit
def add_up(call, losses, term):
    """The sum of a term's losses, in the order of the rows."""
    loss = f32_at(losses + term * i64_at(call)[ROWS] * 4)
    whole = 0.0
    for r in range(i64_at(call)[ROWS]):
        whole = reduce_add_wide(whole, np.float64(loss[r]))
    f64_at(call)[TOTAL + term] = whole
    if i64_at(call)[LOSS] != 0:
        f32_at(i64_at(call)[LOSS])[term] = f32(whole)


@njit(error_model="numpy")
def leave_rows(call, count, losses, terms):
    """So many rows are done; who finishes the last ones adds up the losses of all."""
    rows = i64_at(call)[ROWS]
    if count > 0 and fetch_add(call + 8 * DONE, count) + count == rows:
        for term in range(terms):
            add_up(call, losses, term)


@njit
def label_scratch(labelled, address):
    """The part of the scratch for the label term, or None where the kernel has none."""
    if labelled is None:
        return None
    return address


@njit(error_model="numpy", forceinline=True)
def rows_of(call, labelled):
    """Addresses, 0 for no mask or no gradient; strides in bytes."""
    scratch, rows = own_scratch(call), i64_at(call)[ROWS]
    q = i64_at(call + 8 * HEADER)
    divergence, student, teacher, gradient, losses, mask, student_stride, teacher_stride = (
        q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7],
    )  # fmt: skip
    dtype, teacher_dtype, vs, vt, v, wide, stride, series = (
        q[8], q[9], q[10], q[11], q[12], q[13], q[14], q[15],
    )  # fmt: skip
    d = f64_at(call + 8 * FLOATS)
    inverse_t, scale, beta, loss_scale = d[0], d[1], d[2], d[3]  # T^2 is in both scales
    labels = q[16], q[17], d[5], d[6]
    k = f32(inverse_t * LOG2E)
    power = f32(inverse_t), k, f32(np.float64(f32(inverse_t)) * LOG2E - np.float64(k))
    parts = scratch, scratch + stride, scratch + 2 * stride
    e1 = label_scratch(labelled, scratch + 3 * stride)
    loss = f32_at(losses)
    keep = bool_at(mask)
    item = 4 if dtype == 0 else 2
    terms = 1 if labelled is None else 2
    first, last = take_rows(call)
    while first < rows:
        for r in range(first, last):
            out = gradient + r * wide * item if gradient != 0 else gradient
            of_labels = 0.0
            if mask != 0 and keep[r] == 0:
                of_teacher = 0.0
                if out != 0:
                    zero(out, dtype, 0, wide)
            else:
                row = student + r * student_stride, teacher + r * teacher_stride, dtype, teacher_dtype, out
                of_teacher, of_labels = dense_row(
                    (divergence, beta, series), row, (vs, vt, v, wide), power, f32(scale * inverse_t), parts,
                    e1, labels, r,
                )  # fmt: skip
            loss[r] = f32(loss_scale * of_teacher)
            if labelled is not None:
                loss[rows + r] = f32(d[7] * of_labels)
        leave_rows(call, last - first, losses, terms)
        first, last = take_rows(call)


def dense(call):
    """Rows of a call against a teacher's logits."""
    rows_of(call, None)


def dense_labels(call):
    """The same with a label term."""
    rows_of(call, 1)
