"""The one loop of the CPU kernels over the columns of a row, sixteen at a time, and how it adds up.

Sums are of float32 over ``CHUNK`` columns and go on in float64. Equal numbers round alike, so that what thousands of them
are off by does not average out.
"""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from stillhouse.kernels.cpu.lanes import DOUBLES, LANES, VECTOR, lanes, wide_lanes

CHUNK = 8 * LANES  # columns that are summed in float32, before float64 goes on


@njit(error_model="numpy", forceinline=True)
def over(columns, first, last, given, sums, seen, full):
    """Columns ``first`` to ``last``: (sums, what was seen).

    ``columns(i, given, part, seen, full)`` does sixteen, from ``i`` on, and gives back ``part``, a tuple of lanes to be
    summed, with theirs added, and ``seen``, which goes from one to the next as it is. ``full`` tells it, when it is
    compiled, that memory holds all sixteen; of a scratch row it does, since that is padded.
    """
    for j in range(first, last, CHUNK):
        part = _nothing(sums)
        for i in range(j, min(j + CHUNK, last), LANES):
            part, seen = columns(i, given, part, seen, full)
        sums = added(sums, part)
    return sums, seen


@njit(error_model="numpy", forceinline=True)
def over_row(columns, first, last, width, given, sums, seen):
    """The same of a row that ends at ``width``: where it is asked for in each step, a loop takes a twentieth longer."""
    whole = first + max(min(last, width) - first, 0) // LANES * LANES
    sums, seen = over(columns, first, whole, given, sums, seen, True)
    return over(columns, whole, last, given, sums, seen, False)


@intrinsic  # type: ignore[untyped-decorator]
def no_sums(typingctx: Any, count: Any) -> Any:
    """``count`` sums of lanes in float64, all zero; a literal number."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    kind = types.UniTuple(wide_lanes, count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = ir.Constant(DOUBLES, [0.0] * LANES)
        return context.make_tuple(builder, kind, [zero] * kind.count)

    return kind(count), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _nothing(typingctx: Any, sums: Any) -> Any:
    """As many lanes of zeros."""
    kind = types.UniTuple(lanes, sums.count)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_tuple(builder, kind, [ir.Constant(VECTOR, [0.0] * LANES)] * kind.count)

    return kind(sums), codegen


@intrinsic  # type: ignore[untyped-decorator]
def added(typingctx: Any, sums: Any, part: Any) -> Any:
    """Each sum and its part."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        each = [
            builder.fadd(
                builder.extract_value(args[0], n), builder.fpext(builder.extract_value(args[1], n), DOUBLES)
            )
            for n in range(sums.count)
        ]
        return context.make_tuple(builder, sums, each)

    return sums(sums, part), codegen
