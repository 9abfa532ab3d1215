"""What the CPU kernels do with a block of the scratch row: the loss and the gradient of each divergence.

``scratch``: (exponentials of the student, of the teacher, difference of the logits), as addresses; ``logs``: what x = log(s/t)
is made from, see ``dense.py``; ``out``: (where the gradient goes, its dtype, how many of its columns there are); ``label``: see
``read.with_label``.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator,call-arg,var-annotated"

from __future__ import annotations

from numba import njit

from stillhouse.kernels.cpu.arithmetic import (
    LEAST_MASS,
    NEAR,
    PHI,
    SHARE,
    absolute,
    f32,
    fma,
    maximum_of,
    minimum_of,
    polynomial,
)
from stillhouse.kernels.cpu.lanes import load, store, total_wide, where
from stillhouse.kernels.cpu.loops import no_sums, over, over_row
from stillhouse.kernels.cpu.read import put, with_label


@njit(error_model="numpy", forceinline=True)
def log_ratio(diff, i, logs):
    """The logarithm x of sixteen entries' student over teacher."""
    it, high, low = logs
    return fma(load(diff + i * 4), it, -high) - low


@njit(error_model="numpy", forceinline=True)
def forward_columns(i, given, sums, seen, full):
    scratch, out, logs, ratio, factor, differ, label = given
    es, et, diff = scratch
    g, gd, m = out
    loss, summed, size = sums
    t = load(et + i * 4)  # all of it in multiples of 1 / zt
    x = log_ratio(diff, i, logs)
    grad = fma(load(es + i * 4), ratio, -t)
    if differ:
        loss = loss + fma(-t, x, grad)
    else:
        first = t * x
        second = first * (polynomial(x, PHI) * x)
        near = absolute(x) < NEAR
        loss = loss + where(near, second, grad - first)
        grad = where(near, first + second, grad)
        size = size + absolute(grad)
    put(g, gd, i, m, with_label(grad * factor, i, label), full)
    return (loss, summed + grad, size), seen


@njit(error_model="numpy", forceinline=True)
def forward_block(scratch, out, n, logs, sums, scale, differ, label):
    """KL(t || s): gradient s - t, loss t phi(log s - log t); neither cancels where s is near t, unless the sides ``differ``.

    A short loop, so float32 has one of its own where they do (``dense.row_gradient``). Their ``size`` is not summed.
    """
    zs, zt = sums
    given = scratch, out, logs, f32(zt / zs), f32(scale / zt), differ, label
    sums, _ = over_row(forward_columns, 0, n, out[2], given, no_sums(3), ())
    return total_wide(sums[0]), total_wide(sums[1]), total_wide(sums[2])


@njit(error_model="numpy", forceinline=True)
def weighted_columns(i, given, sums, seen, full):
    p, diff, logs = given
    return (fma(load(p + i * 4), log_ratio(diff, i, logs), sums[0]),), seen


@njit(error_model="numpy")
def weighted_sum(p, diff, n, logs):
    sums, _ = over(weighted_columns, 0, n, (p, diff, logs), no_sums(1), (), True)
    return total_wide(sums[0])


@njit(error_model="numpy", forceinline=True)
def reverse_columns(i, given, sums, seen, full):
    scratch, out, logs, centre, ratio, factor, differ, label = given
    es, et, diff = scratch
    g, gd, m = out
    loss, summed, size = sums
    s = load(es + i * 4)  # all of it in multiples of 1 / zs
    x = log_ratio(diff, i, logs)
    grad = s * (x - centre)
    first = s * x
    term = fma(load(et + i * 4), ratio, first - s)
    if not differ:
        second = first * (polynomial(-x, PHI) * x)
        term = where(absolute(x) < NEAR, second, term)
    put(g, gd, i, m, with_label(grad * factor, i, label), full)  # last, since g may be et
    return (loss + term, summed + grad, size + absolute(grad)), seen


@njit(error_model="numpy", forceinline=True)
def reverse_block(scratch, out, n, logs, sums, centre, scale, differ, label):
    """KL(s || t): gradient s (log s/t - its mean), loss s phi(log t - log s), whose closed form serves where they ``differ``."""
    zs, zt = sums
    given = scratch, out, logs, centre, f32(zs / zt), f32(scale / zs), differ, label
    sums, _ = over_row(reverse_columns, 0, n, out[2], given, no_sums(3), ())
    return total_wide(sums[0]), total_wide(sums[1]), total_wide(sums[2])


@njit(error_model="numpy", forceinline=True)
def jsd_columns(i, given, sums, seen, full):
    scratch, logs, ratio, series, constant, differ = given
    es, et, diff = scratch
    to_student, of_loss, (log_beta, log_rest, log_odds) = series
    loss, weighted = sums
    a = load(et + i * 4)
    b = load(es + i * 4) * ratio
    x = log_ratio(diff, i, logs)
    less, more = minimum_of(a, b), maximum_of(maximum_of(a, b), LEAST_MASS)  # neither side may have any
    share = less / fma(more, f32(2.0), less)
    grown = polynomial(share * share, SHARE) * share  # log(1 + less / more)
    if differ:
        w = minimum_of(x, f32(0.0)) - grown
        term = -fma(a + b, grown, fma(less, absolute(x), fma(a, log_beta, b * log_rest)))
    else:
        w = minimum_of(x - log_odds, f32(0.0)) - grown
        t_over_m = minimum_of(-log_rest - x, -log_beta) - grown
        term = fma(a, t_over_m, b * (w - log_rest))
        near = absolute(x) < NEAR
        term = where(near, a * x * (x * polynomial(x, of_loss)), term)
        w = where(near, fma(polynomial(x, to_student), x, constant), w)
    store(et + i * 4, w)
    return (loss + term, fma(b, w, weighted)), seen


@njit(error_model="numpy", forceinline=True)
def jsd_block(scratch, n, logs, ratio, series, constant, differ):
    """Loss, and the sum of b w with w = log(s/m) + log(1 - beta), which replaces the teacher in the scratch row.

    With a = beta t and b = (1 - beta) s, both in multiples of beta / zt, log(a / (a + b)) and log(b / (a + b)) are had from
    the ratio of the smaller to the larger, and from x = log(s/t). Where the sides ``differ``, ``logs`` are such
    that x is log(b / a), which leaves of the loss
    a log(a / (a + b)) + b log(b / (a + b)) = -min(a, b) |x| - (a + b) log((a + b) / max(a, b)),
    less a log(beta) + b log(1 - beta). Summed over the row that is H(beta), but it is taken away entry by entry: sums
    would be of larger numbers than the loss.

    Where the two sides share little, log(s/m) is log 1/(1 - beta) nearly everywhere, and only w tells entries apart. Where
    they nearly agree it is near 0, and only without that constant are entries told apart: ``constant`` is 0 if all entries
    of the row are near, else log(1 - beta), as it always is where the sides ``differ``.
    """
    given = scratch, logs, ratio, series, constant, differ
    sums, _ = over(jsd_columns, 0, n, given, no_sums(2), (), True)
    return total_wide(sums[0]), total_wide(sums[1])


@njit(error_model="numpy", forceinline=True)
def jsd_gradient_columns(i, given, sums, seen, full):
    es, w, out, centre, factor, scale, label = given
    g, gd, m = out
    grad = load(es + i * 4) * ((load(w + i * 4) - centre) * factor)
    put(g, gd, i, m, with_label(grad * scale, i, label), full)
    return (sums[0] + grad, sums[1] + absolute(grad)), seen


@njit(error_model="numpy")
def jsd_gradient(es, w, out, n, centre, factor, scale, label):
    given = es, w, out, centre, factor, scale, label
    sums, _ = over_row(jsd_gradient_columns, 0, n, out[2], given, no_sums(2), ())
    return total_wide(sums[0]), total_wide(sums[1])
