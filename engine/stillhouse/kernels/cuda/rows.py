"""Kernels for dense teachers and V > 64: a row by a warp, by one block, or by the blocks of a cluster.

One pass over memory where the row pair fits in (distributed) shared memory, two where it does not (``staged=False``).
A row's chunks are dealt to the blocks of the cluster in contiguous slices, and within a block to threads in turn. Warps
that have a row each share nothing, so they need no barrier.
"""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import cuda, types

from stillhouse.kernels.cuda import intrinsics as ptx
from stillhouse.kernels.cuda.arguments import FLOATS
from stillhouse.kernels.cuda.arithmetic import (
    LOWEST,
    ZERO,
    absorb,
    absorb_beside,
    centred,
    device,
    floats,
    scaled,
    sum8,
)
from stillhouse.kernels.cuda.chunks import is_kept, row_geometry, row_scale, walk
from stillhouse.kernels.cuda.merge import SCRATCH, merges
from stillhouse.kernels.cuda.pairs import (
    CORRECTED,
    KNOWN,
    NEAR_KNOWN,
    PAIRS,
    agreement,
    compare,
    exact_gap,
    near_after_all,
    near_pair,
    rounded_gap,
)
from stillhouse.kernels.cuda.vectors import PLANE, codec

ALIGNMENT = ptx.SHARED_ALIGNMENT
I32, I64, F32 = np.int32, np.int64, np.float32
HUGE = F32(3.0e38)


def eight_pairs(pair):
    """Device function: a pair function over eight elements -> (sum of losses, second results, third results)."""

    @device
    def eight(xs, xt, known):
        a0, b0, c0 = pair(xt[0], xs[0], known)
        a1, b1, c1 = pair(xt[1], xs[1], known)
        a2, b2, c2 = pair(xt[2], xs[2], known)
        a3, b3, c3 = pair(xt[3], xs[3], known)
        a4, b4, c4 = pair(xt[4], xs[4], known)
        a5, b5, c5 = pair(xt[5], xs[5], known)
        a6, b6, c6 = pair(xt[6], xs[6], known)
        a7, b7, c7 = pair(xt[7], xs[7], known)
        losses = sum8((a0, a1, a2, a3, a4, a5, a6, a7))
        return losses, (b0, b1, b2, b3, b4, b5, b6, b7), (c0, c1, c2, c3, c4, c5, c6, c7)

    return eight


@device
def warp_span(width):
    """Slots for the chunks of a row that a warp has, as in plan."""
    return I32(I32(I32(width + 14) >> I32(3)) + 31) & I32(-32)


SIGNATURE = (*[types.int64] * 6, *[types.int32] * 5, *[types.float32] * FLOATS)


def rows_kernel(
    dtype: str,
    divergence: str,
    threads: int,
    cluster: int,
    staged: bool,
    gradient: bool = True,
    lanes: int = 0,
) -> Callable:
    """The kernel (undecorated) of one dtype, divergence, block and cluster size; with ``lanes`` of 32, a warp a row.

    Its arguments: addresses of student, teacher, gradient (float or 16-bit), loss (float32), mask (bool, or 0), scale
    (float32, or 0); V, the stride of teacher rows, the widths over which either side has mass, chunks in a block's
    slice (with ``lanes``: the number of rows); log2(e)/T, the factors of gradients (times scale) and of losses, and what
    ``arguments.coin`` has. Without ``gradient`` it writes losses only, and g is not read.
    """
    code, wide = codec(dtype), codec("f32")
    merge = merges(lanes or threads, cluster, cross=True)
    size, forward, of_student = code.size, divergence == "forward", divergence == "reverse"
    # vectors of shared memory for a chunk: its logits, or two float32 results in their place
    planes, second = (2 * code.vectors if forward else 4), code.vectors * PLANE
    # how a gradient is written: with the loss, or relative to a mean over the row, from what has taken the logits' place or
    # from the logits again; that of rows that nearly agree has its error of a normaliser taken out, unless 16 bits hide it
    relative = "replace" if staged else "repeat"
    how, how_near = (
        ("at once" if forward else relative),
        ("at once" if forward and size == 2 else relative),
    )
    if not gradient:
        how, how_near = "loss", "mean"
    done, near_done = how != relative, how_near != relative  # after the second pass
    alike = how == how_near == "replace"
    nearly_agree, corrected = agreement(divergence), CORRECTED[divergence]
    pair_near = near_pair(divergence, exact_gap if size == 4 else rounded_gap, how_near != "at once")
    decode, encode, put, put_edge, fetch_edge, stage, unstage, decode_wide, unstage_wide = (
        code.decode, code.encode, code.put, code.put_edge, code.fetch_edge, code.stage, code.unstage, wide.decode,
        wide.unstage,
    )  # fmt: skip
    team = lanes or threads  # of the threads that share a row
    steps = walk(code, team, planes)
    whole_of, edges, edge, mine, element_of, clear_row, cell, stride, jump = (
        steps.whole_of, steps.edges, steps.edge, steps.mine, steps.element_of, steps.clear_row, steps.cell,
        steps.stride, steps.jump,
    )  # fmt: skip
    fetch, fetch_last, word = code.fetch if staged else code.fetch_kept, code.fetch, ptx.float_as_word
    softmax_two, sum_two = merge.softmax_two, merge.sum_two
    geometry = row_geometry(size, sectors=not lanes)

    @device
    def take(words, home, sa, sb, ta, tb, k2, state):
        if staged:
            stage(words, home, sa, sb)
            stage(words, I32(home + second), ta, tb)
        xs, xt = decode(sa, sb), decode(ta, tb)
        xp, xq = (xs, xt) if of_student else (xt, xs)
        cp, dp, cross = absorb_beside(xp, xq, k2, state[0], state[1], state[2])
        cq, dq = absorb(xq, k2, state[3], state[4])
        return cp, dp, cross, cq, dq

    @device
    def absorb_row(words, place, chunks, k2):
        """First pass: read both rows, keep them, and this thread's (C, D) of each, with what tells whether they agree."""
        s_row, t_row, g_row, v, s_width, t_width = place
        state = (LOWEST, ZERO, ZERO, LOWEST, ZERO)
        slot, stop, at, home = whole_of(chunks)
        while slot < stop:
            sa, sb = fetch(s_row + at, chunks[4])
            ta, tb = fetch(t_row + at, chunks[4])
            state = take(words, home, sa, sb, ta, tb, k2, state)
            slot, at, home = ptx.uncounted(slot + team), at + stride, I32(home + jump)
        j = chunks[7]
        while j < edges(chunks):
            chunk = edge(j, chunks)
            if mine(chunk, chunks):
                e = element_of(chunk, chunks)
                sa, sb = fetch_edge(s_row, e, s_width, chunks[4])
                ta, tb = fetch_edge(t_row, e, t_width, chunks[4])
                state = take(words, cell(I32(chunk - chunks[5]), chunks), sa, sb, ta, tb, k2, state)
            j = I32(j + team)
        return state

    @device
    def staged_pair(words, home):
        sa, sb = unstage(words, home)
        ta, tb = unstage(words, I32(home + second))
        return decode(sa, sb), decode(ta, tb)

    @device
    def whole_pair(words, home, s_row, t_row, at, apart):
        if staged:
            return staged_pair(words, home)
        sa, sb = fetch_last(s_row + at, apart)
        ta, tb = fetch_last(t_row + at, apart)
        return decode(sa, sb), decode(ta, tb)

    @device
    def edge_pair(words, home, s_row, t_row, s_width, t_width, e, apart):
        if staged:
            return staged_pair(words, home)
        sa, sb = fetch_edge(s_row, e, s_width, apart)
        ta, tb = fetch_edge(t_row, e, t_width, apart)
        return decode(sa, sb), decode(ta, tb)

    @device
    def kept(words, home):
        pa, pb = unstage_wide(words, home)
        wa, wb = unstage_wide(words, I32(home + 2 * PLANE))
        return decode_wide(pa, pb), decode_wide(wa, wb)

    def passes(pair, known_of, how):
        """Device functions of the passes after the first, for one of the two ways to compare a pair of logits."""
        eight, writes, means, replaces = (
            eight_pairs(pair),
            how == "at once",
            how in ("repeat", "mean"),
            how == "replace",
        )

        @device
        def four(words, at, xs, xt, known):
            """(sums of losses and of third results); the second and third stay in float32, whatever the logits' dtype."""
            a0, b0, c0 = pair(xt[0], xs[0], known)
            a1, b1, c1 = pair(xt[1], xs[1], known)
            a2, b2, c2 = pair(xt[2], xs[2], known)
            a3, b3, c3 = pair(xt[3], xs[3], known)
            ptx.shared_store_words(words, at, word(b0), word(b1), word(b2), word(b3))
            ptx.shared_store_words(words, I32(at + 2 * PLANE), word(c0), word(c1), word(c2), word(c3))
            return (a0 + a1) + (a2 + a3), (c0 + c1) + (c2 + c3)

        @device
        def replace(words, home, known):
            """A staged chunk's logits by what its gradient is made of; four by four, or registers run out."""
            if size == 4:
                xs, xt = ptx.shared_load_words(words, home), ptx.shared_load_words(words, I32(home + second))
                a0, c0 = four(words, home, floats(xs), floats(xt), known)
                other = I32(home + PLANE)
                xs, xt = (
                    ptx.shared_load_words(words, other),
                    ptx.shared_load_words(words, I32(other + second)),
                )
                a1, c1 = four(words, other, floats(xs), floats(xt), known)
            else:
                xs, xt = staged_pair(words, home)
                a0, c0 = four(words, home, xs[:4], xt[:4], known)
                a1, c1 = four(words, I32(home + PLANE), xs[4:], xt[4:], known)
            return a0 + a1, c0 + c1

        @device
        def replace_row(words, place, chunks, sides, coin, grad_scale):
            """Second pass over a staged row whose gradient needs a mean: no edges here, and barriers before and after."""
            known = known_of(sides, coin)
            total, mean, slot = ZERO, ZERO, chunks[7]
            home = cell(slot, chunks)
            while slot < I32(chunks[6] - chunks[5]):
                a, c = replace(words, home, known)
                total, mean = total + a, mean + c
                slot, home = ptx.uncounted(slot + team), I32(home + jump)
            return total, mean, known[3]

        @device
        def resolve_row(words, place, chunks, sides, coin, grad_scale):
            """Second pass: the loss, the gradient or the mean that it is taken relative to, and the factor of all of them."""
            s_row, t_row, g_row, v, s_width, t_width = place
            known = known_of(sides, coin)
            total, mean, grad_scale = ZERO, ZERO, grad_scale * known[3]
            slot, stop, at, home = whole_of(chunks)
            while slot < stop:
                xs, xt = whole_pair(words, home, s_row, t_row, at, chunks[4])
                a, b, c = eight(xs, xt, known)
                total = total + a
                if writes:
                    ga, gb = encode(scaled(b, grad_scale))
                    put(g_row + at, chunks[4], ga, gb)
                if means:
                    mean = mean + sum8(c)
                slot, at, home = ptx.uncounted(slot + team), at + stride, I32(home + jump)
            j = chunks[7]
            while j < edges(chunks):
                chunk = edge(j, chunks)
                if mine(chunk, chunks):
                    e, home = element_of(chunk, chunks), cell(I32(chunk - chunks[5]), chunks)
                    xs, xt = edge_pair(words, home, s_row, t_row, s_width, t_width, e, chunks[4])
                    a, b, c = eight(xs, xt, known)
                    total = total + a
                    if writes:
                        ga, gb = encode(scaled(b, grad_scale))
                        put_edge(g_row, e, v, chunks[4], ga, gb)
                    if means:
                        mean = mean + sum8(c)
                j = I32(j + team)
            return total, mean, known[3]

        @device
        def write_row(words, place, chunks, sides, coin, mean, grad_scale):
            """Third pass, of gradients that need a mean over the row."""
            s_row, t_row, g_row, v, s_width, t_width = place
            if not replaces:
                known = known_of(sides, coin)
            slot, stop, at, home = whole_of(chunks)
            while slot < stop:
                if replaces:
                    b, c = kept(words, home)
                else:
                    xs, xt = whole_pair(words, home, s_row, t_row, at, chunks[4])
                    a, b, c = eight(xs, xt, known)
                ga, gb = encode(centred(b, c, mean, grad_scale))
                put(g_row + at, chunks[4], ga, gb)
                slot, at, home = ptx.uncounted(slot + team), at + stride, I32(home + jump)
            j = chunks[7]
            while j < edges(chunks):
                chunk = edge(j, chunks)
                if mine(chunk, chunks):
                    e, home = element_of(chunk, chunks), cell(I32(chunk - chunks[5]), chunks)
                    if replaces:
                        b, c = kept(words, home)
                    else:
                        xs, xt = edge_pair(words, home, s_row, t_row, s_width, t_width, e, chunks[4])
                        a, b, c = eight(xs, xt, known)
                    ga, gb = encode(centred(b, c, mean, grad_scale))
                    put_edge(g_row, e, v, chunks[4], ga, gb)
                j = I32(j + team)

        return (replace_row if replaces else resolve_row), write_row

    resolve, write = passes(PAIRS[divergence], KNOWN[divergence], how)
    resolve_near, write_near = passes(pair_near, NEAR_KNOWN[divergence], how_near)

    def kernel(
        s, t, g, loss, mask, scale, v, t_stride, s_width, t_width, span, k2, grad_factor, loss_factor,
        odds, log_odds, log_t, log_s, s0, s1, s2, s3, s4, s5, s6, s7, l0, l1, l2, l3, l4, l5, l6, l7,
    ):  # fmt: skip
        coin = (
            odds, log_odds, log_t, log_s, s0, s1, s2, s3, s4, s5, s6, s7, l0, l1, l2, l3, l4, l5, l6, l7,
        )  # fmt: skip
        words = cuda.shared.array(0, types.uint32, alignment=ALIGNMENT)
        scratch = cuda.shared.array(SCRATCH, np.float32)
        tid = I32(cuda.threadIdx.x)
        row = I32(I32(cuda.blockIdx.x) // I32(cluster))
        rank, base = I32(0), I32(0)
        if lanes:
            row, rows = I32(I32(row * (threads // lanes)) + (tid >> I32(5))), span
            if row >= rows:
                return
            span = warp_span(max(v, max(s_width, t_width)))
            base = I32((tid >> I32(5)) * span * (4 * planes))
            tid = tid & I32(31)
        if cluster > 1:
            ptx.cluster_arrive()  # no block may be written to before it has started: waited for before the merge
            rank = ptx.cluster_rank()
        s_row = s + I64(row) * v * size
        t_row = t + I64(row) * t_stride * size
        g_row = g + I64(row) * v * size
        whole = min(v, min(s_width, t_width))
        origin, first, last, count, apart = geometry(
            s_row, t_row, g_row, max(v, max(s_width, t_width)), whole
        )
        lo = I32(rank * span)
        chunks = (origin, first, last, count, apart, lo, min(I32(lo + span), count), tid, base)
        place = (s_row, t_row, g_row, v, s_width, t_width)
        leader = rank == I32(0) and tid == I32(0)
        if not is_kept(mask, row):
            if cluster > 1:
                ptx.cluster_wait()
            if gradient:
                clear_row(g_row, v, chunks)
            if leader:
                ptx.store_f32(loss + I64(row) * 4, ZERO)
            return

        grad_scale = ZERO
        if how == "at once":
            grad_scale = row_scale(scale, row, grad_factor)
        again, forced = True, False
        while again:
            cp, dp, cross, cq, dq = absorb_row(words, place, chunks, k2)
            if cluster > 1 and not forced:
                ptx.cluster_wait()
            cp, dp, cross, cq, dq = softmax_two(scratch, tid, rank, cp, dp, cross, cq, dq)
            sides = compare(k2, cp, dp, cq, dq)
            near = forced or nearly_agree(sides, cross)
            if near:
                total, mean, unit = resolve_near(words, place, chunks, sides, coin, grad_scale)
            else:
                total, mean, unit = resolve(words, place, chunks, sides, coin, grad_scale)
            total, mean = sum_two(scratch, tid, rank, total, mean)
            again = divergence == "jsd" and not near and near_after_all(total * unit, coin)
            forced = True  # from the logits on, whose place results may have taken; the sums were a barrier
        total, mean = total * unit, mean * unit
        if leader:
            if near and how_near != "at once":
                total = corrected(total, mean, coin)
            ptx.store_f32(loss + I64(row) * 4, total * loss_factor)
        if near and near_done:
            return
        if not near and done:
            return
        grad_scale = row_scale(scale, row, grad_factor) * unit  # not before, for want of registers
        if mean > HUGE:  # the teacher rules out what the student believes in: loss inf, and no gradient
            clear_row(g_row, v, chunks)
        elif near and not alike:
            if not near_done:
                write_near(words, place, chunks, sides, coin, mean, grad_scale)
        elif not done:
            write(words, place, chunks, sides, coin, mean, grad_scale)

    return kernel
