"""What Numba lacks for the CPU rows: pointers, fused multiply-add, reductions that may be reordered, exp2, log.

What is made by ``floats`` takes a float32 or lanes of them, and so do the polynomials. No fastmath flag is used: it
would let LLVM assume that infinities do not occur, and undo the rounding trick in ``exp2``. A sum whose order
does not matter says so itself (``reduce_add_wide``).
"""

# mypy: disable-error-code="no-untyped-call,call-arg,var-annotated"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from stillhouse.kernels import series
from stillhouse.kernels.cpu.lanes import (
    F32,
    FLOAT,
    I16,
    I32,
    I64,
    call,
    constant,
    convert,
    decode_bf16_bits,
    decode_f16_bits,
    encode_bf16_bits,
    encode_f16_bits,
    floats,
    function,
    where,
)

f32 = np.float32
FLOOR = f32(-1e30)  # stands for -inf where arithmetic on -inf would give NaN


def _pointer(element: Any, llvm: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def at(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], llvm.as_pointer())

        return types.CPointer(element)(types.int64), codegen

    return at


f32_at = _pointer(types.float32, FLOAT)
u16_at = _pointer(types.uint16, I16)
bool_at = _pointer(types.uint8, ir.IntType(8))
i64_at = _pointer(types.int64, ir.IntType(64))
f64_at = _pointer(types.float64, ir.DoubleType())


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to an int64 in memory, as one step for all threads; what it was before.

    Whoever adds also sees all that a thread had written before it added ("acq_rel").
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


def _prefetch(to_write: int) -> Any:
    """Ask for the cache line of an address, soon to be used. Any address will do: one that is not mapped is no fault."""

    @intrinsic  # type: ignore[untyped-decorator]
    def ask(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
            called = function(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer.type, I32, I32, I32])
            builder.call(called, [pointer, I32(to_write), I32(3), I32(1)])  # into all caches, data

        return types.void(types.int64), codegen

    return ask


prefetch, prefetch_to_write = _prefetch(0), _prefetch(1)


fma = floats(3, call("llvm.fma", 3))
absolute = floats(1, call("llvm.fabs", 1))
maximum_of = floats(2, call("llvm.maxnum", 2, fastmath=("nnan", "nsz")))
minimum_of = floats(2, call("llvm.minnum", 2, fastmath=("nnan", "nsz")))


def _shifted(builder: Any, args: Any) -> Any:
    bits = convert(builder, "bitcast", args[0], I32)
    return convert(builder, "bitcast", builder.shl(bits, constant(I32, 23, bits)), FLOAT)


shifted = floats(1, _shifted)  # 2^n, where n is the low mantissa bits of a float that had MAGIC added
MAGIC = f32(1.5 * 2**23 + 127)
LEAST = f32(-126.0)  # of a normal float32's exponents: what has a smaller one counts as zero
LEAST_MASS = f32(2.0**-126)  # what divides a probability, where that may be zero
PHI = tuple(f32(c) for c in series.PHI)
SHARE = tuple(f32(c) for c in series.LOG1P_BY_SHARE)
NEAR = f32(
    series.RADIUS
)  # |log(p/q)| below which a KL's term is summed as a series, because its closed form cancels


def _doubles(arity: int, emit: Callable[[Any, Any], Any]) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit(builder, args)

    signature = types.float64(*[types.float64] * arity)
    if arity == 1:
        return intrinsic(lambda typingctx, a: (signature, codegen))
    if arity == 2:
        return intrinsic(lambda typingctx, a, b: (signature, codegen))
    return intrinsic(lambda typingctx, a, b, c: (signature, codegen))


reduce_add_wide = _doubles(2, lambda builder, args: builder.fadd(*args, flags=("reassoc", "nsz")))
shifted_wide = _doubles(
    1, lambda b, a: b.bitcast(b.shl(b.bitcast(a[0], I64), ir.Constant(I64, 52)), ir.DoubleType())
)
MAGIC_WIDE = 1.5 * 2**52 + 1023


@njit(forceinline=True)  # type: ignore[untyped-decorator]
def exp2(z):  # type: ignore[no-untyped-def]
    """2^z of lanes to 1e-7 relative; 0 below ``LEAST``, NaN for NaN."""
    biased = z + MAGIC  # rounds to the nearest integer
    return where(z < LEAST, f32(0.0), exp2_of_rest(z - (biased - MAGIC)) * shifted(biased))


@njit(forceinline=True)  # type: ignore[untyped-decorator]
def exp2_of_product(a, k, k_low, least):  # type: ignore[no-untyped-def]
    """2^(a (k + k_low)) of lanes without the rounding of the product, which is that of a large exponent.

    To 9e-8 relative. 0 for a below ``least``, which is LEAST / k.
    """
    biased = fma(a, k, MAGIC)
    x = fma(a, k_low, fma(a, k, MAGIC - biased))
    return where(a < least, f32(0.0), exp2_of_rest(x) * shifted(biased))


@njit(forceinline=True)  # type: ignore[untyped-decorator]
def exp2_of_rest(x):  # type: ignore[no-untyped-def]
    """2^x for |x| <= 1/2. Minimax polynomial."""
    p = fma(f32(0.000154697351565), x, f32(0.00133908668598))
    p = fma(p, x, f32(0.00961803077074))
    p = fma(p, x, f32(0.0555035710549))
    p = fma(p, x, f32(0.240226510842))
    p = fma(p, x, f32(0.693147188029))
    return fma(p, x, f32(1.0))


@njit(forceinline=True)  # type: ignore[untyped-decorator]
def log1p_by_share(u):  # type: ignore[no-untyped-def]
    """log(1 + r) of u = r / (2 + r), for 0 <= r <= 1, to 2.2e-7 relative: twice the inverse hyperbolic tangent of u."""
    v = u * u
    p = fma(SHARE[4], v, SHARE[3])
    p = fma(p, v, SHARE[2])
    p = fma(p, v, SHARE[1])
    return fma(p, v, SHARE[0]) * u


@njit(forceinline=True)  # type: ignore[untyped-decorator]
def phi_over_square(x):  # type: ignore[no-untyped-def]
    """(exp(x) - 1 - x) / x^2 for |x| < NEAR."""
    q = fma(PHI[6], x, PHI[5])
    q = fma(q, x, PHI[4])
    q = fma(q, x, PHI[3])
    q = fma(q, x, PHI[2])
    q = fma(q, x, PHI[1])
    return fma(q, x, PHI[0])


@njit(forceinline=True)  # type: ignore[untyped-decorator]
def gap(a, b, offset):  # type: ignore[no-untyped-def]
    """A - b - offset with one rounding where offset is near a - b: what rounds off a - b is found and added back.

    0 where both are FLOOR.
    """
    d = a - b
    back = d - a
    return where(a > FLOOR, d - offset, d) + ((a - (d - back)) - (b + back))


@njit(forceinline=True)  # type: ignore[untyped-decorator]
def exp_wide(x):  # type: ignore[no-untyped-def]
    """exp(x) of a float64 at most 0, to 1e-14 relative, in vector lanes; 0 far below."""
    z = max(x * 1.4426950408889634, -1022.0)
    biased = z + MAGIC_WIDE
    r = (z - (biased - MAGIC_WIDE)) * 0.6931471805599453
    p = 1.0 + r * (1.0 / 11.0)  # Taylor, written out so that it vectorises: 0.35^12 / 12! is 7e-15
    p = 1.0 + p * (r * 0.1)
    p = 1.0 + p * (r * (1.0 / 9.0))
    p = 1.0 + p * (r * 0.125)
    p = 1.0 + p * (r * (1.0 / 7.0))
    p = 1.0 + p * (r * (1.0 / 6.0))
    p = 1.0 + p * (r * 0.2)
    p = 1.0 + p * (r * 0.25)
    p = 1.0 + p * (r * (1.0 / 3.0))
    p = 1.0 + p * (r * 0.5)
    return (1.0 + p * r) * shifted_wide(biased)


def _scalar(decode: Callable[[Any, Any], Any], encode: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    def decode_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return decode(builder, args[0])

    def encode_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return encode(builder, args[0])

    decoded = intrinsic(lambda typingctx, bits: (F32(types.uint16), decode_codegen))
    encoded = intrinsic(lambda typingctx, value: (types.uint16(F32), encode_codegen))
    return decoded, encoded


decode_bf16, encode_bf16 = _scalar(decode_bf16_bits, encode_bf16_bits)
decode_f16, encode_f16 = _scalar(decode_f16_bits, encode_f16_bits)
