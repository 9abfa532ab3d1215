"""Sums over the threads of a row: warp by shuffles, block through shared memory, cluster through remote stores.

No atomics: every merge adds in a fixed order, so a result is the same bits in every run. Each warp repeats the last
step of a block's merge on its own, which costs a few shuffles and saves a barrier.
"""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda

from stillhouse.kernels.cuda import intrinsics as ptx
from stillhouse.kernels.cuda.arithmetic import butterflies, device, unrolled

I32, F32 = np.int32, np.float32
# float32 slots of the scratch array: what each warp knows of a row, then what each block of the cluster does
WARP_SLOTS, RANK_SLOTS = 32, 16
NUMBERS = 10  # of a row: up to three softmaxes (C, D) and the sum of its logits, then three sums
SUMS = 7
RANKS = NUMBERS * WARP_SLOTS
SCRATCH = RANKS + NUMBERS * RANK_SLOTS


def softmaxes(count: int, sums: int = 0) -> Callable[[Callable, Callable], Callable]:
    """How numbers (C, D) x ``count``, then ``sums`` sums, of a group's lanes become those of the group."""

    def reducer(top_of, sum_of):
        @device
        def merge(c, d):
            top = top_of(c)
            return top, sum_of(d * ptx.exp2(c - top))

        pairs = [(f"c{i}, d{i}", f"x[{2 * i}], x[{2 * i + 1}]") for i in range(count)]
        lines = "; ".join(f"{into} = merge({of})" for into, of in pairs) or "pass"
        parts = [into for into, _ in pairs] + [f"total(x[{2 * count + i}])" for i in range(sums)]
        return unrolled(1, "x", f"({', '.join(parts)},)", lines, merge=merge, total=sum_of)

    return reducer


def meeting(threads: int, cluster: int, first: int, count: int, reducer: Callable) -> Callable:
    """Device function ``meet(scratch, tid, rank, x)``: ``count`` numbers of a thread to those of the row, to every thread.

    They take ``count`` slots of the scratch array from ``first`` on. It is a barrier.
    """
    warps = threads // 32
    alone = threads * cluster == 32  # a warp has the row, and needs no memory to meet in
    of_warp, of_warps, of_ranks = (reducer(*butterflies(width)) for width in (32, warps, cluster))

    @device
    def leave_one(scratch, tid, slot, value):
        if (tid & I32(31)) == I32(0):
            ptx.shared_store(scratch, I32(slot * WARP_SLOTS) + (tid >> I32(5)), value)

    @device
    def left_one(scratch, tid, slot):
        """A warp's value: each group of as many lanes as there are warps reads all of them."""
        return ptx.shared_load(scratch, I32(slot * WARP_SLOTS) + (tid & I32(warps - 1)))

    @device
    def tell_one(scratch, tid, rank, slot, value):
        if tid < I32(cluster):
            ptx.cluster_store(scratch, I32(RANKS + slot * RANK_SLOTS) + rank, tid, value)

    @device
    def told_one(scratch, tid, slot):
        return ptx.shared_load(scratch, I32(RANKS + slot * RANK_SLOTS) + (tid & I32(cluster - 1)))

    names = {"leave": leave_one, "left": left_one, "tell": tell_one, "told": told_one}
    leave = unrolled(count, "m, tid, x", "I32(0)", f"leave(m, tid, # + {first}, x[#])", **names)
    left = unrolled(count, "m, tid", f"*(left(m, tid, # + {first}))", **names)
    tell = unrolled(count, "m, tid, rank, x", "I32(0)", f"tell(m, tid, rank, # + {first}, x[#])", **names)
    told = unrolled(count, "m, tid", f"*(told(m, tid, # + {first}))", **names)

    @device
    def meet(scratch, tid, rank, x):
        if alone:
            cuda.syncthreads()
        x = of_warp(x)
        if alone:
            return x
        leave(scratch, tid, x)
        cuda.syncthreads()
        x = of_warps(left(scratch, tid))
        if cluster > 1:
            tell(scratch, tid, rank, x)
            ptx.cluster_arrive()
            ptx.cluster_wait()
            x = of_ranks(told(scratch, tid))
        return x

    return meet
