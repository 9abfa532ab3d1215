"""The kernel for top-k teachers and sampled labels: the student's row is read once and the gradient written once.

A top-k teacher makes k + 1 outcomes: its entries, and everything else as one (see ``kernels/reference.py``). The
entries are first marked in a bitmap in shared memory; the pass over the row then sums what is not marked, with a
maximum of its own, so that the mass outside is exact however small it is. Each entry's gradient is stored by one
thread before the last pass, which leaves marked elements as they are.
"""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from numba import cuda, types

from stillhouse.kernels.cuda import intrinsics as ptx
from stillhouse.kernels.cuda import rows
from stillhouse.kernels.cuda.arithmetic import LN2, LOG2E, LOWEST, ZERO, device, log2_of, running, unrolled
from stillhouse.kernels.cuda.merge import SCRATCH, SUMS, meeting, softmaxes
from stillhouse.kernels.cuda.pairs import OF_LOGS, gap_of_floats, pair_of
from stillhouse.kernels.cuda.plan import Spec
from stillhouse.kernels.cuda.vectors import codec

ALIGNMENT = ptx.SHARED_ALIGNMENT
I32, I64, F32, U32 = np.int32, np.int64, np.float32, np.uint32
MINUS_INFINITY, INFINITY = F32(-np.inf), F32(np.inf)
SIGNATURE = (*[types.int64] * 10, *[types.int32] * 3, *[types.float32] * 2)


@device
def index_at(indices, i, v):
    """The i-th index, or -1 where it is none of the row's: those of a trusted target nobody has looked at."""
    index = ptx.load_i64(indices + I64(i) * 8)
    return I32(index) if index >= I64(0) and index < I64(v) else I32(-1)


@device
def value_at(values, i):
    return ptx.load_f32(values + I64(i) * 4)


def bitmap(code: SimpleNamespace, spec: Spec) -> SimpleNamespace:
    """Device functions over a bit for each element of this block's slice, after the logits that are kept."""
    per, threads, words_of_slot = code.per, spec.threads, 4 if spec.staged else 0

    @device
    def clear(words, span, tid):
        i = tid
        while i < I32(span * per) >> I32(5):
            ptx.shared_store(words, I32(span * words_of_slot + i), ZERO)
            i = I32(i + threads)

    @device
    def mark(words, place, chunks, index):
        """Set an entry's bit, where it is in the slice. An or of bits is the same in whatever order."""
        bit = I32(index - chunks[0] - chunks[4] * per)
        if index >= I32(0) and bit >= I32(0) and bit < I32((chunks[5] - chunks[4]) * per):
            base = I32(place[6] * words_of_slot)
            cuda.atomic.or_(words, U32(base + (bit >> I32(5))), U32(1) << U32(bit & I32(31)))

    @device
    def mark_all(words, place, chunks, indices, k):
        i = chunks[6]
        while i < k:
            mark(words, place, chunks, index_at(indices, i, place[3]))
            i = I32(i + threads)

    @device
    def of_slot(words, place, slot):
        bit = I32(slot * per)
        word = ptx.float_as_word(ptx.shared_load(words, I32(place[6] * words_of_slot + (bit >> I32(5)))))
        return U32((word >> U32(bit & I32(31))) & U32((1 << per) - 1))

    return SimpleNamespace(clear=clear, mark=mark, mark_all=mark_all, of_slot=of_slot)


def first_pass(code: SimpleNamespace, spec: Spec, marks: SimpleNamespace) -> Callable:
    """Keep the row, and (C, D) of what is not marked; with labels those of all at T = 1, and the sum."""
    absorb, decode, marks_of = running(code.per), code.decode, marks.of_slot
    sum_of = unrolled(code.per, "x", "+(x[#])")
    unmarked = unrolled(
        code.per, "x, m", "*(nothing if (m & U32(1 << #)) != U32(0) else x[#])", nothing=MINUS_INFINITY, U32=U32
    )  # fmt: skip
    staged, labels, sampled = spec.staged, spec.labels, spec.target == "sampled"

    def make(access):
        fetch, within = access.fetch, access.within

        @device
        def step(words, place, e, slot, state, k2):
            a = fetch(place[0], e, place[3])
            if staged:
                ptx.shared_store_words(words, I32(slot * 4), a[0], a[1], a[2], a[3])
            x = decode(a)
            c1, d1, total = state[2], state[3], state[4]
            if labels:
                c1, d1 = absorb(x, LOG2E, c1, d1)
                total = total + sum_of(within(x, e, place[3]))
            if not sampled:
                m = marks_of(words, place, slot)
                x = unmarked(x, m) if m != U32(0) else x
            c, d = absorb(x, k2, state[0], state[1])
            return c, d, c1, d1, total

        return step

    return rows.sweep(code, spec.threads, make)


def last_pass(code: SimpleNamespace, spec: Spec, marks: SimpleNamespace) -> Callable:
    """Write f 2^(k2 x - C) everywhere but at the marked elements, which have their gradient already."""
    decode, encode, marks_of = code.decode, code.encode, marks.of_slot
    powers = rows.with_label(code, spec.labels, "exp2(fma(x[#], k2, n))", "f", "x, k2, n, f, label")
    keep = unrolled(code.per, "new, old, m", "*(old[#] if (m & U32(1 << #)) != U32(0) else new[#])", U32=U32)

    def make(access):
        fetch, put = access.fetch, access.put

        @device
        def step(words, place, e, slot, state, given):
            k2, n, f, label = given
            a = ptx.shared_load_words(words, I32(slot * 4)) if staged else fetch(place[0], e, place[3])
            gradient, m = powers(decode(a), k2, n, f, label), marks_of(words, place, slot)
            if m != U32(0):
                gradient = keep(gradient, decode(fetch(place[2], e, place[3])), m)
            put(place[2], e, place[3], encode(gradient))
            return state

        return step

    staged = spec.staged
    return rows.sweep(code, spec.threads, make)


def outcomes(spec: Spec) -> Callable:
    """Device function of two log2-probabilities, the teacher's and the student's: (loss, b, c); the gradient is c - b sum(c)."""
    pair, jsd = pair_of(spec.divergence, gap_of_floats, True), spec.divergence == "jsd"
    of_logs = OF_LOGS[spec.divergence]

    @device
    def outcome(log_t, log_s, coin):
        known = of_logs(coin)
        a, b, c, d = pair(log_t, log_s, known)
        return a * known[3], b * known[3], (d if jsd else c) * known[3]

    return outcome


# of the k entries: ``target`` is (addresses of indices and values, k); ``student`` is (k2, -C, log2 D)


@device
def log_of(x, student):
    """The student's log2-probability of a logit."""
    return ptx.fma(x, student[0], student[1]) - student[2]


def entry_sums(code: SimpleNamespace, spec: Spec, outcome: Callable) -> tuple[Callable, Callable]:
    """Device functions: the entries' (C, D), and the sums of their outcomes."""
    threads, size, load_one, sampled = spec.threads, code.size, code.load_one, spec.target == "sampled"

    @device
    def absorb(place, target, k2, tid):
        c, d = LOWEST, ZERO
        i = tid
        while i < target[2]:
            index = index_at(target[0], i, place[3])
            if index >= I32(0):
                x = load_one(place[0] + I64(index) * size)
                higher = ptx.fmax(x * k2, c)
                d = ptx.fma(d, ptx.exp2(c - higher), ptx.exp2(ptx.fma(x, k2, -higher)))
                c = higher
            i = I32(i + threads)
        return c, d

    @device
    def sums(place, target, student, coin, shift, tid):
        """(loss, mean); an index that is none of the row's makes them NaN and infinite.

        The mean of forward is what its gradient sums to: the error of a normaliser, or of a teacher whose outcomes do
        not sum to one.
        """
        total, mean = ZERO, ZERO
        i = tid
        while i < target[2]:
            index, value, log_s = index_at(target[0], i, place[3]), value_at(target[1], i), ZERO
            if index >= I32(0):
                log_s = log_of(load_one(place[0] + I64(index) * size), student)
            if index < I32(0):
                total, mean = rows.NAN, INFINITY
            elif sampled:
                if value > ZERO:  # 0 times -inf is NaN
                    total, mean = total - value * log_s * LN2, mean + value
            else:
                a, b, c = outcome(value * LOG2E, log_s, coin)
                total, mean = total + a, mean + ptx.fma(b, -shift, c)
            i = I32(i + threads)
        return total, mean

    return absorb, sums


@device
def draws_of(target, v, i, index):
    """(Is the i-th the first of that index?, the weight of all of its draws)."""
    first, weight = True, ZERO
    j = I32(0)
    while j < target[2]:
        if index_at(target[0], j, v) == index:
            weight = weight + value_at(target[1], j)
            if j < i:
                first = False
        j = I32(j + 1)
    return first, weight


def entry_gradients(code: SimpleNamespace, spec: Spec, outcome: Callable) -> Callable:
    """Device function that writes them."""
    threads, size, per, load_one, store_one = spec.threads, code.size, code.per, code.load_one, code.store_one
    sampled, labels = spec.target == "sampled", spec.labels

    @device
    def write(place, chunks, target, student, coin, mean, scale, share, y, label):
        """The gradients of the entries in this block's slice, and of the label as one more, unless it is an entry itself."""
        k = target[2]
        i = chunks[6]
        while i < (k + I32(1) if labels else k):
            index = index_at(target[0], i, place[3]) if i < k else y
            chunk = I32(index - chunks[0]) // I32(per)
            if index >= I32(0) and chunk >= chunks[4] and chunk < chunks[5]:
                first, weight = True, ZERO
                if sampled or i == k:
                    first, weight = draws_of(target, place[3], i, index)
                if first:  # the others must not read what the first one overwrites
                    x = load_one(place[0] + I64(index) * size)
                    log_s = log_of(x, student)
                    if sampled:
                        gradient = mean * ptx.exp2(log_s) - weight
                    elif i == k:
                        gradient = share * ptx.exp2(log_s)
                    else:
                        a, b, c = outcome(value_at(target[1], i) * LOG2E, log_s, coin)
                        gradient = ptx.fma(b, -mean, c)
                    gradient = gradient * scale if scale != ZERO else ZERO
                    if labels:
                        gradient = (
                            gradient + rows.label_gradient(x, label) - (label[3] if index == y else ZERO)
                        )
                    store_one(place[2] + I64(index) * size, gradient)
            i = I32(i + threads)

    return write


def gradients(code: SimpleNamespace, spec: Spec, marks: SimpleNamespace, outcome: Callable) -> Callable:
    """Device function: the gradient of a row, ``share`` of its probability that of an unmarked entry is."""
    write_entries, last = entry_gradients(code, spec, outcome), last_pass(code, spec, marks)
    clear, mark, mark_all = rows.clearing(code, spec.threads), marks.mark, marks.mark_all
    sampled, labels = spec.target == "sampled", spec.labels

    @device
    def write(words, place, chunks, target, student, coin, mean, shift, scale, share, y, of_label):
        if mean > rows.HUGE:  # loss inf, or NaN for an index out of range, and no gradient
            scale, share, mean = ZERO, ZERO, ZERO
        if mean == ZERO and scale == ZERO and not labels:
            clear(words, place, chunks, ZERO, ZERO)
            return
        write_entries(place, chunks, target, student, coin, mean + shift, scale, share, y, of_label)
        if sampled:
            mark_all(words, place, chunks, target[0], target[2])
        if labels:  # by all: an or is the same however often
            mark(words, place, chunks, y)
        cuda.syncthreads()
        f = scale * share * ptx.exp2(-student[2]) if scale != ZERO else ZERO
        last(words, place, chunks, ZERO, (student[0], student[1], f, of_label))

    return write


def rest_outcome(spec: Spec, outcome: Callable) -> Callable:
    """Device function: (loss, third result, what the mean is taken relative to, 1 / mass) of the outcome outside the k entries.

    Where it has most of the mass, the mean of the logarithms is nearly its own: taking all of them relative to it keeps the digits
    of the difference.
    """
    forward = spec.divergence == "forward"

    @device
    def of_rest(outside, row, log_rest, coin):
        log_t = value_at(outside, row) * LOG2E if outside != I64(0) else MINUS_INFINITY
        loss, _, third = outcome(log_t, log_rest, coin)
        shift, over = ZERO, ZERO
        if log_rest > F32(-120.0):
            over = ptx.exp2(-log_rest)
            if not forward and third < rows.HUGE:
                shift = third * over
        return loss, third, shift, over

    return of_rest


def kernel_of(spec: Spec) -> Callable:
    """The kernel (undecorated). Its arguments: addresses of student, indices (int64), log-probabilities or weights (float32),
    logarithms of the mass outside (float32; 0 where the teacher has none there), then as for dense teachers: gradient, losses, mask,
    class indices, what is the same for all rows, factors; V, k, chunks in a block's slice; the same factors as numbers.
    """
    code, cluster, labels, sampled = codec(spec.dtype), spec.cluster, spec.labels, spec.target == "sampled"
    marks, outcome, numbers = bitmap(code, spec), outcomes(spec), 7 if labels else 4
    first, of_rest = first_pass(code, spec, marks), rest_outcome(spec, outcome)
    absorb_entries, sums_of_entries = entry_sums(code, spec, outcome)
    write, begin = gradients(code, spec, marks, outcome), rows.beginning(code, cluster)
    meet = meeting(spec.threads, cluster, 0, numbers, softmaxes(3, 1) if labels else softmaxes(2))
    meet_sums, masked = meeting(spec.threads, cluster, SUMS, 2, softmaxes(0, 2)), rows.masking(code, spec)
    store, load_one, size = rows.store_losses(spec), code.load_one, code.size
    jsd, gradient = spec.divergence == "jsd", spec.gradient
    clear_marks, mark_all = marks.clear, marks.mark_all

    def kernel(
        s, indices, values, outside, g, loss, mask, labels_at, constants, scales, v, k, span, soft, label
    ):
        words = cuda.shared.array(0, types.uint32, alignment=ALIGNMENT)
        scratch = cuda.shared.array(SCRATCH, np.float32)
        row, rank, place, chunks = begin(s, s, g, v, v, v, v, span)
        target = (indices + I64(row) * k * 8, values + I64(row) * k * 4, k)
        tid, leader = chunks[6], rank == I32(0) and chunks[6] == I32(0)
        if masked(words, place, chunks, mask, row, rank, loss):
            return

        clear_marks(words, span, tid)
        cuda.syncthreads()
        if not sampled:
            mark_all(words, place, chunks, target[0], k)
            cuda.syncthreads()
        y, wrong, xs = I32(-1), False, ZERO
        if labels:
            y, wrong = rows.label_at(labels_at, row, v)
            if y >= I32(0) and leader:
                xs = load_one(place[0] + I64(y) * size)
        coin = rows.coin_of(constants) if jsd else (ZERO,)
        k2 = ptx.load_f32(constants + 4 * rows.K2)
        co, do, c1, d1, logits = first(words, place, chunks, (LOWEST, ZERO, LOWEST, ZERO, ZERO), k2)
        ck, dk = LOWEST, ZERO
        if rank == I32(0) and not sampled:
            ck, dk = absorb_entries(place, target, k2, tid)
        if cluster > 1:
            ptx.cluster_wait()
        x = meet(scratch, tid, rank, (ck, dk, co, do, c1, d1, logits)[:numbers])
        c = x[2] if sampled else ptx.fmax(x[0], x[2])
        log_d = log2_of(x[1] * ptx.exp2(x[0] - c) + x[3] * ptx.exp2(x[2] - c))
        student = (k2, -c, log_d)
        rest_loss, third, shift, over = ZERO, ZERO, ZERO, ZERO
        if not sampled and k < v:
            rest_loss, third, shift, over = of_rest(outside, row, (x[2] - c) + log2_of(x[3]) - log_d, coin)
        total, mean = ZERO, ZERO
        if rank == I32(0):
            total, mean = sums_of_entries(place, target, student, coin, shift, tid)
            if leader:
                total, mean = total + rest_loss, mean + third if shift == ZERO else mean
        total, mean = meet_sums(scratch, tid, rank, (total, mean))
        of_label, second_loss = (ZERO, ZERO, ZERO, ZERO), ZERO
        if labels:
            of_label, second_loss = rows.label_of_row(y, wrong, xs, x[4:], constants, scales, label, v)
        if leader:
            store(loss, row, total * ptx.load_f32(constants + 4 * rows.LOSS), second_loss)
        if not gradient:
            return

        scale = rows.times(soft, scales, 0) * ptx.load_f32(constants + 4 * rows.GRADIENT)
        share = mean if sampled else ptx.fma(third, over, -mean) if shift == ZERO else -mean
        write(words, place, chunks, target, student, coin, mean, shift, scale, share, y, of_label)

    return kernel
