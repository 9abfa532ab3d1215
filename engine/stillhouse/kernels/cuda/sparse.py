"""Kernels for top-k teachers and sampled labels: the student's row is read once and the gradient written once.

A top-k teacher makes k + 1 outcomes: its entries, and everything else as one (see ``kernels/reference.py``). The
entries are first marked in a bitmap in shared memory; the pass over the row then sums what is not marked, with a
maximum of its own, so that the mass outside is exact however small it is. Each entry's gradient is stored by one
thread before the last pass, which leaves marked elements as they are.
"""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import cuda, types

from stillhouse.kernels.cuda import intrinsics as ptx
from stillhouse.kernels.cuda.arguments import FLOATS, GHOST, SAMPLED, WITHIN
from stillhouse.kernels.cuda.arithmetic import (
    LN2,
    LOWEST,
    ZERO,
    absorb,
    device,
    log2_of,
)
from stillhouse.kernels.cuda.chunks import is_kept, row_geometry, row_scale, walk
from stillhouse.kernels.cuda.merge import SCRATCH, merges
from stillhouse.kernels.cuda.pairs import OF_LOGS, exact_gap, near_pair
from stillhouse.kernels.cuda.vectors import codec

ALIGNMENT = ptx.SHARED_ALIGNMENT
I32, I64, F32, U32 = np.int32, np.int64, np.float32, np.uint32
LOG2E = F32(math.log2(math.e))
MINUS_INFINITY, INFINITY, NAN = F32(-np.inf), F32(np.inf), F32(np.nan)
HUGE = F32(3.0e38)

SIGNATURE = (*[types.int64] * 8, *[types.int32] * 4, *[types.float32] * FLOATS)


@device
def unmarked(x, marks, mark):
    return MINUS_INFINITY if (marks & mark) != U32(0) else x


@device
def others_only(x, marks):
    """Eight logits, the marked ones as -inf."""
    if marks == U32(0):
        return x
    return (
        unmarked(x[0], marks, U32(1)), unmarked(x[1], marks, U32(2)),
        unmarked(x[2], marks, U32(4)), unmarked(x[3], marks, U32(8)),
        unmarked(x[4], marks, U32(16)), unmarked(x[5], marks, U32(32)),
        unmarked(x[6], marks, U32(64)), unmarked(x[7], marks, U32(128)),
    )  # fmt: skip


@device
def chosen(new, old, marks, mark):
    return old if (marks & mark) != U32(0) else new


@device
def keep_marked(new, old, marks):
    return (
        chosen(new[0], old[0], marks, U32(1)), chosen(new[1], old[1], marks, U32(2)),
        chosen(new[2], old[2], marks, U32(4)), chosen(new[3], old[3], marks, U32(8)),
        chosen(new[4], old[4], marks, U32(16)), chosen(new[5], old[5], marks, U32(32)),
        chosen(new[6], old[6], marks, U32(64)), chosen(new[7], old[7], marks, U32(128)),
    )  # fmt: skip


@device
def scaled_powers(x, k2, n, f):
    return (
        f * ptx.exp2(ptx.fma(x[0], k2, n)), f * ptx.exp2(ptx.fma(x[1], k2, n)),
        f * ptx.exp2(ptx.fma(x[2], k2, n)), f * ptx.exp2(ptx.fma(x[3], k2, n)),
        f * ptx.exp2(ptx.fma(x[4], k2, n)), f * ptx.exp2(ptx.fma(x[5], k2, n)),
        f * ptx.exp2(ptx.fma(x[6], k2, n)), f * ptx.exp2(ptx.fma(x[7], k2, n)),
    )  # fmt: skip


@device
def index_at(indices, i, v):
    """The i-th index, or -1 where it is none of the row's: those of a trusted target nobody has looked at."""
    index = ptx.load_i64(indices + I64(i) * 8)
    return I32(index) if index >= I64(0) and index < I64(v) else I32(-1)


@device
def value_at(values, i):
    return ptx.load_f32(values + I64(i) * 4)


def sparse_kernel(
    dtype: str, divergence: str, threads: int, cluster: int, staged: bool, gradient: bool = True
) -> Callable:
    """The kernel (undecorated) of one dtype, divergence, block and cluster size.

    Its arguments: addresses of student, indices (int64), log-probabilities or weights (float32), logarithm
    of the mass outside (float32, or 0), gradient, loss, mask (or 0), scale (or 0); V, k, the mode, chunks in a block's slice; then the
    same factors as for dense teachers. Without ``gradient`` it writes losses only.
    """
    code, pair, of_logs = codec(dtype), near_pair(divergence, exact_gap), OF_LOGS[divergence]
    merge, geometry, steps = (
        merges(threads, cluster),
        row_geometry(code.size),
        walk(code, threads, code.vectors),
    )
    size, forward, marks_at = code.size, divergence == "forward", 4 * code.vectors if staged else 0
    decode, encode, put, put_edge, fetch_edge, stage, unstage, place, load_one, store_one = (
        code.decode, code.encode, code.put, code.put_edge, code.fetch_edge, code.stage, code.unstage, code.place,
        code.load_one, code.store_one,
    )  # fmt: skip
    fetch, fetch_last = code.fetch if staged else code.fetch_kept, code.fetch
    softmax_two, sum_two = merge.softmax_two, merge.sum_two
    whole_of, edges, edge, mine, element_of, clear_row, cell, stride, jump = (
        steps.whole_of, steps.edges, steps.edge, steps.mine, steps.element_of, steps.clear_row, steps.cell,
        steps.stride, steps.jump,
    )  # fmt: skip

    @device
    def mark(words, span, indices, k, v, chunks):
        """Set the bit of every entry in this block's slice. An or of bits is the same in whatever order."""
        origin, apart, lo, hi, tid = chunks[0], chunks[4], chunks[5], chunks[6], chunks[7]
        base = I32(span * marks_at)
        i = tid
        while i < k:
            index = index_at(indices, i, v)
            bit = I32(place(I32(index - origin), apart) - lo * 8)
            if index >= I32(0) and bit >= I32(0) and bit < I32((hi - lo) * 8):
                cuda.atomic.or_(words, U32(base + (bit >> I32(5))), U32(1) << U32(bit & I32(31)))
            i = I32(i + threads)

    @device
    def clear_marks(words, span, tid):
        base, count = I32(span * marks_at), I32(span >> I32(2))
        i = tid
        while i < count:
            ptx.shared_store(words, I32(base + i), ZERO)
            i = I32(i + threads)

    @device
    def marks_of(words, span, slot):
        word = ptx.float_as_word(ptx.shared_load(words, I32(span * marks_at + (slot >> I32(2)))))
        return U32((word >> U32((slot & I32(3)) << I32(3))) & U32(255))

    @device
    def take(words, span, slot, home, a, b, k2, c, d):
        if staged:
            stage(words, home, a, b)
        return absorb(others_only(decode(a, b), marks_of(words, span, slot)), k2, c, d)

    @device
    def absorb_row(words, span, s_row, v, chunks, k2):
        """Keep the row, and (C, D) of what is not marked."""
        c, d = LOWEST, ZERO
        slot, stop, at, home = whole_of(chunks)
        while slot < stop:
            a, b = fetch(s_row + at, chunks[4])
            c, d = take(words, span, slot, home, a, b, k2, c, d)
            slot, at, home = ptx.uncounted(slot + threads), at + stride, I32(home + jump)
        j = chunks[7]
        while j < edges(chunks):
            chunk = edge(j, chunks)
            if mine(chunk, chunks):
                a, b = fetch_edge(s_row, element_of(chunk, chunks), v, chunks[4])
                slot = I32(chunk - chunks[5])
                c, d = take(words, span, slot, cell(slot, chunks), a, b, k2, c, d)
            j = I32(j + threads)
        return c, d

    @device
    def absorb_entries(s_row, indices, k, v, k2, tid):
        """(C, D) of the k entries alone."""
        c, d = LOWEST, ZERO
        i = tid
        while i < k:
            index = index_at(indices, i, v)
            if index >= I32(0):
                x = load_one(s_row + I64(index) * size)
                higher = ptx.fmax(x * k2, c)
                d = ptx.fma(d, ptx.exp2(c - higher), ptx.exp2(ptx.fma(x, k2, -higher)))
                c = higher
            i = I32(i + threads)
        return c, d

    @device
    def outcome(log_p, log_q, coin):
        """The pair function of two log2-probabilities."""
        known = of_logs(coin)
        a, b, c = pair(log_p, log_q, known)
        return a * known[3], b * known[3], c * known[3]

    @device
    def entry_sums(s_row, indices, values, k, v, mode, k2, n, log_d, coin, shift, tid):
        """(loss, mean) over the entries; an index that is none of the row's makes them NaN and infinite.

        The mean of forward is what its gradient sums to: the error of a normaliser, or of a teacher whose outcomes do
        not sum to one.
        """
        total, mean = ZERO, ZERO
        i = tid
        while i < k:
            index, x = index_at(indices, i, v), ZERO
            if index >= I32(0):
                x = load_one(s_row + I64(index) * size)
            log_q, value = ptx.fma(x, k2, n) - log_d, value_at(values, i)
            if index < I32(0):
                total, mean = NAN, INFINITY
            elif mode == I32(SAMPLED):
                if value > ZERO:  # 0 times -inf is NaN
                    total, mean = total - value * log_q * LN2, mean + value
            else:
                a, b, c = outcome(value * LOG2E, log_q, coin)
                total, mean = total + a, mean + ptx.fma(b, -shift, c)
            i = I32(i + threads)
        return total, mean

    @device
    def weight_of(indices, values, k, v, i, index):
        """(Is this the first draw of that index?, the weight of all of its draws)."""
        first, weight = True, ZERO
        j = I32(0)
        while j < k:
            if index_at(indices, j, v) == index:
                weight = weight + value_at(values, j)
                if j < i:
                    first = False
            j = I32(j + 1)
        return first, weight

    @device
    def write_entries(
        s_row, g_row, indices, values, k, v, mode, k2, n, log_d, coin, mean, grad_scale, chunks
    ):
        i = chunks[7]
        while i < k:
            index = index_at(indices, i, v)
            bit = place(I32(index - chunks[0]), chunks[4])
            if index >= I32(0) and mine(bit >> I32(3), chunks):
                first, weight = True, ZERO
                if mode == I32(SAMPLED):
                    first, weight = weight_of(indices, values, k, v, i, index)
                if first:  # the others must not read what the first one overwrites
                    log_q = ptx.fma(load_one(s_row + I64(index) * size), k2, n) - log_d
                    if mode == I32(SAMPLED):
                        gradient = mean * ptx.exp2(log_q) - weight
                    else:
                        a, b, c = outcome(value_at(values, i) * LOG2E, log_q, coin)
                        gradient = ptx.fma(b, -mean, c)
                    store_one(g_row + I64(index) * size, gradient * grad_scale)
            i = I32(i + threads)

    @device
    def write_row(words, span, s_row, g_row, v, chunks, k2, n, f):
        """Write f 2^(k2 x - C) everywhere but at the marked elements, which have their gradient already."""
        slot, stop, at, home = whole_of(chunks)
        while slot < stop:
            if staged:
                a, b = unstage(words, home)
            else:
                a, b = fetch_last(s_row + at, chunks[4])
            gradient, marks = scaled_powers(decode(a, b), k2, n, f), marks_of(words, span, slot)
            if marks != U32(0):
                a, b = fetch_last(g_row + at, chunks[4])
                gradient = keep_marked(gradient, decode(a, b), marks)
            a, b = encode(gradient)
            put(g_row + at, chunks[4], a, b)
            slot, at, home = ptx.uncounted(slot + threads), at + stride, I32(home + jump)
        j = chunks[7]
        while j < edges(chunks):
            chunk = edge(j, chunks)
            if mine(chunk, chunks):
                e = element_of(chunk, chunks)
                slot = I32(chunk - chunks[5])
                if staged:
                    a, b = unstage(words, cell(slot, chunks))
                else:
                    a, b = fetch_edge(s_row, e, v, chunks[4])
                gradient, marks = scaled_powers(decode(a, b), k2, n, f), marks_of(words, span, slot)
                if marks != U32(0):
                    a, b = fetch_edge(g_row, e, v, chunks[4])
                    gradient = keep_marked(gradient, decode(a, b), marks)
                a, b = encode(gradient)
                put_edge(g_row, e, v, chunks[4], a, b)
            j = I32(j + threads)

    @device
    def row_sums(mode, ck, dk, co, do):
        """(C, log2 D) of the student's distribution, and log2 of the mass outside of the k entries."""
        if mode == I32(WITHIN):
            return ck, log2_of(dk), MINUS_INFINITY
        c = co
        d = do
        if mode != I32(SAMPLED):
            c = ptx.fmax(ck, co)
            d = dk * ptx.exp2(ck - c) + do * ptx.exp2(co - c)
        log_d = log2_of(d)
        return c, log_d, (co - c) + log2_of(do) - log_d

    def kernel(
        s, indices, values, outside, g, loss, mask, scale, v, k, mode, span, k2, grad_factor, loss_factor,
        odds, log_odds, log_t, log_s, s0, s1, s2, s3, s4, s5, s6, s7, l0, l1, l2, l3, l4, l5, l6, l7,
    ):  # fmt: skip
        coin = (
            odds, log_odds, log_t, log_s, s0, s1, s2, s3, s4, s5, s6, s7, l0, l1, l2, l3, l4, l5, l6, l7,
        )  # fmt: skip
        words = cuda.shared.array(0, types.uint32, alignment=ALIGNMENT)
        scratch = cuda.shared.array(SCRATCH, np.float32)
        tid = I32(cuda.threadIdx.x)
        row = I32(I32(cuda.blockIdx.x) // I32(cluster))
        rank = I32(0)
        if cluster > 1:
            ptx.cluster_arrive()
            rank = ptx.cluster_rank()
        s_row, g_row = s + I64(row) * v * size, g + I64(row) * v * size
        indices, values = indices + I64(row) * k * 8, values + I64(row) * k * 4
        origin, first, last, count, apart = geometry(s_row, s_row, g_row, v, v)
        lo = I32(rank * span)
        chunks = (origin, first, last, count, apart, lo, min(I32(lo + span), count), tid, I32(0))
        leader = rank == I32(0) and tid == I32(0)
        if not is_kept(mask, row):
            if cluster > 1:
                ptx.cluster_wait()
            if gradient:
                clear_row(g_row, v, chunks)
            if leader:
                ptx.store_f32(loss + I64(row) * 4, ZERO)
            return

        clear_marks(words, span, tid)
        cuda.syncthreads()
        if mode != I32(SAMPLED):
            mark(words, span, indices, k, v, chunks)
            cuda.syncthreads()
        co, do = absorb_row(words, span, s_row, v, chunks, k2)
        ck, dk = LOWEST, ZERO
        if rank == I32(0) and mode != I32(SAMPLED):
            ck, dk = absorb_entries(s_row, indices, k, v, k2, tid)
        if cluster > 1:
            ptx.cluster_wait()
        ck, dk, _, co, do = softmax_two(scratch, tid, rank, ck, dk, ZERO, co, do)
        c, log_d, log_rest = row_sums(mode, ck, dk, co, do)
        n = -c

        # What is outside is one outcome more, unless nothing is. Where it has most of the mass, the mean of the
        # logarithms is nearly its own: taking all of them relative to it keeps the digits of the difference.
        rest = mode != I32(SAMPLED) and mode != I32(WITHIN) and k < v
        rest_loss, rest_third, shift, over = ZERO, ZERO, ZERO, ZERO
        if rest:
            log_p = MINUS_INFINITY
            if mode == I32(GHOST):
                log_p = value_at(outside, row) * LOG2E
            rest_loss, _, rest_third = outcome(log_p, log_rest, coin)
            if log_rest > F32(-120.0):
                over = ptx.exp2(-log_rest)
                if not forward and rest_third < HUGE:
                    shift = rest_third * over
        total, mean = ZERO, ZERO
        if rank == I32(0):
            total, mean = entry_sums(s_row, indices, values, k, v, mode, k2, n, log_d, coin, shift, tid)
            if leader and rest:
                total = total + rest_loss
                if shift == ZERO:
                    mean = mean + rest_third
        total, mean = sum_two(scratch, tid, rank, total, mean)
        grad_scale = row_scale(scale, row, grad_factor)
        share = -mean  # of its probability that an unmarked gradient is
        if shift == ZERO:
            share = ptx.fma(rest_third, over, -mean)
        if mode == I32(SAMPLED):
            share = mean
        elif mode == I32(WITHIN):
            share = ZERO
        if leader:
            ptx.store_f32(loss + I64(row) * 4, total * loss_factor)
        if not gradient:
            return

        if mean > HUGE:  # as for dense teachers: loss inf, or NaN for an index out of range, and no gradient
            clear_row(g_row, v, chunks)
            return
        centre = mean if mode == I32(SAMPLED) else mean + shift
        write_entries(
            s_row, g_row, indices, values, k, v, mode, k2, n, log_d, coin, centre, grad_scale, chunks
        )
        if mode == I32(SAMPLED):
            mark(words, span, indices, k, v, chunks)
        cuda.syncthreads()
        if mode == I32(WITHIN):
            n = LOWEST  # logits outside may lie above the maximum of the k: zero, not zero times infinity
        write_row(words, span, s_row, g_row, v, chunks, k2, n, grad_scale * share * ptx.exp2(-log_d))

    return kernel
