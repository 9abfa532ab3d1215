"""Kernels for dense teachers and V <= 64: several rows a block, eight lanes for each.

The rows of a block lie side by side in memory, so the block moves them as one stretch of 128-bit accesses whatever V
is, and keeps them in shared memory as float32; the lanes of a row then stride over it. The gradient takes the place
of the student's logits there, and leaves the same way.
"""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from numba import cuda, types

from stillhouse.kernels.cuda import intrinsics as ptx
from stillhouse.kernels.cuda.arithmetic import LOWEST, ZERO, butterflies, device
from stillhouse.kernels.cuda.chunks import is_kept, row_scale
from stillhouse.kernels.cuda.pairs import (
    CORRECTED,
    NEAR_KNOWN,
    NEAR_ROW,
    any_agreement,
    compare,
    exact_gap,
    near_pair,
    relative_to_constant,
)
from stillhouse.kernels.cuda.rows import HUGE, SIGNATURE
from stillhouse.kernels.cuda.vectors import codec

ALIGNMENT = ptx.SHARED_ALIGNMENT
I32, I64, F32, U32 = np.int32, np.int64, np.float32, np.uint32
MINUS_INFINITY = F32(-np.inf)

__all__ = ["SIGNATURE", "small_kernel"]


def stretches(dtype: str, threads: int) -> SimpleNamespace:
    """Device functions that move a stretch of contiguous elements between global memory and float32 in shared."""
    code = codec(dtype)
    decode, encode, load_one, store_one = code.decode, code.encode, code.load_one, code.store_one
    size, per_vector, short = code.size, 16 // code.size, code.size == 2

    @device
    def aligned(address, count):
        """(elements before the first 16-byte boundary, whole vectors from there on)."""
        head = min(I32((I64(16) - (address & I64(15))) & I64(15)) // I32(size), count)
        return I32(head), I32(I32(count - head) // I32(per_vector))

    @device
    def odd_one(i, head, vectors):
        """The i-th of the elements outside of the vectors."""
        return i if i < head else I32(i + vectors * per_vector)

    @device
    def load(words, base, address, count, tid):
        head, vectors = aligned(address, count)
        i = tid
        while i < vectors:
            a = ptx.load_words(address + I64(head + i * per_vector) * size)
            at = I32(base + head + i * per_vector)
            if short:
                x = decode(a, a)
                first = (
                    ptx.float_as_word(x[0]),
                    ptx.float_as_word(x[1]),
                    ptx.float_as_word(x[2]),
                    ptx.float_as_word(x[3]),
                )
                ptx.shared_store_words(words, at, first[0], first[1], first[2], first[3])
                last = (
                    ptx.float_as_word(x[4]),
                    ptx.float_as_word(x[5]),
                    ptx.float_as_word(x[6]),
                    ptx.float_as_word(x[7]),
                )
                ptx.shared_store_words(words, I32(at + 4), last[0], last[1], last[2], last[3])
            else:
                ptx.shared_store_words(words, at, a[0], a[1], a[2], a[3])
            i = I32(i + threads)
        i = tid
        while i < I32(count - vectors * per_vector):
            e = odd_one(i, head, vectors)
            ptx.shared_store(words, I32(base + e), load_one(address + I64(e) * size))
            i = I32(i + threads)

    @device
    def as_floats(a, b):
        return (
            ptx.word_as_float(a[0]), ptx.word_as_float(a[1]), ptx.word_as_float(a[2]), ptx.word_as_float(a[3]),
            ptx.word_as_float(b[0]), ptx.word_as_float(b[1]), ptx.word_as_float(b[2]), ptx.word_as_float(b[3]),
        )  # fmt: skip

    @device
    def store(words, base, address, count, tid, head, vectors):
        i = tid
        while i < vectors:
            at = I32(base + head + i * per_vector)
            a = ptx.shared_load_words(words, at)
            if short:
                a, b = encode(as_floats(a, ptx.shared_load_words(words, I32(at + 4))))
            ptx.store_words(address + I64(head + i * per_vector) * size, a[0], a[1], a[2], a[3])
            i = I32(i + threads)
        i = tid
        while i < I32(count - vectors * per_vector):
            e = odd_one(i, head, vectors)
            store_one(address + I64(e) * size, ptx.shared_load(words, I32(base + e)))
            i = I32(i + threads)

    return SimpleNamespace(aligned=aligned, load=load, store=store)


def small_kernel(dtype: str, divergence: str, threads: int, lanes: int, gradient: bool = True) -> Callable:
    """The kernel (undecorated) with ``threads / lanes`` rows a block; arguments as in rows, ``rows`` for the slice."""
    pair, row_known, stretch, size = (
        near_pair(divergence, exact_gap),
        NEAR_KNOWN[divergence],
        stretches(dtype, threads),
        codec(dtype).size,
    )
    aligned, load, store = stretch.aligned, stretch.load, stretch.store
    rows_per_block, of_student, limit, corrected = (
        threads // lanes,
        divergence == "reverse",
        NEAR_ROW[divergence],
        CORRECTED[divergence],
    )
    group_max, group_sum = butterflies(lanes)

    @device
    def value(words, base, e, width):
        x = MINUS_INFINITY
        if e < width:
            x = ptx.shared_load(words, I32(base + e))
        return x

    @device
    def four(words, at):
        """The lane's next four logits; constant distances, so one address serves them."""
        return (
            ptx.shared_load(words, at), ptx.shared_load(words, I32(at + lanes)),
            ptx.shared_load(words, I32(at + 2 * lanes)), ptx.shared_load(words, I32(at + 3 * lanes)),
        )  # fmt: skip

    @device
    def top_of(words, base, width, lane):
        top = MINUS_INFINITY
        e = lane
        while e < I32(width - 3 * lanes):
            x = four(words, I32(base + e))
            top = ptx.fmax(ptx.fmax(top, ptx.fmax(x[0], x[1])), ptx.fmax(x[2], x[3]))
            e = I32(e + 4 * lanes)
        while e < width:
            top = ptx.fmax(top, ptx.shared_load(words, I32(base + e)))
            e = I32(e + lanes)
        return group_max(top)

    @device
    def power(x, k2, n):
        return ptx.exp2(ptx.fma(x, k2, n))

    @device
    def row_softmax(words, base, width, lane, k2):
        """(C, D) of one side of a row, to its lanes; the maximum first, so each exponential is taken once."""
        c = ptx.fmax(top_of(words, base, width, lane) * k2, LOWEST)
        n = -c
        d = ZERO
        e = lane
        while e < I32(width - 3 * lanes):
            x = four(words, I32(base + e))
            d = d + ((power(x[0], k2, n) + power(x[1], k2, n)) + (power(x[2], k2, n) + power(x[3], k2, n)))
            e = I32(e + 4 * lanes)
        while e < width:
            d = d + power(ptx.shared_load(words, I32(base + e)), k2, n)
            e = I32(e + lanes)
        return c, group_sum(d)

    @device
    def agree(words, s_row, t_row, s_width, t_width, lane, sides):
        """Does the row count as one whose sides nearly agree, also if the student lacks an entry?"""
        apart = ZERO
        e = lane
        while e < t_width:
            xt, xs = value(words, t_row, e, t_width), value(words, s_row, e, s_width)
            apart = apart + any_agreement(sides, xt, xs)
            e = I32(e + lanes)
        return group_sum(apart) < limit

    @device
    def leave(words, s_at, t_at, b, c):
        """What the gradient is made of, in the place of the logits."""
        if gradient:
            ptx.shared_store(words, s_at, b)
            ptx.shared_store(words, t_at, c)

    @device
    def resolve(words, s_base, t_base, v, s_width, t_width, all_width, both, lane, known):
        """The loss and the mean over the row, and what ``leave`` leaves."""
        total, mean = ZERO, ZERO
        whole = min(s_width, t_width)
        e = lane
        while e < I32(whole - 3 * lanes):
            s_at, t_at = I32(s_base + e), I32(t_base + e)
            xs, xt = four(words, s_at), four(words, t_at)
            a0, b0, c0 = pair(xt[0], xs[0], known)
            a1, b1, c1 = pair(xt[1], xs[1], known)
            a2, b2, c2 = pair(xt[2], xs[2], known)
            a3, b3, c3 = pair(xt[3], xs[3], known)
            total, mean = total + ((a0 + a1) + (a2 + a3)), mean + ((c0 + c1) + (c2 + c3))
            leave(words, s_at, t_at, b0, c0)
            leave(words, I32(s_at + lanes), I32(t_at + lanes), b1, c1)
            leave(words, I32(s_at + 2 * lanes), I32(t_at + 2 * lanes), b2, c2)
            leave(words, I32(s_at + 3 * lanes), I32(t_at + 3 * lanes), b3, c3)
            e = I32(e + 4 * lanes)
        while e < all_width:
            a, b, c = pair(value(words, t_base, e, t_width), value(words, s_base, e, s_width), known)
            total, mean = total + a, mean + c
            if e < both:
                leave(words, I32(s_base + e), I32(t_base + e), b, c)
            e = I32(e + lanes)
        return group_sum(total), group_sum(mean) * known[3]

    @device
    def write(words, s_base, t_base, v, s_width, t_width, both, lane, known, mean, grad_scale):
        n = -mean
        e = lane
        while e < both:
            b, c = ptx.shared_load(words, I32(s_base + e)), ptx.shared_load(words, I32(t_base + e))
            ptx.shared_store(words, I32(s_base + e), ptx.fma(b, n, c) * grad_scale)
            e = I32(e + lanes)
        while e < v:  # the teacher has no such entry, so there was no room to keep the two
            a, b, c = pair(value(words, t_base, e, t_width), value(words, s_base, e, s_width), known)
            ptx.shared_store(words, I32(s_base + e), ptx.fma(b, n, c) * grad_scale)
            e = I32(e + lanes)

    @device
    def clear(words, s_base, v, lane):
        e = lane
        while e < v:
            ptx.shared_store(words, I32(s_base + e), ZERO)
            e = I32(e + lanes)

    def kernel(
        s, t, g, loss, mask, scale, v, t_stride, s_width, t_width, rows, k2, grad_factor, loss_factor,
        odds, log_odds, log_t, log_s, s0, s1, s2, s3, s4, s5, s6, s7, l0, l1, l2, l3, l4, l5, l6, l7,
    ):  # fmt: skip
        coin = (
            odds, log_odds, log_t, log_s, s0, s1, s2, s3, s4, s5, s6, s7, l0, l1, l2, l3, l4, l5, l6, l7,
        )  # fmt: skip
        words = cuda.shared.array(0, types.uint32, alignment=ALIGNMENT)
        tid = I32(cuda.threadIdx.x)
        first = I32(I32(cuda.blockIdx.x) * rows_per_block)
        here = min(I32(rows - first), I32(rows_per_block))
        s_at, g_at = s + I64(first) * v * size, g + I64(first) * v * size
        t_at = t + I64(first) * t_stride * size
        s_count, t_count = I32(here * v), I32(here * t_stride)
        s_head, s_vectors = aligned(s_at, s_count)
        t_head, t_vectors = aligned(t_at, t_count)
        # shared memory starts as far before a boundary as global memory does
        s_base = I32(I32(16 - s_head) & I32(3))
        t_base = I32((I32(s_count + s_base + 3) & I32(-4)) + (I32(16 - t_head) & I32(3)))
        load(words, s_base, s_at, s_count, tid)
        load(words, t_base, t_at, t_count, tid)
        cuda.syncthreads()

        lane = tid & I32(lanes - 1)
        local = I32(tid // I32(lanes))
        row = I32(first + local)
        there = local < here
        kept = False
        if there:
            kept = is_kept(mask, row)
        s_row, t_row = I32(s_base + local * v), I32(t_base + local * t_stride)
        mine_s, mine_t = (
            (s_width, t_width) if kept else (I32(0), I32(0))
        )  # all lanes take part in the shuffles
        cs, ds = row_softmax(words, s_row, mine_s, lane, k2)
        ct, dt = row_softmax(words, t_row, mine_t, lane, k2)
        sides = compare(k2, cs, ds, ct, dt) if of_student else compare(k2, ct, dt, cs, ds)
        known = row_known(sides, coin)
        near = True
        if divergence == "jsd" and not agree(words, s_row, t_row, mine_s, mine_t, lane, sides):
            known, near = relative_to_constant(known), False
        all_width = max(v, max(mine_s, mine_t)) if kept else I32(0)
        both = min(v, t_stride)
        grad_scale = grad_factor
        if kept:
            grad_scale = row_scale(scale, row, grad_factor)
        grad_scale = grad_scale * known[3]
        total, mean = resolve(words, s_row, t_row, v, mine_s, mine_t, all_width, both, lane, known)
        total = total * known[3]
        if near:
            total = corrected(total, mean, coin)
        if there and lane == I32(0):
            ptx.store_f32(loss + I64(row) * 4, total * loss_factor if kept else ZERO)
        if not gradient:
            return
        if there:
            if not kept or mean > HUGE:
                clear(words, s_row, v, lane)
            else:
                write(words, s_row, t_row, v, mine_s, mine_t, both, lane, known, mean, grad_scale)
        cuda.syncthreads()
        g_head, g_vectors = s_head, s_vectors
        if ((s_at ^ g_at) & I64(15)) != I64(0):
            g_head, g_vectors = s_count, I32(0)
        store(words, s_base, g_at, s_count, tid, g_head, g_vectors)

    return kernel
