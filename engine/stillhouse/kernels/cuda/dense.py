"""The kernel for dense teachers: both rows are read once, or twice where they do not fit in shared memory."""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from numba import cuda, types

from stillhouse.kernels.cuda import intrinsics as ptx
from stillhouse.kernels.cuda import rows
from stillhouse.kernels.cuda.arithmetic import LARGE, LOG2E, LOWEST, ZERO, device, running, unrolled
from stillhouse.kernels.cuda.merge import SCRATCH, SUMS, meeting, softmaxes
from stillhouse.kernels.cuda.pairs import (
    KNOWN,
    SETTLED,
    compare,
    gap_of_floats,
    gap_of_halves,
    jsd_is_small,
    pair_of,
)
from stillhouse.kernels.cuda.plan import Spec
from stillhouse.kernels.cuda.vectors import codec

ALIGNMENT = ptx.SHARED_ALIGNMENT
I32, I64, F32 = np.int32, np.int64, np.float32
MINUS_INFINITY = F32(-np.inf)
SIGNATURE = (*[types.int64] * 8, *[types.int32] * 5, *[types.float32] * 2)


def first_pass(code: SimpleNamespace, spec: Spec) -> Callable:
    """Read both rows, keep them, and this thread's (C, D) of p, of q and, with labels, of the student at T = 1, with its sum."""
    absorb, decode, sum_of = running(code.per), code.decode, unrolled(code.per, "x", "+(x[#])")
    staged, labels, of_student = spec.staged, spec.labels, spec.divergence == "reverse"

    def make(access):
        fetch, within = access.fetch, access.within

        @device
        def step(words, place, e, slot, state, k2):
            a, b = fetch(place[0], e, place[4]), fetch(place[1], e, place[5])
            if staged:
                ptx.shared_store_words(words, I32(slot * 4), a[0], a[1], a[2], a[3])
                ptx.shared_store_words(words, I32((slot + place[6]) * 4), b[0], b[1], b[2], b[3])
            xs, xt = decode(a), decode(b)
            xp, xq = (xs, xt) if of_student else (xt, xs)
            cp, dp = absorb(xp, k2, state[0], state[1])
            cq, dq = absorb(xq, k2, state[2], state[3])
            c1, d1, total = state[4], state[5], state[6]
            if labels:
                c1, d1 = absorb(xs, LOG2E, c1, d1)
                total = total + sum_of(within(xs, e, place[3]))
            return cp, dp, cq, dq, c1, d1, total

        return step

    return rows.sweep(code, spec.threads, make)


def logits_again(code: SimpleNamespace, staged: bool, fetch: Callable) -> Callable:
    """Device function: the logits of a chunk that the first pass has read."""
    decode = code.decode

    @device
    def again(words, place, e, slot):
        if staged:
            a = ptx.shared_load_words(words, I32(slot * 4))
            return decode(a), decode(ptx.shared_load_words(words, I32((slot + place[6]) * 4)))
        return decode(fetch(place[0], e, place[4])), decode(fetch(place[1], e, place[5]))

    return again


def second_pass(code: SimpleNamespace, spec: Spec, pair: Callable) -> Callable:
    """The loss, and what a gradient is taken relative to; that of forward is written at once."""
    each = unrolled(
        code.per, "xs, xt, known", "+(a#), *(b#), +(c#), +(d#)", "a#, b#, c#, d# = pair(xt[#], xs[#], known)", pair=pair
    )  # fmt: skip
    finish, encode = rows.with_label(code, spec.labels, "b[#]", "f", "b, x, f, label"), code.encode
    writes = spec.gradient and spec.divergence == "forward"

    def make(access):
        again, put = logits_again(code, spec.staged, access.fetch), access.put

        @device
        def step(words, place, e, slot, state, given):
            known, scale, label = given
            xs, xt = again(words, place, e, slot)
            loss, b, c, d = each(xs, xt, known)
            if writes:
                put(place[2], e, place[3], encode(finish(b, xs, scale, label)))
            return state[0] + loss, state[1] + c, state[2] + d

        return step

    return rows.sweep(code, spec.threads, make)


def third_pass(code: SimpleNamespace, spec: Spec, pair: Callable) -> Callable:
    """Gradients that need a mean over the row. A label's is written also where the other is none, for a loss is infinite."""
    own = "fmin(fmax(fma(b#, -mean, c#), -LARGE), LARGE)" if spec.labels else "fma(b#, -mean, c#)"
    each = unrolled(
        code.per, "xs, xt, known, mean, alone", f"*({own})",
        "a#, b#, c#, d# = pair(xt[#], xs[#], known); c# = d# if alone else c#", pair=pair, LARGE=LARGE,
    )  # fmt: skip
    finish, encode = rows.with_label(code, spec.labels, "b[#]", "f", "b, x, f, label"), code.encode

    def make(access):
        again, put = logits_again(code, spec.staged, access.fetch), access.put

        @device
        def step(words, place, e, slot, state, given):
            known, scale, label, mean, alone = given
            xs, xt = again(words, place, e, slot)
            put(place[2], e, place[3], encode(finish(each(xs, xt, known, mean, alone), xs, scale, label)))
            return state

        return step

    return rows.sweep(code, spec.threads, make)


def label_entry(code: SimpleNamespace, spec: Spec, pair: Callable) -> Callable:
    """Device function: the gradient of the label's own entry, which one thread writes over what the passes have written there."""
    per, size, store_one, forward = code.per, code.size, code.store_one, spec.divergence == "forward"

    @device
    def write(place, chunks, y, xs, xt, known, scale, label, mean, alone):
        cuda.syncthreads()
        chunk = I32(y - chunks[0]) // I32(per)
        if y >= I32(0) and chunks[6] == I32(0) and chunk >= chunks[4] and chunk < chunks[5]:
            a, b, c, d = pair(xt, xs, known)
            if not forward:
                b = ptx.fmin(ptx.fmax(ptx.fma(b, -mean, d if alone else c), -LARGE), LARGE)
            store_one(place[2] + I64(y) * size, ptx.fma(b, scale, rows.label_gradient(xs, label)) - label[3])

    return write


def kernel_of(spec: Spec) -> Callable:
    """The kernel (undecorated). Its arguments: addresses of student, teacher, gradient (float or 16-bit), losses (float32), mask
    (bool, or 0), class indices (int64), what is the same for all rows (float32), factors of both gradients (float32, or 0); V, the
    stride of teacher rows, the widths over which either side has mass, chunks in a block's slice; the same factors as numbers.
    """
    code, cluster, divergence, labels = codec(spec.dtype), spec.cluster, spec.divergence, spec.labels
    pair = pair_of(divergence, gap_of_floats if code.size == 4 else gap_of_halves)
    first, second, third = first_pass(code, spec), second_pass(code, spec, pair), third_pass(code, spec, pair)
    clear, begin, masked = (
        rows.clearing(code, spec.threads),
        rows.beginning(code, cluster),
        rows.masking(code, spec),
    )
    write_label, store, numbers = label_entry(code, spec, pair), rows.store_losses(spec), 7 if labels else 4
    meet = meeting(spec.threads, cluster, 0, numbers, softmaxes(3, 1) if labels else softmaxes(2))
    meet_sums = meeting(spec.threads, cluster, SUMS, 3, softmaxes(0, 3))
    known_of, settled, load_one, size = KNOWN[divergence], SETTLED[divergence], code.load_one, code.size
    gradient, jsd, again = spec.gradient, divergence == "jsd", divergence != "forward"

    def kernel(
        s, t, g, loss, mask, labels_at, constants, scales, v, t_stride, s_width, t_width, span, soft, label
    ):
        words = cuda.shared.array(0, types.uint32, alignment=ALIGNMENT)
        scratch = cuda.shared.array(SCRATCH, np.float32)
        row, rank, place, chunks = begin(s, t, g, v, t_stride, s_width, t_width, span)
        tid = chunks[6]
        if masked(words, place, chunks, mask, row, rank, loss):
            return

        y, wrong, xs, xt = I32(-1), False, ZERO, ZERO
        if labels:  # read by who needs it, before a gradient takes its place
            y, wrong = rows.label_at(labels_at, row, v)
            if y >= I32(0) and tid == I32(0):
                xs = load_one(place[0] + I64(y) * size)
                xt = load_one(place[1] + I64(y) * size) if y < t_width else MINUS_INFINITY
        coin = rows.coin_of(constants) if jsd else (ZERO,)
        k2 = ptx.load_f32(constants + 4 * rows.K2)
        state = first(words, place, chunks, (LOWEST, ZERO, LOWEST, ZERO, LOWEST, ZERO, ZERO), k2)
        if cluster > 1:
            ptx.cluster_wait()
        x = meet(scratch, tid, rank, state[:numbers])
        known = known_of(compare(k2, x[0], x[1], x[2], x[3]), coin)
        scale = rows.times(soft, scales, 0) * ptx.load_f32(constants + 4 * rows.GRADIENT) * known[3]
        of_label, second_loss = (ZERO, ZERO, ZERO, ZERO), ZERO
        if labels:
            of_label, second_loss = rows.label_of_row(y, wrong, xs, x[4:], constants, scales, label, v)
        sums = second(words, place, chunks, (ZERO, ZERO, ZERO), (known, scale, of_label))
        sums = meet_sums(scratch, tid, rank, sums)
        total, mean = settled(sums[0] * known[3], sums[1] * known[3], sums[2] * known[3], coin)
        alone = jsd and not jsd_is_small(sums[0] * known[3], coin)
        if rank == I32(0) and tid == I32(0):
            store(loss, row, total * ptx.load_f32(constants + 4 * rows.LOSS), second_loss)
        if not gradient:
            return

        if again:
            if (
                mean > rows.HUGE
            ):  # the teacher rules out what the student believes in: loss inf, and no gradient
                mean, scale = ZERO, ZERO
            if mean == ZERO and scale == ZERO and not labels:
                clear(words, place, chunks, ZERO, ZERO)
            else:
                third(words, place, chunks, ZERO, (known, scale, of_label, mean, alone))
        if labels:
            write_label(place, chunks, y, xs, xt, known, scale, of_label, mean, alone)

    return kernel
