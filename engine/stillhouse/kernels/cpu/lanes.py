"""Sixteen float32 at a time, as a Numba type: the CPU kernels' loops say themselves what runs in vector lanes.

Left to LLVM's vectoriser, a loop over a row has a scalar remainder, which costs as much as hundreds of columns, and a
scalar version for arrays that lie near each other, which adds up in another order. LLVM lowers these vectors to what
the processor has: one AVX-512 register, two AVX2 registers, four NEON ones. Arithmetic between lanes and a float32
spreads the float32. Addresses are int64.
"""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import config, njit, types
from numba.core.codegen import get_host_cpu_features
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

LANES = 16
F32, F64, ADDRESS = types.float32, types.float64, types.int64
FLOAT, HALF, DOUBLE, I64, I32, I16, I8, I1 = (
    ir.FloatType(), ir.HalfType(), ir.DoubleType(), ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8), ir.IntType(1),
)  # fmt: skip


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
    """What llvmlite has no type for."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
BFLOAT = _BFloat()
VECTOR, INTEGERS, BITS, DOUBLES = (ir.VectorType(element, LANES) for element in (FLOAT, I32, I1, DOUBLE))


class Vector(types.Type):  # type: ignore[misc]
    """Sixteen of an LLVM type."""

    def __init__(self, name: str, held: Any) -> None:
        self.held = held
        super().__init__(name)


@register_model(Vector)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, kind.held)


lanes, mask = Vector("lanes", VECTOR), Vector("mask", BITS)
wide_lanes = Vector("wide", DOUBLES)  # which sums of lanes go to, and what cancels is computed in


# -- intrinsics of Numba from what emits their LLVM instructions


def typed(arity: int, signature_of: Callable[..., Any], emit: Callable[..., Any]) -> Any:
    """An intrinsic: ``signature_of(*types)`` is its signature for them, ``emit(builder, signature, *values)`` its result."""

    def define(typingctx: Any, *kinds: Any) -> Any:
        signature = signature_of(*kinds)
        return signature and (signature, lambda _, builder, signature, args: emit(builder, signature, *args))

    # Numba takes the number of arguments from here
    names = [inspect.Parameter(f"x{i}", inspect.Parameter.POSITIONAL_OR_KEYWORD) for i in range(arity + 1)]
    define.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    return intrinsic(define)


def fixed(signature: Any, emit: Callable[..., Any]) -> Any:
    """An intrinsic of one signature, to which arguments are converted, from ``emit(builder, *values)``."""
    return typed(
        len(signature.args), lambda *_: signature, lambda builder, _, *values: emit(builder, *values)
    )


def floats(arity: int, emit: Callable[..., Any], result: Any = None) -> Any:
    """An intrinsic of float32 or lanes from ``emit(builder, *values)``; ``result`` if it is none of these."""

    def signature_of(*kinds: Any) -> Any:
        takes = [kind if kind == lanes else F32 for kind in kinds]
        return (result or (lanes if lanes in takes else F32))(*takes)

    def spread(builder: Any, signature: Any, *values: Any) -> Any:
        return emit(builder, *(splat(builder, x) if lanes in signature.args else x for x in values))

    return typed(arity, signature_of, spread)


def splat(builder: Any, value: Any) -> Any:
    if isinstance(value.type, ir.VectorType):
        return value
    blank = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(blank, value, I32(0))
    return builder.shuffle_vector(first, blank, ir.Constant(INTEGERS, [0] * LANES))


def _vector(element: Any, like: Any) -> Any:
    return ir.VectorType(element, LANES) if isinstance(like.type, ir.VectorType) else element


def constant(element: Any, value: Any, like: Any) -> Any:
    """An LLVM constant of ``element``, in as many lanes as ``like`` has."""
    kind = _vector(element, like)
    return ir.Constant(kind, [value] * LANES if kind is not element else value)


def convert(builder: Any, how: str, value: Any, element: Any) -> Any:
    """``how`` (an llvmlite conversion) of a value or of its lanes to ``element``."""
    return getattr(builder, how)(value, _vector(element, value))


def function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """The LLVM function ``name``, declared once in a module."""
    have = builder.module.globals.get(name)
    return have or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def call(name: str, **flags: Any) -> Callable[..., Any]:
    """What emits a call of the LLVM intrinsic ``name``, whose arguments are of one type, that of its result."""

    def emit(builder: Any, *args: Any) -> Any:
        kind = args[0].type
        lane = f"v{LANES}" if isinstance(kind, ir.VectorType) else ""
        suffix = f".{lane}f64" if kind in (DOUBLE, DOUBLES) else f".{lane}f32"
        return builder.call(function(builder, name + suffix, kind, [kind] * len(args)), args, **flags)

    return emit


def _operators() -> None:
    arithmetic = {
        operator.add: floats(2, lambda b, *x: b.fadd(*x)),
        operator.sub: floats(2, lambda b, *x: b.fsub(*x)),
        operator.mul: floats(2, lambda b, *x: b.fmul(*x)),
        operator.truediv: floats(2, lambda b, *x: b.fdiv(*x)),
        operator.lt: floats(2, lambda b, *x: b.fcmp_ordered("<", *x), mask),
        operator.gt: floats(2, lambda b, *x: b.fcmp_ordered(">", *x), mask),
    }
    for symbol, made in arithmetic.items():
        overload(symbol)(_two(made))
    negative = floats(1, lambda b, x: b.fneg(x))

    @overload(operator.neg)
    def neg(a):
        return (lambda a: negative(a)) if a == lanes else None  # noqa: PLW0108


def _two(made: Any) -> Any:
    def resolve(a, b):  # unannotated: Numba compares its signature with the lambda's
        return (lambda a, b: made(a, b)) if lanes in (a, b) else None  # noqa: PLW0108 an intrinsic is no function

    return resolve


_operators()


def _select(builder: Any, signature: Any, test: Any, a: Any, b: Any) -> Any:
    return builder.select(test, splat(builder, a), splat(builder, b))


# ``where(test, a, b)``: lanes of a where the test holds, of b elsewhere
where = typed(3, lambda test, a, b: lanes(mask, *(x if x == lanes else F32 for x in (a, b))), _select)
fill = fixed(lanes(F32), splat)  # lanes that all hold a number


def _reduction(name: str, start: list[Any], flags: tuple[str, ...]) -> Callable[..., Any]:
    def emit(builder: Any, x: Any) -> Any:
        element = x.type.element
        kind = f"v{LANES}f{64 if element is DOUBLE else 32}"
        takes = [*(value.type for value in start), x.type]
        called = function(builder, f"llvm.vector.reduce.{name}.{kind}", element, takes)
        return builder.call(called, [*start, x], fastmath=flags)

    return emit


top = fixed(F32(lanes), _reduction("fmax", [], ("nnan", "nsz")))
total_wide = fixed(
    F64(wide_lanes), _reduction("fadd", [ir.Constant(DOUBLE, -0.0)], ("reassoc", "nsz"))
)  # the sum of sixteen float64


def _scaled_gap(builder: Any, signature: Any, x: Any, *others: Any) -> Any:
    reference, factor, other = (splat(builder, y) for y in others)
    gap = builder.fsub(builder.fpext(x, DOUBLES), reference)
    return call("llvm.fma")(builder, gap, factor, other)


# (x - reference) factor + other of lanes, in sixteen float64; ``other`` too may be such, all else is one float64
scaled_gap = typed(
    4, lambda x, a, b, other: wide_lanes(lanes, F64, F64, other if other == wide_lanes else F64), _scaled_gap
)
narrow = fixed(lanes(wide_lanes), lambda builder, x: builder.fptrunc(x, VECTOR))  # sixteen float64, rounded


# -- memory


def _below(builder: Any, count: Any) -> Any:
    """Mask of the lanes whose number is below an int64."""
    counts = splat(builder, builder.trunc(count, I32))
    return builder.icmp_signed("<", ir.Constant(INTEGERS, list(range(LANES))), counts)


def _access(element: Any, decode: Callable[[Any, Any], Any], encode: Callable[[Any, Any], Any]) -> Any:
    """``load(address, count, other)`` and ``store(address, count, lanes)`` of the first ``count`` of sixteen ``element``.

    ``other`` is what the lanes after them hold. Memory beyond is not touched. A count that is known when it is compiled costs nothing.
    """
    stored = ir.VectorType(element, LANES)
    size = 4 if element is FLOAT else 2
    masked = f"v{LANES}{'f' if element is FLOAT else 'i'}{size * 8}.p0"

    def load(builder: Any, address: Any, count: Any, other: Any) -> Any:
        pointer, first = builder.inttoptr(address, stored.as_pointer()), _below(builder, count)
        called = function(builder, f"llvm.masked.load.{masked}", stored, [pointer.type, I32, BITS, stored])
        have = builder.call(called, [pointer, I32(size), first, ir.Constant(stored, [0] * LANES)])
        return builder.select(first, decode(builder, have), splat(builder, other))

    def store(builder: Any, address: Any, count: Any, value: Any) -> None:
        pointer, first = builder.inttoptr(address, stored.as_pointer()), _below(builder, count)
        takes = [stored, pointer.type, I32, BITS]
        called = function(builder, f"llvm.masked.store.{masked}", ir.VoidType(), takes)
        builder.call(called, [encode(builder, value), pointer, I32(size), first])

    loads, stores = lanes(ADDRESS, types.int64, F32), types.void(ADDRESS, types.int64, lanes)
    return fixed(loads, load), fixed(stores, store)


def features() -> list[str]:
    """What the processor can do that is compiled for, as Numba takes it: this one, whatever its name, unless told otherwise."""
    chosen: str | None = config.CPU_FEATURES  # type: ignore[attr-defined]
    names: str = get_host_cpu_features() if chosen is None else chosen
    return names.split(",")


# bits of 16-bit floats, one or sixteen, to float32 and to the nearest of them, ties to even


def decode_bf16_bits(builder: Any, bits: Any) -> Any:
    wide = convert(builder, "zext", bits, I32)
    return convert(builder, "bitcast", builder.shl(wide, constant(I32, 16, wide)), FLOAT)


def encode_bf16_bits(builder: Any, value: Any) -> Any:
    if "+avx512bf16" in features():  # an instruction of its own, which takes subnormals for zero
        return convert(builder, "bitcast", convert(builder, "fptrunc", value, BFLOAT), I16)
    bits = convert(builder, "bitcast", value, I32)
    odd = builder.and_(builder.lshr(bits, constant(I32, 16, bits)), constant(I32, 1, bits))
    rounded = builder.add(bits, builder.add(odd, constant(I32, 0x7FFF, bits)))
    return convert(builder, "trunc", builder.lshr(rounded, constant(I32, 16, bits)), I16)


def decode_f16_bits(builder: Any, bits: Any) -> Any:
    return convert(builder, "fpext", convert(builder, "bitcast", bits, HALF), FLOAT)


def encode_f16_bits(builder: Any, value: Any) -> Any:
    return convert(builder, "bitcast", convert(builder, "fptrunc", value, HALF), I16)


load_f32, store_f32 = _access(FLOAT, lambda _, value: value, lambda _, value: value)
load_bf16, store_bf16 = _access(I16, decode_bf16_bits, encode_bf16_bits)
load_f16, store_f16 = _access(I16, decode_f16_bits, encode_f16_bits)


@njit(forceinline=True)
def load(address):
    """All sixteen of float32."""
    return load_f32(address, LANES, F32(0))


@njit(forceinline=True)
def store(address, value):
    store_f32(address, LANES, value)
