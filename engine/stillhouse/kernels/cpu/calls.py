"""Rows of a call, until none is left: what the entry points of the CPU kernel have in common."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import numpy as np
from numba import njit

from stillhouse.kernels.cpu.arithmetic import byte_at, f32, f32_at, f64_at, fetch_add, i64_at, reduce_add_wide
from stillhouse.kernels.cpu.build import DONE, FLOATS, HEADER, NEXT, PART, ROWS, SCRATCH, SIZE, THREADS, TOTAL
from stillhouse.kernels.cpu.read import bytes_of, zero

# where the numbers of a call are among its integers (addresses are 0 for none, strides and offsets in bytes) and its floats;
# those of either kind of target come last
(
    DIVERGENCE, STUDENT, GRADIENT, LOSSES, MASK, STRIDE, DTYPE, WIDTH, SERIES, LABELS, PROBABILITIES, LABEL_SCRATCH, OTHERS,
) = range(13)  # fmt: skip
INVERSE_T, SCALE, BETA, SQUARE, SMOOTHING, LABEL_SCALE, POWER = range(7)  # T^2 is in the first scale


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
def leave_rows(call, count, losses, terms):
    """So many rows are done; who finishes the last ones adds up the losses of all, in the order of the rows."""
    q = i64_at(call)
    rows = q[ROWS]
    if count > 0 and fetch_add(call + 8 * DONE, count) + count == rows:
        for term in range(terms):
            loss = f32_at(losses + term * rows * 4)
            whole = 0.0
            for r in range(rows):
                whole = reduce_add_wide(whole, np.float64(loss[r]))
            f64_at(call)[TOTAL + term] = whole


@njit
def label_scratch(labelled, address):
    """The part of the scratch for the label term, or None where the kernel has none."""
    if labelled is None:
        return None
    return address


@njit(error_model="numpy", forceinline=True)
def run_rows(call, labelled, row):
    """``row(q, d, r, how, student, out, scale, scratch, labels)`` gives both terms of row r, and the gradient to ``out`` unless that is 0.

    ``q``, ``d``: the call's numbers; ``how``: (divergence, beta, the series for it); ``student``: (its row, dtype, width);
    ``scale``: what the gradient of the first term is multiplied by; ``labels``: see ``labels.label_term``.
    """
    head, rows = i64_at(call), i64_at(call)[ROWS]
    scratch = head[SCRATCH] + fetch_add(call + 8 * PART, 1) * head[SIZE]  # this thread's
    q, d = i64_at(call + 8 * HEADER), f64_at(call + 8 * FLOATS)
    e1 = label_scratch(labelled, scratch + q[LABEL_SCRATCH])
    labels = e1, q[LABELS], q[PROBABILITIES], d[SMOOTHING], d[LABEL_SCALE]
    dtype, width, how, scale = (
        q[DTYPE],
        q[WIDTH],
        (q[DIVERGENCE], d[BETA], q[SERIES]),
        d[SCALE] * d[INVERSE_T],
    )
    loss, keep = f32_at(q[LOSSES]), byte_at(q[MASK])
    terms = 1 if labelled is None else 2
    first, last = take_rows(call)
    while first < rows:
        for r in range(first, last):
            out = q[GRADIENT] + r * width * bytes_of(dtype) if q[GRADIENT] != 0 else 0
            of_teacher, of_labels = 0.0, 0.0
            if q[MASK] == 0 or keep[r] != 0:
                student = q[STUDENT] + r * q[STRIDE], dtype, width
                of_teacher, of_labels = row(q, d, r, how, student, out, scale, scratch, labels)
            elif out != 0:
                zero(out, dtype, 0, width)
            loss[r] = f32(d[SQUARE] * of_teacher)
            if labelled is not None:
                loss[rows + r] = f32(of_labels)
        leave_rows(call, last - first, q[LOSSES], terms)
        first, last = take_rows(call)
