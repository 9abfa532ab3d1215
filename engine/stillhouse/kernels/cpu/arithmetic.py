"""What Numba lacks for the CPU rows: pointers, fused multiply-add, reductions that may be reordered, exponentials.

What is made by ``floats`` takes a float32 or lanes of them, and so do the polynomials. No fastmath flag is used: it
would let LLVM assume that infinities do not occur, and undo the rounding trick in ``exp2_of_product``. A sum whose order
does not matter says so itself (``reduce_add_wide``).
"""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from stillhouse.kernels import series
from stillhouse.kernels.cpu.lanes import (
    ADDRESS,
    DOUBLE,
    F32,
    F64,
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    VECTOR,
    call,
    constant,
    convert,
    decode_bf16_bits,
    decode_f16_bits,
    encode_bf16_bits,
    encode_f16_bits,
    fixed,
    floats,
    function,
    splat,
    typed,
    where,
)

f32 = np.float32
FLOOR = f32(-1e30)  # stands for -inf where arithmetic on -inf would give NaN


def _pointer(element: Any, llvm: Any) -> Any:
    return fixed(types.CPointer(element)(ADDRESS), lambda builder, x: builder.inttoptr(x, llvm.as_pointer()))


f32_at = _pointer(types.float32, FLOAT)
u16_at = _pointer(types.uint16, I16)
byte_at = _pointer(types.uint8, I8)
i64_at = _pointer(types.int64, I64)
f64_at = _pointer(types.float64, DOUBLE)


def numbers_at(count: int) -> Any:
    """What gives so many float32 from an address on, as a tuple."""
    pointer = ir.ArrayType(FLOAT, count).as_pointer()
    return fixed(types.UniTuple(F32, count)(ADDRESS), lambda b, x: b.load(b.inttoptr(x, pointer), align=4))


decode_bf16, encode_bf16 = (
    fixed(F32(types.uint16), decode_bf16_bits),
    fixed(types.uint16(F32), encode_bf16_bits),
)
decode_f16, encode_f16 = fixed(F32(types.uint16), decode_f16_bits), fixed(types.uint16(F32), encode_f16_bits)


def _fetch_add(builder: Any, address: Any, value: Any) -> Any:
    return builder.atomic_rmw("add", builder.inttoptr(address, I64.as_pointer()), value, "acq_rel")


# ``fetch_add(address, value)`` adds to an int64 in memory, as one step for all threads, and gives what it was before. Whoever
# adds also sees all that a thread had written before it added ("acq_rel")
fetch_add = fixed(types.int64(ADDRESS, types.int64), _fetch_add)


def _prefetch(to_write: int) -> Any:
    """Ask for the cache line of an address, soon to be used. Any address will do: one that is not mapped is no fault."""

    def emit(builder: Any, address: Any) -> None:
        pointer = builder.inttoptr(address, I8.as_pointer())
        called = function(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer.type, I32, I32, I32])
        builder.call(called, [pointer, I32(to_write), I32(3), I32(1)])  # into all caches, data

    return fixed(types.void(ADDRESS), emit)


prefetch, prefetch_to_write = _prefetch(0), _prefetch(1)


fma = floats(3, call("llvm.fma"))
absolute = floats(1, call("llvm.fabs"))
maximum_of = floats(2, call("llvm.maxnum", fastmath=("nnan", "nsz")))
minimum_of = floats(2, call("llvm.minnum", fastmath=("nnan", "nsz")))


def _shifted(builder: Any, x: Any) -> Any:
    bits = convert(builder, "bitcast", x, I32)
    return convert(builder, "bitcast", builder.shl(bits, constant(I32, 23, bits)), FLOAT)


shifted = floats(1, _shifted)  # 2^n, where n is the low mantissa bits of a float that had MAGIC added
MAGIC = f32(1.5 * 2**23 + 127)
LEAST = f32(-126.0)  # of a normal float32's exponents: what has a smaller one counts as zero
LEAST_MASS = f32(2.0**-126)  # what divides a probability, where that may be zero
# |log(p/q)| below which a KL's term is summed as a series, because its closed form cancels
NEAR = f32(series.RADIUS)


def _horner(builder: Any, signature: Any, x: Any, coefficients: Any) -> Any:
    vector = x.type == VECTOR
    each = [builder.extract_value(coefficients, n) for n in range(signature.args[1].count)]
    each = [splat(builder, c) for c in each] if vector else each
    p = each.pop()
    while each:
        p = call("llvm.fma")(builder, p, x, each.pop())
    return p


# ``polynomial(x, coefficients)`` of lanes, float32 or float64; a tuple of numbers, lowest power first
polynomial = typed(2, lambda x, of: x(x, of), _horner)
PHI = tuple(f32(c) for c in series.PHI)  # of (exp(x) - 1 - x) / x^2 for |x| < NEAR
SHARE = tuple(f32(c) for c in series.LOG1P_BY_SHARE)
EXP2 = tuple(  # of 2^x for |x| <= 1/2: minimax
    f32(c)
    for c in (1.0, 0.693147188029, 0.240226510842, 0.0555035710549, 0.00961803077074, 0.00133908668598, 0.000154697351565)
)  # fmt: skip

# of float64
reduce_add_wide = fixed(F64(F64, F64), lambda builder, *x: builder.fadd(*x, flags=("reassoc", "nsz")))
shifted_wide = fixed(F64(F64), lambda b, x: b.bitcast(b.shl(b.bitcast(x, I64), ir.Constant(I64, 52)), DOUBLE))
MAGIC_WIDE = 1.5 * 2**52 + 1023
TAYLOR = tuple(1 / math.factorial(n) for n in range(12))  # of exp(x) for |x| <= 0.35: 0.35^12 / 12! is 7e-15


@njit(forceinline=True)
def exp2_of_product(a, k, k_low, least):
    """2^(a (k + k_low)) of lanes without the rounding of the product, which is that of a large exponent.

    To 9e-8 relative. 0 for a below ``least``, which is LEAST / k.
    """
    biased = fma(a, k, MAGIC)
    x = fma(a, k_low, fma(a, k, MAGIC - biased))
    return where(a < least, f32(0.0), polynomial(x, EXP2) * shifted(biased))


@njit(forceinline=True)
def gap(a, b, offset):
    """A - b - offset with one rounding where offset is near a - b: what rounds off a - b is found and added back.

    0 where both are FLOOR.
    """
    d = a - b
    back = d - a
    return where(a > FLOOR, d - offset, d) + ((a - (d - back)) - (b + back))


@njit(forceinline=True)
def exp_wide(x):
    """exp(x) of a float64 at most 0, to 1e-14 relative, in vector lanes; 0 far below."""
    z = max(x * 1.4426950408889634, -1022.0)
    biased = z + MAGIC_WIDE
    return polynomial((z - (biased - MAGIC_WIDE)) * 0.6931471805599453, TAYLOR) * shifted_wide(biased)
