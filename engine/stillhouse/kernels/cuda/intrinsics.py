"""Everything in the CUDA kernels that is not plain Numba: inline PTX, vector access, clusters, warp shuffles.

Addresses of global memory are plain int64: a launch then passes integers, and no array descriptor is built. Shared
memory is a Numba array of uint32 words; an offset into it counts words. A ``volatile`` instruction keeps its place
among the other volatile ones: a load of the student's logits must not sink below the store of the gradient, which
may overwrite them.
"""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

import inspect

from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

device = cuda.jit(device=True, forceinline=True)  # by LLVM: inlining in Numba's own passes takes minutes

SHARED_ALIGNMENT = 16  # bytes, for 128-bit accesses

_LL = {
    types.int32: ir.IntType(32),
    types.uint32: ir.IntType(32),
    types.int64: ir.IntType(64),
    types.float32: ir.FloatType(),
    types.void: ir.VoidType(),
}
_f32, _u32, _i32, _i64 = types.float32, types.uint32, types.int32, types.int64
_U4 = types.UniTuple(types.uint32, 4)
_V4 = ir.VectorType(ir.IntType(32), 4)


def _intrinsic(arity, signature_of, build):
    """An intrinsic: ``signature_of(*types)``, and the builder of its value."""

    def define(typingctx, *kinds):
        return signature_of(*kinds), build

    # Numba takes the number of arguments from here
    names = [inspect.Parameter(f"x{i}", inspect.Parameter.POSITIONAL_OR_KEYWORD) for i in range(arity + 1)]
    define.__signature__ = inspect.Signature(names)
    return intrinsic(define)


def _ptx(asm, constraints, returns, *takes, volatile=False):
    """The intrinsic that emits one PTX snippet; ``returns`` may be the 4-tuple of words."""
    words = returns is _U4
    ll_return = ir.LiteralStructType([_LL[_u32]] * 4) if words else _LL[returns]
    kind = ir.FunctionType(ll_return, [_LL[t] for t in takes])

    def build(context, builder, signature, args):
        casts = [
            context.cast(builder, a, have, want)
            for a, have, want in zip(args, signature.args, takes, strict=True)
        ]
        got = builder.call(ir.InlineAsm(kind, asm, constraints, side_effect=volatile), casts)
        if words:
            return context.make_tuple(builder, _U4, [builder.extract_value(got, i) for i in range(4)])
        return context.get_dummy_value() if returns is types.void else got

    return _intrinsic(len(takes), lambda *_: returns(*takes), build)


# -- arithmetic: the approximations are named, so that no fast-math flag (which breaks -inf) is needed
exp2 = _ptx("ex2.approx.ftz.f32 $0, $1;", "=f,f", _f32, _f32)
log2_approx = _ptx("lg2.approx.ftz.f32 $0, $1;", "=f,f", _f32, _f32)
reciprocal = _ptx("rcp.approx.ftz.f32 $0, $1;", "=f,f", _f32, _f32)
fma = _ptx("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", _f32, _f32, _f32, _f32)
fmax = _ptx("max.f32 $0, $1, $2;", "=f,f,f", _f32, _f32, _f32)
fmin = _ptx("min.f32 $0, $1, $2;", "=f,f,f", _f32, _f32, _f32)
word_as_float = _ptx("mov.b32 $0, $1;", "=f,r", _f32, _u32)
float_as_word = _ptx("mov.b32 $0, $1;", "=r,f", _u32, _f32)

# -- 16-bit pairs in one word; the first element is the low half
bf16_low = _ptx("shl.b32 $0, $1, 16;", "=f,r", _f32, _u32)
bf16_high = _ptx("and.b32 $0, $1, 0xffff0000;", "=f,r", _f32, _u32)
bf16_pack = _ptx("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", _u32, _f32, _f32)
f16_low = _ptx("{.reg .b16 l,h; mov.b32 {l,h}, $1; cvt.f32.f16 $0, l;}", "=f,r", _f32, _u32)
f16_high = _ptx("{.reg .b16 l,h; mov.b32 {l,h}, $1; cvt.f32.f16 $0, h;}", "=f,r", _f32, _u32)
f16_pack = _ptx("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", _u32, _f32, _f32)

# -- global memory, by address
load_words = _ptx("ld.global.v4.b32 {$0,$1,$2,$3}, [$4];", "=r,=r,=r,=r,l", _U4, _i64, volatile=True)
store_words = _ptx(
    "st.global.v4.b32 [$0], {$1,$2,$3,$4};", "l,r,r,r,r", types.void, _i64, *[_u32] * 4, volatile=True
)
load_u8 = _ptx("ld.global.u8 $0, [$1];", "=r,l", _u32, _i64, volatile=True)
load_u16 = _ptx("ld.global.u16 $0, [$1];", "=r,l", _u32, _i64, volatile=True)
load_i64 = _ptx("ld.global.b64 $0, [$1];", "=l,l", _i64, _i64, volatile=True)
load_f32 = _ptx("ld.global.f32 $0, [$1];", "=f,l", _f32, _i64, volatile=True)
_LOW_HALF = "{.reg .b16 l,h; mov.b32 {l,h}, $1; st.global.b16 [$0], l;}"
store_u16 = _ptx(_LOW_HALF, "l,r", types.void, _i64, _u32, volatile=True)
store_f32 = _ptx("st.global.f32 [$0], $1;", "l,f", types.void, _i64, _f32, volatile=True)

# The same number, but the compiler cannot count a loop that steps by it, and so unrolls none. Each does a whole
# vector at a time; more of them spill registers.
uncounted = _ptx("mov.b32 $0, $1;", "=r,r", _i32, _i32)

# -- clusters; every thread of every block of the cluster runs each of these
cluster_rank = _ptx("mov.u32 $0, %cluster_ctarank;", "=r", _i32)
cluster_arrive = _ptx("barrier.cluster.arrive.release.aligned;", "~{memory}", types.void, volatile=True)
cluster_wait = _ptx("barrier.cluster.wait.acquire.aligned;", "~{memory}", types.void, volatile=True)


def _shared_pointer(context, builder, array_type, array, offset, pointee):
    data = context.make_array(array_type)(context, builder, array).data
    element = builder.gep(data, [offset])
    return builder.addrspacecast(element, pointee.as_pointer(3), "shared")


def _load_shared(pointee, align):
    def build(context, builder, signature, args):
        offset = context.cast(builder, args[1], signature.args[1], _i32)
        pointer = _shared_pointer(context, builder, signature.args[0], args[0], offset, pointee)
        value = builder.load(pointer, align=align)
        if pointee is not _V4:
            return value
        words = [builder.extract_element(value, ir.IntType(32)(i)) for i in range(4)]
        return context.make_tuple(builder, _U4, words)

    return build


def _store_shared(pointee, align):
    def build(context, builder, signature, args):
        offset = context.cast(builder, args[1], signature.args[1], _i32)
        pointer = _shared_pointer(context, builder, signature.args[0], args[0], offset, pointee)
        value = args[2]
        if pointee is _V4:
            value = ir.Constant(_V4, ir.Undefined)
            for i, word in enumerate(args[2:]):
                value = builder.insert_element(value, word, ir.IntType(32)(i))
        builder.store(value, pointer, align=align)
        return context.get_dummy_value()

    return build


# shared memory at ``array[offset]``: four words from a multiple of four on, by one 128-bit access, and one float32, for which a plain
# index would first be tested for being negative
shared_load_words = _intrinsic(2, _U4, _load_shared(_V4, 16))
shared_store_words = _intrinsic(6, lambda a, i, *_: types.void(a, i, *[_u32] * 4), _store_shared(_V4, 16))
shared_load = _intrinsic(2, _f32, _load_shared(ir.FloatType(), 4))
shared_store = _intrinsic(3, lambda a, i, _: types.void(a, i, _f32), _store_shared(ir.FloatType(), 4))


_REMOTE_STORE = (
    "{.reg .b32 there; mapa.shared::cluster.u32 there, $0, $1; st.shared::cluster.f32 [there], $2;}"
)


def _remote_store(context, builder, signature, args):
    offset = context.cast(builder, args[1], signature.args[1], _i32)
    pointer = _shared_pointer(context, builder, signature.args[0], args[0], offset, ir.IntType(32))
    here = builder.ptrtoint(pointer, ir.IntType(32))
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32), ir.IntType(32), ir.FloatType()])
    asm = ir.InlineAsm(kind, _REMOTE_STORE, "r,r,f,~{memory}", side_effect=True)
    builder.call(asm, [here, context.cast(builder, args[2], signature.args[2], _i32), args[3]])
    return context.get_dummy_value()


# ``cluster_store(array, offset, rank, value)``: one float32 to the shared memory of that block of the cluster
cluster_store = _intrinsic(4, lambda a, i, rank, _: types.void(a, i, rank, _f32), _remote_store)
_SHUFFLE = "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;"
# ``shuffle_xor(value, mask)``: the value of the lane whose number differs by the mask; all 32 lanes take part
shuffle_xor = _ptx(_SHUFFLE, "=f,f,r", _f32, _f32, _i32, volatile=True)
