"""Sixteen float32 at a time, as a Numba type: the CPU kernels' loops say themselves what runs in vector lanes.

Left to LLVM's vectoriser, a loop over a row has a scalar remainder, which costs as much as hundreds of columns, and a
scalar version for arrays that lie near each other, which adds up in another order. LLVM lowers these vectors to what
the processor has: one AVX-512 register, two AVX2 registers, four NEON ones. Arithmetic between lanes and a float32
spreads the float32. Addresses are int64.
"""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,call-arg,var-annotated"

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import config, types
from numba.core.codegen import get_host_cpu_features
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

LANES = 16
F32 = types.float32
FLOAT, HALF, I64, I32, I16, I1 = (
    ir.FloatType(), ir.HalfType(), ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(1),
)  # fmt: skip


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
    """What llvmlite has no type for."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
BFLOAT = _BFloat()
VECTOR, INTEGERS, BITS, DOUBLES = (
    ir.VectorType(element, LANES) for element in (FLOAT, I32, I1, ir.DoubleType())
)


class Lanes(types.Type):  # type: ignore[misc]
    """Sixteen float32."""


class Mask(types.Type):  # type: ignore[misc]
    """Sixteen truth values."""


class Wide(types.Type):  # type: ignore[misc]
    """Sixteen float64, which sums of lanes go to, and what cancels is computed in."""


lanes, mask, wide_lanes = Lanes("lanes"), Mask("mask"), Wide("wide")


def _model(kind: Any, held: Any) -> None:
    class Model(models.PrimitiveModel):  # type: ignore[misc]
        def __init__(self, manager: Any, kind: Any) -> None:
            super().__init__(manager, kind, held)

    register_model(kind)(Model)


_model(Lanes, VECTOR)
_model(Mask, BITS)
_model(Wide, DOUBLES)


def _splat(builder: Any, value: Any) -> Any:
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


def floats(arity: int, emit: Callable[[Any, Any], Any], result: Any = None) -> Any:
    """An intrinsic of one to three float32 or lanes from its LLVM instruction; ``result`` if it is none of these."""

    def typed(*kinds: Any) -> Any:
        wide = any(isinstance(kind, Lanes) for kind in kinds)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, [_splat(builder, x) for x in args] if wide else args)

        takes = [kind if isinstance(kind, Lanes) else F32 for kind in kinds]
        return (result or (lanes if wide else F32))(*takes), codegen

    if arity == 1:
        return intrinsic(lambda typingctx, a: typed(a))
    if arity == 2:
        return intrinsic(lambda typingctx, a, b: typed(a, b))
    return intrinsic(lambda typingctx, a, b, c: typed(a, b, c))


def function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """The LLVM function ``name``, declared once in a module."""
    have = builder.module.globals.get(name)
    return have or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def call(name: str, arity: int, **flags: Any) -> Callable[[Any, Any], Any]:
    """What emits a call of the LLVM intrinsic ``name`` for float32 or lanes."""

    def emit(builder: Any, args: Any) -> Any:
        kind = args[0].type
        suffix = f".v{LANES}f32" if kind == VECTOR else ".f32"
        return builder.call(function(builder, name + suffix, kind, [kind] * arity), args, **flags)

    return emit


def convert(builder: Any, how: str, value: Any, element: Any) -> Any:
    """``how`` (an llvmlite conversion) of a value or of its lanes to ``element``."""
    return getattr(builder, how)(value, _vector(element, value))


def _operators() -> None:
    arithmetic = {
        operator.add: floats(2, lambda b, x: b.fadd(*x)),
        operator.sub: floats(2, lambda b, x: b.fsub(*x)),
        operator.mul: floats(2, lambda b, x: b.fmul(*x)),
        operator.truediv: floats(2, lambda b, x: b.fdiv(*x)),
        operator.lt: floats(2, lambda b, x: b.fcmp_ordered("<", *x), mask),
        operator.gt: floats(2, lambda b, x: b.fcmp_ordered(">", *x), mask),
    }
    for symbol, made in arithmetic.items():
        overload(symbol)(_two(made))
    negative = floats(1, lambda b, x: b.fneg(*x))

    @overload(operator.neg)  # type: ignore[untyped-decorator]
    def neg(a):
        return (lambda a: negative(a)) if isinstance(a, Lanes) else None  # noqa: PLW0108


def _two(made: Any) -> Any:
    def resolve(a, b):  # unannotated: Numba compares its signature with the lambda's
        if isinstance(a, Lanes) or isinstance(b, Lanes):
            return lambda a, b: made(a, b)  # noqa: PLW0108 an intrinsic is no function
        return None

    return resolve


_operators()


@intrinsic  # type: ignore[untyped-decorator]
def where(typingctx: Any, test: Any, a: Any, b: Any) -> Any:
    """A where ``test`` holds, b elsewhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(args[0], _splat(builder, args[1]), _splat(builder, args[2]))

    takes = [kind if isinstance(kind, Lanes) else F32 for kind in (a, b)]
    return lanes(mask, *takes), codegen


@intrinsic  # type: ignore[untyped-decorator]
def fill(typingctx: Any, value: Any) -> Any:
    """Lanes that all hold ``value``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return lanes(F32), codegen


def _reduction(name: str, start: float | None, flags: tuple[str, ...]) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def reduced(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            first = [] if start is None else [ir.Constant(FLOAT, start)]
            takes = [*(value.type for value in first), VECTOR]
            called = function(builder, f"llvm.vector.reduce.{name}.v{LANES}f32", FLOAT, takes)
            return builder.call(called, [*first, *args], fastmath=flags)

        return F32(lanes), codegen

    return reduced


total = _reduction("fadd", -0.0, ("reassoc", "nsz"))
top = _reduction("fmax", None, ("nnan", "nsz"))


@intrinsic  # type: ignore[untyped-decorator]
def total_wide(typingctx: Any, sums: Any) -> Any:
    """The sum of sixteen float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        double = ir.DoubleType()
        called = function(builder, f"llvm.vector.reduce.fadd.v{LANES}f64", double, [double, DOUBLES])
        return builder.call(called, [ir.Constant(double, -0.0), args[0]], fastmath=("reassoc", "nsz"))

    return types.float64(wide_lanes), codegen


@intrinsic  # type: ignore[untyped-decorator]
def scaled_gap(typingctx: Any, x: Any, reference: Any, factor: Any, other: Any) -> Any:
    """(x - reference) factor + other of lanes, in sixteen float64; ``other`` too may be such, all else is one float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        reference, factor, other = (_splat(builder, y) for y in args[1:])
        gap = builder.fsub(builder.fpext(args[0], DOUBLES), reference)
        fused = function(builder, f"llvm.fma.v{LANES}f64", DOUBLES, [DOUBLES] * 3)
        return builder.call(fused, [gap, factor, other])

    one = types.float64
    return wide_lanes(lanes, one, one, other if isinstance(other, Wide) else one), codegen


@intrinsic  # type: ignore[untyped-decorator]
def narrow(typingctx: Any, x: Any) -> Any:
    """Sixteen float64, rounded to lanes."""
    return lanes(wide_lanes), lambda context, builder, signature, args: builder.fptrunc(args[0], VECTOR)


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _below(builder: Any, count: Any) -> Any:
    """Mask of the lanes whose number is below an int64."""
    blank = ir.Constant(INTEGERS, ir.Undefined)
    first = builder.insert_element(blank, builder.trunc(count, I32), I32(0))
    counts = builder.shuffle_vector(first, blank, ir.Constant(INTEGERS, [0] * LANES))
    return builder.icmp_signed("<", ir.Constant(INTEGERS, list(range(LANES))), counts)


def _access(element: Any, decode: Callable[[Any, Any], Any], encode: Callable[[Any, Any], Any]) -> Any:
    """(load, load_first, store, store_first) of sixteen ``element`` in memory, as lanes."""
    stored = ir.VectorType(element, LANES)
    size = 4 if element is FLOAT else 2
    masked = f"v{LANES}{'f' if element is FLOAT else 'i'}{size * 8}.p0"

    @intrinsic  # type: ignore[untyped-decorator]
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return decode(builder, builder.load(_pointer(builder, args[0], stored), align=size))

        return lanes(types.int64), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def load_first(typingctx: Any, address: Any, count: Any, other: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer, first = _pointer(builder, args[0], stored), _below(builder, args[1])
            takes = [pointer.type, I32, BITS, stored]
            called = function(builder, f"llvm.masked.load.{masked}", stored, takes)
            have = builder.call(called, [pointer, I32(size), first, ir.Constant(stored, [0] * LANES)])
            return builder.select(first, decode(builder, have), _splat(builder, args[2]))

        return lanes(types.int64, types.int64, F32), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(encode(builder, args[1]), _pointer(builder, args[0], stored), align=size)

        return types.void(types.int64, lanes), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def store_first(typingctx: Any, address: Any, count: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer, first = _pointer(builder, args[0], stored), _below(builder, args[1])
            takes = [stored, pointer.type, I32, BITS]
            called = function(builder, f"llvm.masked.store.{masked}", ir.VoidType(), takes)
            builder.call(called, [encode(builder, args[2]), pointer, I32(size), first])

        return types.void(types.int64, types.int64, lanes), codegen

    return load, load_first, store, store_first


def _as_it_is(builder: Any, value: Any) -> Any:
    return value


def decode_bf16_bits(builder: Any, bits: Any) -> Any:
    """Float32 of bfloat16 bits, one or sixteen."""
    wide = convert(builder, "zext", bits, I32)
    return convert(builder, "bitcast", builder.shl(wide, constant(I32, 16, wide)), FLOAT)


def features() -> list[str]:
    """What the processor can do that is compiled for, as Numba takes it: this one, whatever its name, unless told otherwise."""
    chosen: str | None = config.CPU_FEATURES  # type: ignore[attr-defined]
    names: str = get_host_cpu_features() if chosen is None else chosen
    return names.split(",")


def encode_bf16_bits(builder: Any, value: Any) -> Any:
    """Bits of the nearest bfloat16, ties to even."""
    if "+avx512bf16" in features():  # an instruction of its own, which takes subnormals for zero
        return convert(builder, "bitcast", convert(builder, "fptrunc", value, BFLOAT), I16)
    bits = convert(builder, "bitcast", value, I32)
    odd = builder.and_(builder.lshr(bits, constant(I32, 16, bits)), constant(I32, 1, bits))
    rounded = builder.add(bits, builder.add(odd, constant(I32, 0x7FFF, bits)))
    return convert(builder, "trunc", builder.lshr(rounded, constant(I32, 16, bits)), I16)


def decode_f16_bits(builder: Any, bits: Any) -> Any:
    """Float32 of float16 bits, one or sixteen."""
    return convert(builder, "fpext", convert(builder, "bitcast", bits, HALF), FLOAT)


def encode_f16_bits(builder: Any, value: Any) -> Any:
    """Bits of the nearest float16."""
    return convert(builder, "bitcast", convert(builder, "fptrunc", value, HALF), I16)


# ``load(address)`` and ``store(address, lanes)``; ``load_first(address, count, other)`` reads ``count`` of sixteen and
# puts ``other`` in the lanes after them, ``store_first(address, count, lanes)`` writes so many: memory beyond is not touched
load, load_first, store, store_first = _access(FLOAT, _as_it_is, _as_it_is)
load_bf16, load_first_bf16, store_bf16, store_first_bf16 = _access(I16, decode_bf16_bits, encode_bf16_bits)
load_f16, load_first_f16, store_f16, store_first_f16 = _access(I16, decode_f16_bits, encode_f16_bits)
