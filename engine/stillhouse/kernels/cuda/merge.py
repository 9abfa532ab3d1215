"""Sums over the threads of a row: warp by shuffles, block through shared memory, cluster through remote stores.

No atomics: every merge adds in a fixed order, so a result is the same bits in every run. Each warp repeats the last
step of a block's merge on its own, which costs a few shuffles and saves a barrier.
"""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from numba import cuda

from stillhouse.kernels.cuda import intrinsics as ptx
from stillhouse.kernels.cuda.arithmetic import butterflies, device

I32, F32 = np.int32, np.float32
# float32 slots of the scratch array: per warp (C_p, D_p, cross, C_q, D_q, two sums), then the same per block of the cluster
WARP_SLOTS, RANK_SLOTS = 32, 16
SUMS = 5
RANKS = (SUMS + 2) * WARP_SLOTS
SCRATCH = RANKS + (SUMS + 2) * RANK_SLOTS


def merges(threads: int, cluster: int, cross: bool = False) -> SimpleNamespace:
    """Device functions ``softmax_two`` and ``sum_two`` for this block and cluster size.

    Without ``cross`` there is no sum beside the first softmax, and nothing is shuffled for it. Either is also a barrier.
    """
    warps = threads // 32
    alone = threads * cluster == 32  # a warp has the row, and needs no memory to meet in
    warp_max, warp_sum = butterflies(32)
    warps_max, warps_sum = butterflies(warps)
    ranks_max, ranks_sum = butterflies(cluster)

    def merger(top_of, sum_of):
        """Device function: (C, D, x) of a group's lanes to that of the group, x as it belongs to its C."""

        @device
        def merge(c, d, x):
            top = top_of(c)
            share = ptx.exp2(c - top)
            return top, sum_of(d * share), sum_of(x * share) if cross else x

        @device
        def merge_plain(c, d):
            top = top_of(c)
            return top, sum_of(d * ptx.exp2(c - top))

        return merge, merge_plain

    warp_merge, warp_plain = merger(warp_max, warp_sum)
    warps_merge, warps_plain = merger(warps_max, warps_sum)
    ranks_merge, ranks_plain = merger(ranks_max, ranks_sum)

    @device
    def leave(scratch, tid, slot, value):
        """The warp's value to shared memory; a barrier must follow."""
        if (tid & I32(31)) == I32(0):
            ptx.shared_store(scratch, I32(slot * WARP_SLOTS) + (tid >> I32(5)), value)

    @device
    def left(scratch, tid, slot):
        """A warp's value: each group of as many lanes as there are warps reads all of them."""
        return ptx.shared_load(scratch, I32(slot * WARP_SLOTS) + (tid & I32(warps - 1)))

    @device
    def tell(scratch, tid, rank, slot, value):
        """This block's value to every block of the cluster; the cluster's barrier must follow."""
        if tid < I32(cluster):
            ptx.cluster_store(scratch, I32(RANKS + slot * RANK_SLOTS) + rank, tid, value)

    @device
    def told(scratch, tid, slot):
        return ptx.shared_load(scratch, I32(RANKS + slot * RANK_SLOTS) + (tid & I32(cluster - 1)))

    @device
    def meet():
        if cluster > 1:
            ptx.cluster_arrive()
            ptx.cluster_wait()
        else:
            cuda.syncthreads()

    @device
    def softmax_two(scratch, tid, rank, cp, dp, x, cq, dq):
        """(C, D, x) of one side of the whole row and (C, D) of the other, to every thread."""
        if alone:
            ptx.warp_barrier()
        cp, dp, x = warp_merge(cp, dp, x)
        cq, dq = warp_plain(cq, dq)
        if alone:
            return cp, dp, x, cq, dq
        leave(scratch, tid, 0, cp)
        leave(scratch, tid, 1, dp)
        if cross:
            leave(scratch, tid, 2, x)
        leave(scratch, tid, 3, cq)
        leave(scratch, tid, 4, dq)
        cuda.syncthreads()
        x = left(scratch, tid, 2) if cross else x
        cp, dp, x = warps_merge(left(scratch, tid, 0), left(scratch, tid, 1), x)
        cq, dq = warps_plain(left(scratch, tid, 3), left(scratch, tid, 4))
        if cluster > 1:
            tell(scratch, tid, rank, 0, cp)
            tell(scratch, tid, rank, 1, dp)
            if cross:
                tell(scratch, tid, rank, 2, x)
            tell(scratch, tid, rank, 3, cq)
            tell(scratch, tid, rank, 4, dq)
            meet()
            x = told(scratch, tid, 2) if cross else x
            cp, dp, x = ranks_merge(told(scratch, tid, 0), told(scratch, tid, 1), x)
            cq, dq = ranks_plain(told(scratch, tid, 3), told(scratch, tid, 4))
        return cp, dp, x, cq, dq

    @device
    def sum_two(scratch, tid, rank, a, b):
        """Two sums over the row, to every thread."""
        a, b = warp_sum(a), warp_sum(b)
        if alone:
            ptx.warp_barrier()
            return a, b
        leave(scratch, tid, SUMS, a)
        leave(scratch, tid, SUMS + 1, b)
        cuda.syncthreads()
        a, b = warps_sum(left(scratch, tid, SUMS)), warps_sum(left(scratch, tid, SUMS + 1))
        if cluster > 1:
            tell(scratch, tid, rank, SUMS, a)
            tell(scratch, tid, rank, SUMS + 1, b)
            meet()
            a, b = ranks_sum(told(scratch, tid, SUMS)), ranks_sum(told(scratch, tid, SUMS + 1))
        return a, b

    return SimpleNamespace(softmax_two=softmax_two, sum_two=sum_two)
