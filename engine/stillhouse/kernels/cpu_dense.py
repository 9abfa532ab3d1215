"""Entry point of the CPU kernel for dense teachers: a range of rows, with no lock held."""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from stillhouse.kernels.cpu_jit import compiled
from stillhouse.kernels.cpu_math import bool_at, f32, f32_at
from stillhouse.kernels.cpu_read import LOG2E, zero
from stillhouse.kernels.cpu_rows import dense_row

SERIES = 20  # what series.jsd_series gives
SIGNATURE = "void(" + "int64, " * 18 + "float64, " * 3 + f"UniTuple(float32, {SERIES}))"


def _factory(source: str):
    def dense_rows(
        first, last, divergence, student, teacher, gradient, losses, mask, student_stride, teacher_stride,
        student_dtype, teacher_dtype, vs, vt, v, wide, scratch, scratch_stride, inverse_t, scale, beta, series,
    ):  # fmt: skip
        """Rows first .. last: addresses, 0 for no mask or no gradient; strides in bytes; losses before T^2."""
        source  # noqa: B018 closed over for the cache's key
        it = f32(inverse_t)
        k = f32(inverse_t * LOG2E)
        loss = f32_at(losses)
        keep = bool_at(mask)
        item = 4 if student_dtype == 0 else 2
        for r in range(first, last):
            out = gradient + r * wide * item if gradient != 0 else gradient
            if mask != 0 and keep[r] == 0:
                loss[r] = f32(0.0)
                if out != 0:
                    zero(out, student_dtype, 0, wide)
                continue
            loss[r] = dense_row(
                divergence, student + r * student_stride, teacher + r * teacher_stride, out, student_dtype,
                teacher_dtype, student_dtype, vs, vt, v, wide, it, k, f32(scale * inverse_t), f32(beta), series,
                scratch, scratch_stride,
            )  # fmt: skip

    return dense_rows


dense_rows = compiled(SIGNATURE, _factory)
