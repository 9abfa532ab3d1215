"""A chunk of a row: how the 16 bytes of it are read, decoded, encoded and written, for each dtype.

A row is cut into chunks whose first byte is 16-byte aligned, so that the body of a row moves by 128-bit accesses whatever V
is. A chunk that hangs over the start or the end of the row is an *edge*: it moves element by element, and what lies outside the
row reads as -inf.
"""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from stillhouse.kernels.cuda import intrinsics as ptx
from stillhouse.kernels.cuda.arithmetic import device, unrolled

DTYPES = ("bf16", "f16", "f32")
I32, I64, F32 = np.int32, np.int64, np.float32
MINUS_INFINITY = F32(-np.inf)
HALVES = {
    "bf16": (ptx.bf16_low, ptx.bf16_high, ptx.bf16_pack),
    "f16": (ptx.f16_low, ptx.f16_high, ptx.f16_pack),
}


def _of_words(dtype: str):
    """(decode, encode, load_one, store_one): four words to and from floats, and one element at an address."""
    if dtype == "f32":
        decode = unrolled(4, "a", "*(f(a[#]))", f=ptx.word_as_float)
        encode = unrolled(4, "x", "*(w(x[#]))", w=ptx.float_as_word)
        return decode, encode, ptx.load_f32, ptx.store_f32
    low, high, pack = HALVES[dtype]
    pairs = ", ".join(f"low(a[{i}]), high(a[{i}])" for i in range(4))
    decode = unrolled(1, "a", f"({pairs})", low=low, high=high)
    packed = ", ".join(f"pack(x[{2 * i}], x[{2 * i + 1}])" for i in range(4))
    encode = unrolled(1, "x", f"({packed})", pack=pack)

    @device
    def load_one(address):
        return low(ptx.load_u16(address))

    @device
    def store_one(address, x):
        ptx.store_u16(address, pack(x, x))

    return decode, encode, load_one, store_one


def codec(dtype: str) -> SimpleNamespace:
    """The device functions of one dtype. ``whole`` and ``edge`` have, of a chunk from element ``e`` of a row of ``n`` on:

    ``fetch(row, e, n)``: four words; ``put(row, e, n, words)``; ``within(x, e, n)``: floats, 0 outside of the row.
    """
    decode, encode, load_one, store_one = _of_words(dtype)
    size = 4 if dtype == "f32" else 2
    per = 16 // size

    @device
    def fetch(row, e, n):
        return ptx.load_words(row + I64(e) * size)

    @device
    def put(row, e, n, a):
        ptx.store_words(row + I64(e) * size, a[0], a[1], a[2], a[3])

    @device
    def within(x, e, n):
        return x

    @device
    def element(row, e, n):
        x = MINUS_INFINITY
        if e >= I32(0) and e < n:
            x = load_one(row + I64(e) * size)
        return x

    @device
    def put_element(row, e, n, x):
        if e >= I32(0) and e < n:
            store_one(row + I64(e) * size, x)

    elements = unrolled(per, "row, e, n", "*(element(row, I32(e + #), n))", element=element)
    put_elements = unrolled(
        per, "row, e, n, x", "I32(0)", "put_element(row, I32(e + #), n, x[#])", put_element=put_element
    )
    within_edge = unrolled(per, "x, e, n", "*(x[#] if e + # >= 0 and e + # < n else ZERO)")

    @device
    def fetch_edge(row, e, n):
        return encode(elements(row, e, n))

    @device
    def put_edge(row, e, n, a):
        put_elements(row, e, n, decode(a))

    return SimpleNamespace(
        size=size, per=per, decode=decode, encode=encode, load_one=load_one, store_one=store_one,
        whole=SimpleNamespace(fetch=fetch, put=put, within=within),
        edge=SimpleNamespace(fetch=fetch_edge, put=put_edge, within=within_edge),
    )  # fmt: skip
