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
# float32 slots of the scratch array: per warp (C_t, D_t, C_s, D_s, two sums), then the same per block of the cluster
WARP_SLOTS, RANK_SLOTS = 32, 16
SUMS = 4 * WARP_SLOTS
RANKS = 6 * WARP_SLOTS
SCRATCH = RANKS + 6 * RANK_SLOTS


def merges(threads: int, cluster: int, two_sums: bool = True) -> SimpleNamespace:
    """Device functions ``softmax_two`` and ``sum_two`` for this block and cluster size.

    Without ``two_sums`` the second sum is zero, and nothing is shuffled for it. With them, or more than a warp to a row,
    either is also a barrier.
    """
    warps = threads // 32
    alone = threads * cluster == 32  # a warp has the row, and needs no memory to meet in
    warp_max, warp_sum = butterflies(32)
    warps_max, warps_sum = butterflies(warps)
    ranks_max, ranks_sum = butterflies(cluster)

    @device
    def warp_softmax(c, d):
        top = warp_max(c)
        return top, warp_sum(d * ptx.exp2(c - top))

    @device
    def leave(scratch, tid, c, d, slot):
        """The warp's (C, D) to shared memory; a barrier must follow."""
        c, d = warp_softmax(c, d)
        if (tid & I32(31)) == I32(0):
            w = tid >> I32(5)
            ptx.shared_store(scratch, I32(slot * WARP_SLOTS + w), c)
            ptx.shared_store(scratch, I32((slot + 1) * WARP_SLOTS + w), d)

    @device
    def gather(scratch, tid, slot):
        """(C, D) over the warps: each group of as many lanes as there are warps merges all of them."""
        w = tid & I32(warps - 1)
        c, d = (
            ptx.shared_load(scratch, I32(slot * WARP_SLOTS + w)),
            ptx.shared_load(scratch, I32((slot + 1) * WARP_SLOTS + w)),
        )
        top = warps_max(c)
        return top, warps_sum(d * ptx.exp2(c - top))

    @device
    def tell(scratch, tid, rank, slot, value):
        """This block's value to every block of the cluster; the cluster's barrier must follow."""
        if tid < I32(cluster):
            ptx.cluster_store(scratch, I32(RANKS + slot * RANK_SLOTS) + rank, tid, value)

    @device
    def gather_ranks(scratch, tid, slot):
        r = tid & I32(cluster - 1)
        c, d = (
            ptx.shared_load(scratch, I32(RANKS + slot * RANK_SLOTS + r)),
            ptx.shared_load(scratch, I32(RANKS + (slot + 1) * RANK_SLOTS + r)),
        )
        top = ranks_max(c)
        return top, ranks_sum(d * ptx.exp2(c - top))

    @device
    def meet():
        if cluster > 1:
            ptx.cluster_arrive()
            ptx.cluster_wait()
        else:
            cuda.syncthreads()

    @device
    def softmax_two(scratch, tid, rank, ct, dt, cs, ds):
        """(C, D) of teacher and student over the whole row, to every thread."""
        if alone:
            if two_sums:
                ptx.warp_barrier()
            ct, dt = warp_softmax(ct, dt)
            cs, ds = warp_softmax(cs, ds)
            return ct, dt, cs, ds
        leave(scratch, tid, ct, dt, 0)
        leave(scratch, tid, cs, ds, 2)
        cuda.syncthreads()
        ct, dt = gather(scratch, tid, 0)
        cs, ds = gather(scratch, tid, 2)
        if cluster > 1:
            tell(scratch, tid, rank, 0, ct)
            tell(scratch, tid, rank, 1, dt)
            tell(scratch, tid, rank, 2, cs)
            tell(scratch, tid, rank, 3, ds)
            meet()
            ct, dt = gather_ranks(scratch, tid, 0)
            cs, ds = gather_ranks(scratch, tid, 2)
        return ct, dt, cs, ds

    @device
    def sum_two(scratch, tid, rank, a, b):
        """Two sums over the row, to every thread."""
        a = warp_sum(a)
        if two_sums:
            b = warp_sum(b)
        if alone:
            if two_sums:
                ptx.warp_barrier()
            return a, b
        if (tid & I32(31)) == I32(0):
            w = tid >> I32(5)
            ptx.shared_store(scratch, I32(SUMS + w), a)
            if two_sums:
                ptx.shared_store(scratch, I32(SUMS + WARP_SLOTS + w), b)
        cuda.syncthreads()
        w = tid & I32(warps - 1)
        a = warps_sum(ptx.shared_load(scratch, I32(SUMS + w)))
        if two_sums:
            b = warps_sum(ptx.shared_load(scratch, I32(SUMS + WARP_SLOTS + w)))
        if cluster > 1:
            tell(scratch, tid, rank, 4, a)
            if two_sums:
                tell(scratch, tid, rank, 5, b)
            meet()
            r = tid & I32(cluster - 1)
            a = ranks_sum(ptx.shared_load(scratch, I32(RANKS + 4 * RANK_SLOTS + r)))
            if two_sums:
                b = ranks_sum(ptx.shared_load(scratch, I32(RANKS + 5 * RANK_SLOTS + r)))
        return a, b

    return SimpleNamespace(softmax_two=softmax_two, sum_two=sum_two)
