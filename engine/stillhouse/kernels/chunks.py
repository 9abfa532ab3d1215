"""A layer's outputs a few rows at a time, and both terms of their loss: what ``linear.py`` sums up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.kernels import ops, reference
from stillhouse.kernels.checks import checked

CHUNK = 1 << 24  # logits that exist at a time: 64 MB in float32
ROW_WISE = ("dense", "indices", "values", "rest", "labels", "probabilities", "mask")  # of a call


@dataclass(frozen=True, eq=False)
class TeacherHead:
    """Teacher logits as ``hidden @ weight.T + bias``, multiplied out only for the rows at hand.

    Attributes:
        hidden: (..., H') last hidden states of the teacher.
        weight: (Vt, H') its output layer.
        bias: (Vt,) or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Work:
    """A call over all rows, and how it is computed; ``head``: the teacher's, in the place of ``call.dense``."""

    call: ops.Call
    head: TeacherHead | None
    by_torch: bool


def run(
    layer: tuple[Tensor, Tensor, Tensor | None], work: Work, wanted: tuple[bool, bool, bool], upstream: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
    """Both terms and the gradients that are wanted of (hidden, weight, bias); ``upstream`` (N,) multiplies the rows' gradients."""
    hidden, weight, bias = layer
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
    d_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if wanted[2] else None
    # torch's operators work in float64 on a CPU, and keep a score of these for backward
    chunks = _chunks(hidden.shape[0], weight.shape[0] * (4 if work.by_torch else 1))
    most = max(chunk.stop - chunk.start for chunk in chunks)
    logits_of, teacher_of = _Layer(weight, bias, most), _teacher(work.head, most, keep=wide == hidden.dtype)
    soft, label, labelled = [], [], work.call.label_term() is not None
    for chunk in chunks:
        call, part = _at(work.call, chunk), hidden[chunk]
        if (
            call.mask is not None
        ):  # what a masked row holds may be NaN, and 0 times NaN would reach the weight
            part = part.masked_fill(~call.mask[:, None], 0)
        if teacher_of is not None:
            call = call._replace(dense=teacher_of(chunk))
        losses, gradient = _loss_of_chunk(logits_of(part), call, work.by_torch, any(wanted), chunk.start)
        del call  # and with it the teacher's logits of this chunk
        soft.append(losses[0] if labelled else losses)
        label.append(losses[1] if labelled else losses.new_zeros(()))
        if gradient is not None:
            if upstream is not None:
                gradient.mul_(upstream[chunk, None])
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[chunk])
            if d_weight is not None:
                _accumulate(d_weight, gradient, part)
            if d_bias is not None:
                d_bias += gradient.sum(0, dtype=wide)
        # the torch backend's is no part of the layer's room: two would exist with the next chunk
        del gradient
    total = torch.cat(soft) if work.call.per_row else torch.stack(soft).sum()
    keep = hidden.dtype == torch.float16 and not work.call.per_row  # until it is divided, in backward
    return total, torch.stack(label).sum(), [
        g if g is None or keep else g.to(hidden.dtype) for g in (d_hidden, d_weight, d_bias)
    ]  # fmt: skip


def _at(call: ops.Call, chunk: slice) -> ops.Call:
    rows = {name: getattr(call, name) for name in ROW_WISE}
    return call._replace(**{name: x[chunk] for name, x in rows.items() if x is not None})


class _Layer:
    """A linear layer whose outputs take each other's place: on a CPU new memory costs page faults, a third of such a product."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.weight, self.bias = weight.t(), bias
        self.room = weight.new_empty(rows, weight.shape[0])

    def __call__(self, hidden: Tensor) -> Tensor:
        out = self.room[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight, out=out)
        return torch.addmm(self.bias, hidden, self.weight, out=out)


def _accumulate(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), hidden)
    elif gradient.dtype == torch.float16:  # whose largest number a sum over many rows may exceed
        total.addmm_(gradient.t().float(), hidden.float())
    else:  # bfloat16 products, summed over chunks in float32
        total += gradient.t() @ hidden


def _chunks(rows: int, width: int) -> list[slice]:
    step = max(1, min(rows, CHUNK // width))
    parts = max(1, -(-rows // step))
    even = -(-rows // parts)  # no short last chunk, which a matrix product makes poor use of
    return [slice(first, min(first + even, rows)) for first in range(0, max(rows, 1), max(even, 1))]


def _teacher(head: TeacherHead | None, most: int, *, keep: bool) -> Callable[[slice], Tensor] | None:
    """Its logits of a chunk, of ``most`` rows at most.

    ``keep``: they may lie there while gradients are added up, which takes memory of its own in 16 bits.
    """
    if head is None:
        return None
    if not keep:
        return lambda chunk: torch.nn.functional.linear(head.hidden[chunk], head.weight, head.bias)
    layer = _Layer(head.weight, head.bias, most)
    return lambda chunk: layer(head.hidden[chunk])


def _loss_of_chunk(
    logits: Tensor, call: ops.Call, by_torch: bool, gradient: bool, first: int
) -> tuple[Tensor, Tensor | None]:
    """The losses as :func:`ops.compute` gives them, and the gradient, in the place of the logits where a kernel made it."""
    try:
        if by_torch:
            return _by_torch(logits, call, gradient)
        return ops.compute(logits, call, logits if gradient else None), logits if gradient else None
    except ValueError as error:  # which counts the chunk's rows
        if first == 0:
            raise
        counted = f"{error} (Rows are counted from row {first} of the flattened hidden states on.)"
        raise ValueError(counted) from error


def _by_torch(logits: Tensor, call: ops.Call, gradient: bool) -> tuple[Tensor, Tensor | None]:
    per, per_label = map(ops.reciprocal, call.counts())
    labels, late = call.label_term(), call.late(logits.dtype)
    with torch.set_grad_enabled(gradient):
        leaf = logits.detach().requires_grad_(gradient)
        rows = reference.softmax_kl_rows(
            leaf, call.target(), call.temperature, call.divergence, call.beta, call.mask
        )
        total = rows.sum()
        if logits.device.type == "cpu":
            checked(total.item(), rows)
        losses = rows if call.per_row else ops.divided(total, per)
        scaled = total if call.per_row else call.weight * per * late * total
        if labels is not None:
            label = reference.label_rows(leaf, labels, call.mask).sum()
            losses = torch.stack([losses, ops.divided(label, per_label).to(rows.dtype)])
            scaled = scaled + call.label_weight * per_label * late * label
        return losses.detach(), torch.autograd.grad(scaled, leaf)[0] if gradient else None
