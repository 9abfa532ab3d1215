"""A chunk of eight logits: how it is read, decoded, kept in shared memory, encoded and written, for each dtype.

A row is cut into chunks of eight elements whose first byte is 16-byte aligned, so that the body of a row moves by
128-bit accesses whatever V is. A chunk that hangs over the start or the end of the row is an *edge*: it moves
element by element, and what lies outside the row reads as -inf.

16-bit: a chunk is one 128-bit vector. float32: a chunk is two vectors, one from either half of the row and ``apart``
elements from each other, so that the 32 lanes of a warp still read 512 contiguous bytes with each instruction.

In shared memory the vectors of 32 chunks lie side by side, plane after plane: one address then serves all of a
chunk's vectors, at constant distances from it.
"""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from stillhouse.kernels.cuda import intrinsics as ptx

device = ptx.device

DTYPES = ("bf16", "f16", "f32")
I32, I64, F32, U32 = np.int32, np.int64, np.float32, np.uint32
CHUNK = 8  # elements
PLANE = 128  # words from one vector of a chunk to its next in shared memory


def _sixteen_bit(low, high, pack, minus_infinity):
    """Codec of bf16 or f16; the second vector of a chunk does not exist, and stands in as the first."""
    nothing = U32(minus_infinity)

    @device
    def first_element(chunk):
        return I32(chunk * 8)

    @device
    def place(element, apart):
        """The number of an element in the order of chunks, eight to each."""
        return element

    @device
    def fetch(address, apart):
        a = ptx.load_words(address)
        return a, a

    @device
    def fetch_kept(address, apart):
        a = ptx.load_words_kept(address)
        return a, a

    @device
    def decode(a, b):
        return low(a[0]), high(a[0]), low(a[1]), high(a[1]), low(a[2]), high(a[2]), low(a[3]), high(a[3])

    @device
    def encode(x):
        a = (pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]))
        return a, a

    @device
    def put(address, apart, a, b):
        ptx.store_words(address, a[0], a[1], a[2], a[3])

    @device
    def element(row, e, n):
        word = nothing
        if e >= I32(0) and e < n:
            word = ptx.load_u16(row + np.int64(e) * 2)
        return word

    @device
    def pair(row, e, n):
        return U32(element(row, e, n) | (element(row, I32(e + 1), n) << U32(16)))

    @device
    def fetch_edge(row, e, n, apart):
        a = (pair(row, e, n), pair(row, I32(e + 2), n), pair(row, I32(e + 4), n), pair(row, I32(e + 6), n))
        return a, a

    @device
    def put_pair(row, e, n, word):
        if e >= I32(0) and e < n:
            ptx.store_u16(row + np.int64(e) * 2, word)
        if e >= I32(-1) and e + I32(1) < n:
            ptx.store_u16(row + np.int64(e) * 2 + 2, U32(word >> U32(16)))

    @device
    def put_edge(row, e, n, apart, a, b):
        put_pair(row, e, n, a[0])
        put_pair(row, I32(e + 2), n, a[1])
        put_pair(row, I32(e + 4), n, a[2])
        put_pair(row, I32(e + 6), n, a[3])

    @device
    def load_one(address):
        return low(ptx.load_u16(address))

    @device
    def store_one(address, x):
        ptx.store_u16(address, pack(x, x))

    @device
    def stage(words, at, a, b):
        ptx.shared_store_words(words, at, a[0], a[1], a[2], a[3])

    @device
    def unstage(words, at):
        a = ptx.shared_load_words(words, at)
        return a, a

    return SimpleNamespace(size=2, vectors=1, **_methods(locals()))


def _single():
    """Codec of float32."""
    nothing = U32(0xFF800000)
    decode4 = ptx.word_as_float
    encode4 = ptx.float_as_word

    @device
    def first_element(chunk):
        return I32(chunk * 4)

    @device
    def place(element, apart):
        second = I32(element - apart)
        half = I32(0) if second < I32(0) else I32(4)
        element = element if second < I32(0) else second
        return I32(((element >> I32(2)) << I32(3)) + half + (element & I32(3)))

    @device
    def fetch(address, apart):
        return ptx.load_words(address), ptx.load_words(address + I64(apart) * 4)

    @device
    def fetch_kept(address, apart):
        return ptx.load_words_kept(address), ptx.load_words_kept(address + I64(apart) * 4)

    @device
    def decode(a, b):
        return (
            decode4(a[0]), decode4(a[1]), decode4(a[2]), decode4(a[3]),
            decode4(b[0]), decode4(b[1]), decode4(b[2]), decode4(b[3]),
        )  # fmt: skip

    @device
    def encode(x):
        return (
            (encode4(x[0]), encode4(x[1]), encode4(x[2]), encode4(x[3])),
            (encode4(x[4]), encode4(x[5]), encode4(x[6]), encode4(x[7])),
        )

    @device
    def put(address, apart, a, b):
        ptx.store_words(address, a[0], a[1], a[2], a[3])
        ptx.store_words(address + I64(apart) * 4, b[0], b[1], b[2], b[3])

    @device
    def element(row, e, n):
        word = nothing
        if e >= I32(0) and e < n:
            word = ptx.load_u32(row + np.int64(e) * 4)
        return word

    @device
    def quad(row, e, n):
        return (
            element(row, e, n),
            element(row, I32(e + 1), n),
            element(row, I32(e + 2), n),
            element(row, I32(e + 3), n),
        )

    @device
    def fetch_edge(row, e, n, apart):
        return quad(row, e, n), quad(row, I32(e + apart), n)

    @device
    def put_element(row, e, n, word):
        if e >= I32(0) and e < n:
            ptx.store_f32(row + np.int64(e) * 4, decode4(word))

    @device
    def put_quad(row, e, n, a):
        put_element(row, e, n, a[0])
        put_element(row, I32(e + 1), n, a[1])
        put_element(row, I32(e + 2), n, a[2])
        put_element(row, I32(e + 3), n, a[3])

    @device
    def put_edge(row, e, n, apart, a, b):
        put_quad(row, e, n, a)
        put_quad(row, I32(e + apart), n, b)

    @device
    def load_one(address):
        return ptx.load_f32(address)

    @device
    def store_one(address, x):
        ptx.store_f32(address, x)

    @device
    def stage(words, at, a, b):
        ptx.shared_store_words(words, at, a[0], a[1], a[2], a[3])
        ptx.shared_store_words(words, I32(at + PLANE), b[0], b[1], b[2], b[3])

    @device
    def unstage(words, at):
        return ptx.shared_load_words(words, at), ptx.shared_load_words(words, I32(at + PLANE))

    return SimpleNamespace(size=4, vectors=2, **_methods(locals()))


def _methods(scope):
    wanted = (
        "first_element place fetch fetch_kept decode encode put fetch_edge put_edge load_one store_one stage unstage"
    ).split()
    return {name: scope[name] for name in wanted}


def codec(dtype: str) -> SimpleNamespace:
    """The device functions of one dtype: "bf16", "f16" or "f32"."""
    if dtype == "bf16":
        return _sixteen_bit(ptx.bf16_low, ptx.bf16_high, ptx.bf16_pack, 0xFF80)
    if dtype == "f16":
        return _sixteen_bit(ptx.f16_low, ptx.f16_high, ptx.f16_pack, 0xFC00)
    return _single()
