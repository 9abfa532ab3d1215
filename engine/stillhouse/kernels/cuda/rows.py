"""What the kernels share: a row by a block, or by the blocks of a cluster; its mask, its label, its chunks.

A row's chunks are dealt to the blocks of the cluster in contiguous slices, and within a block to threads in turn. What the first
pass has read stays in shared memory, or is read again where it does not fit (``staged`` is False).

``place`` is (student, second tensor, gradient: addresses of the row; V, the widths in which either side has mass, chunks of a slice);
``chunks`` is (origin, first, last, count, lo, hi, tid): chunk 0 starts at element ``origin`` (at most 0), chunks [first, last) are
whole, ``count`` is their number, and this block has [lo, hi) of them.
"""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from numba import cuda

from stillhouse.kernels.cuda import intrinsics as ptx
from stillhouse.kernels.cuda.arithmetic import LN2, LOG2E, ONE, ZERO, device, log2_of, unrolled
from stillhouse.kernels.cuda.plan import Spec
from stillhouse.kernels.series import NO_LABEL

I32, I64, F32 = np.int32, np.int64, np.float32
NAN, HUGE = F32(np.nan), F32(3.0e38)
# where the numbers lie that are the same for all rows, and in which order: see ``arguments.constants``
K2, GRADIENT, LOSS, SMOOTHING, COIN = range(5)
COINS = 20
coin_of = unrolled(COINS, "at", f"*(load(at + 4 * (# + {COIN})))", load=ptx.load_f32)


def geometry(code: SimpleNamespace) -> Callable:
    """Device function: (origin, first, last, count) of a row of ``width``, of which [0, whole) is there on every tensor.

    Tensors that are not aligned alike have no whole chunk: all of the row then moves by element.
    """
    size, per = code.size, code.per

    @device
    def cut(s_row, t_row, g_row, width, whole):
        head = I32(I32(I32(16) - I32(s_row & I64(15))) & I32(15)) >> I32(size >> 1)
        origin = I32(head - per) if head > I32(0) else I32(0)
        first = I32(1) if head > I32(0) else I32(0)
        count, last = I32(width - origin + per - 1) // I32(per), I32(whole - origin) // I32(per)
        if ((s_row ^ t_row) | (s_row ^ g_row)) & I64(15) != I64(0) or last < first:
            first, last = I32(0), I32(0)
        return origin, first, last, count

    return cut


def sweep(code: SimpleNamespace, team: int, make: Callable) -> Callable:
    """Device function over this thread's chunks of a row: whole ones, then those at its edges.

    ``make(access)`` gives the step, of which there is one for either: ``step(words, place, e, slot, state, given)`` from element
    ``e`` on gives the next state.
    """
    whole, edge, per = make(code.whole), make(code.edge), code.per

    @device
    def run(words, place, chunks, state, given):
        origin, first, last, count, lo, hi, tid = chunks
        chunk = I32(lo + tid)
        # at most one before them hangs over the row's start
        chunk = chunk if chunk >= first else I32(chunk + team)
        while chunk < min(hi, last):
            state = whole(words, place, I32(origin + chunk * per), I32(chunk - lo), state, given)
            chunk = ptx.uncounted(chunk + team)
        j = tid
        while j < I32(first + count - last):
            chunk = j if j < first else I32(j - first + last)
            if chunk >= lo and chunk < hi:
                state = edge(words, place, I32(origin + chunk * per), I32(chunk - lo), state, given)
            j = I32(j + team)
        return state

    return run


def clearing(code: SimpleNamespace, team: int) -> Callable:
    """Device function: the gradient of a row is zero."""
    encode, nothing = code.encode, (ZERO,) * code.per

    def make(access):
        put = access.put

        @device
        def step(words, place, e, slot, state, given):
            put(place[2], e, place[3], encode(nothing))
            return state

        return step

    return sweep(code, team, make)


def beginning(code: SimpleNamespace, cluster: int) -> Callable:
    """Device function: (row, rank in the cluster, ``place``, chunks of this block) from the first row's addresses."""
    cut, size = geometry(code), code.size

    @device
    def begin(s, t, g, v, t_stride, s_width, t_width, span):
        row, rank = I32(I32(cuda.blockIdx.x) // I32(cluster)), I32(0)
        if cluster > 1:
            ptx.cluster_arrive()  # no block may be written to before it has started: waited for before the first meeting
            rank = ptx.cluster_rank()
        s_row, t_row = s + I64(row) * v * size, t + I64(row) * t_stride * size
        g_row = g + I64(row) * v * size
        widest, whole = max(v, max(s_width, t_width)), min(v, min(s_width, t_width))
        origin, first, last, count = cut(s_row, t_row, g_row, widest, whole)
        lo = I32(rank * span)
        chunks = (origin, first, last, count, lo, min(I32(lo + span), count), I32(cuda.threadIdx.x))
        return row, rank, (s_row, t_row, g_row, v, s_width, t_width, span), chunks

    return begin


def is_kept(mask, row):
    keep = True
    if mask != I64(0):
        keep = ptx.load_u8(mask + I64(row)) != np.uint32(0)
    return keep


def times(factor, scales, term):
    """The factor of a term's gradient: a number, and one in memory where it is known on the device alone."""
    if scales != I64(0):
        factor = factor * ptx.load_f32(scales + 4 * term)
    return factor


is_kept, times = device(is_kept), device(times)


def store_losses(spec: Spec) -> Callable:
    """Device function: both terms of a row, the second in the second half of the losses."""
    labels, cluster = spec.labels, spec.cluster

    @device
    def store(loss, row, soft, label):
        ptx.store_f32(loss + I64(row) * 4, soft)
        if labels:
            rows = I64(cuda.gridDim.x) // I64(cluster)
            ptx.store_f32(loss + (rows + I64(row)) * 4, label)

    return store


def masking(code: SimpleNamespace, spec: Spec) -> Callable:
    """Device function: is the row masked? Then its losses and gradient are zero, and nothing is left to do."""
    clear, store = clearing(code, spec.threads), store_losses(spec)
    cluster, gradient = spec.cluster, spec.gradient

    @device
    def masked(words, place, chunks, mask, row, rank, loss):
        if is_kept(mask, row):
            return False
        if cluster > 1:
            ptx.cluster_wait()
        if gradient:
            clear(words, place, chunks, ZERO, ZERO)
        if rank == I32(0) and chunks[6] == I32(0):
            store(loss, row, ZERO, ZERO)
        return True

    return masked


# -- the label term: cross-entropy at T = 1 with y, less ``smoothing`` of it, which goes to all V entries alike


@device
def label_at(labels, row, v):
    """(Index of the label, or -1 where there is none; is it out of range?)."""
    y = ptx.load_i64(labels + I64(row) * 8)
    inside = y >= I64(0) and y < I64(v)
    return I32(y) if inside else I32(-1), not inside and y != I64(NO_LABEL)


@device
def label_known(y, c, d, factor, smoothing, v):
    """(-C, factor of 2^(log2(e) x - C), what is taken from every gradient, and from that of the label besides)."""
    factor = factor if y >= I32(0) else ZERO
    inverse = ptx.reciprocal(d) if y >= I32(0) else ZERO
    return -c, factor * inverse, factor * smoothing * ptx.reciprocal(F32(v)), factor * (ONE - smoothing)


@device
def label_gradient(x, known):
    """Of one entry, which is not the label."""
    return ptx.fma(ptx.exp2(ptx.fma(x, LOG2E, known[0])), known[1], -known[2])


def with_label(code: SimpleNamespace, labels: bool, of: str, factor: str, arguments: str) -> Callable:
    """Device function: a chunk's gradients, ``of`` times the factor, and with labels those of the label term, for logits x."""
    each = f"*(fma({of}, {factor}, label_of(x[#], label)))" if labels else f"*({of} * {factor})"
    return unrolled(code.per, arguments, each, label_of=label_gradient)


@device
def label_loss(y, wrong, x, c, d, total, smoothing, v):
    """``x``: the label's logit; ``total``: the sum of all logits."""
    if y < I32(0):
        return NAN if wrong else ZERO
    loss = log2_of(d) - (ONE - smoothing) * ptx.fma(x, LOG2E, -c)
    if smoothing > ZERO:
        loss = loss - smoothing * ptx.fma(total * ptx.reciprocal(F32(v)), LOG2E, -c)
    return loss * LN2


@device
def label_of_row(y, wrong, xs, softmax, constants, scales, factor, v):
    """(What ``label_gradient`` takes, the loss) from (C, D, sum of the logits) of the row."""
    smoothing = ptx.load_f32(constants + 4 * SMOOTHING)
    known = label_known(y, softmax[0], softmax[1], times(factor, scales, 1), smoothing, v)
    return known, label_loss(y, wrong, xs, softmax[0], softmax[1], softmax[2], smoothing, v)
