"""Entry points of the CPU kernel for dense teachers."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import numpy as np
from numba import njit

from stillhouse.kernels.cpu.arithmetic import f32
from stillhouse.kernels.cpu.calls import (
    BETA,
    DIVERGENCE,
    DTYPE,
    INVERSE_T,
    LABEL_SCALE,
    LABELS,
    OTHERS,
    PROBABILITIES,
    SCALE,
    SERIES,
    SMOOTHING,
    STRIDE,
    STUDENT,
    WIDTH,
    run_rows,
)
from stillhouse.kernels.cpu.read import LOG2E
from stillhouse.kernels.cpu.rows import dense_row


@njit(error_model="numpy", forceinline=True)
def row_of(q, d, r, out, scratch, e1):
    """Of a call whose other integers are the teacher, its stride and dtype, vs, vt, v, and bytes of a part of the scratch."""
    teacher, teacher_stride, teacher_dtype, vs, vt, v, part = (
        q[OTHERS], q[OTHERS + 1], q[OTHERS + 2], q[OTHERS + 3], q[OTHERS + 4], q[OTHERS + 5], q[OTHERS + 6],
    )  # fmt: skip
    it = d[INVERSE_T]
    k = f32(it * LOG2E)
    power = f32(it), k, f32(np.float64(f32(it)) * LOG2E - np.float64(k))
    row = q[STUDENT] + r * q[STRIDE], teacher + r * teacher_stride, q[DTYPE], teacher_dtype, out
    labels = q[LABELS], q[PROBABILITIES], d[SMOOTHING], d[LABEL_SCALE]
    parts = scratch, scratch + part, scratch + 2 * part
    return dense_row(
        (q[DIVERGENCE], d[BETA], q[SERIES]), row, (vs, vt, v, q[WIDTH]), power, f32(d[SCALE] * it), parts, e1, labels, r
    )  # fmt: skip


def dense(call):
    """Rows of a call against a teacher's logits."""
    run_rows(call, None, row_of)


def dense_labels(call):
    """The same with a label term."""
    run_rows(call, 1, row_of)
