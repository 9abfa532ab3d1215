"""The one loop of the CPU kernels over the columns of a row, sixteen at a time, and how it adds up.

Sums are of float32 over ``CHUNK`` columns and go on in float64. Equal numbers round alike, so that what thousands of them
are off by does not average out.
"""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import pack_array

from stillhouse.kernels.cpu.lanes import DOUBLES, LANES, lanes, typed, wide_lanes

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


def _zeros(builder: Any, kind: Any) -> Any:
    return ir.Constant(ir.ArrayType(kind.dtype.held, kind.count), None)


def _added(builder: Any, kind: Any, *of: Any) -> Any:
    each = [[builder.extract_value(x, n) for x in of] for n in range(kind.count)]
    return pack_array(builder, [builder.fadd(a, builder.fpext(b, DOUBLES)) for a, b in each])


def _no_sums(count: Any) -> Any:
    return (
        types.UniTuple(wide_lanes, count.literal_value)(count)
        if isinstance(count, types.IntegerLiteral)
        else None
    )


no_sums = typed(
    1, _no_sums, lambda b, signature, _: _zeros(b, signature.return_type)
)  # so many, of lanes in float64
_nothing = typed(  # as many lanes of zeros
    1,
    lambda sums: types.UniTuple(lanes, sums.count)(sums),
    lambda b, signature, _: _zeros(b, signature.return_type),
)
added = typed(
    2, lambda sums, part: sums(sums, part), lambda b, signature, *of: _added(b, signature.return_type, *of)
)
