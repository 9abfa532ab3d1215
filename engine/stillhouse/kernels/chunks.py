"""A layer's outputs a few rows at a time, and both terms of their loss: what ``linear.py`` sums up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillhouse.kernels import ops, reference, two_terms
from stillhouse.kernels.checks import checked
from stillhouse.kernels.loss import fits_one_pass
from stillhouse.kernels.targets import Labels, Sampled, Target, TopK

CHUNK = 1 << 24  # logits that exist at a time: 64 MB in float32


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


class Settings(NamedTuple):
    """All of a call but its tensors."""

    temperature: float
    divergence: str
    beta: float
    rows: float | Tensor  # what the sum is divided by
    per_row: bool
    backend: str
    labelled: float | Tensor = 0  # what the label term's sum is divided by
    weights: tuple[float, float] = (1.0, 0.0)  # of both terms in the gradient that is made with them


def divisor(settings: Settings) -> float | Tensor:
    """What a late gradient is still to be divided by, see :func:`late`."""
    if settings.weights[1] == 0:
        return settings.rows
    return ops.number(settings.rows) or ops.number(settings.labelled) or 1.0


def run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Target | TeacherHead, labels: Labels | None,
    mask: Tensor | None, settings: Settings, wanted: tuple[bool, bool, bool], upstream: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:  # fmt: skip
    """Both terms and the gradients that are wanted; ``upstream`` (N,) multiplies the rows' gradients."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
    d_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if wanted[2] else None
    chunks = _chunks(hidden.shape[0], weight.shape[0])
    most = max(chunk.stop - chunk.start for chunk in chunks)
    layer, target_of = _Layer(weight, bias, most), _target_of(target, most, keep=wide == hidden.dtype)
    soft, of_labels = [], []
    for chunk in chunks:
        part, kept = hidden[chunk], None if mask is None else mask[chunk]
        if kept is not None:  # what a masked row holds may be NaN, and 0 times NaN would reach the weight
            part = part.masked_fill(~kept[:, None], 0)
        y = None if labels is None else labels.at(chunk)
        try:
            loss, label, gradient = _chunk_loss(layer(part), target_of(chunk), y, kept, settings, any(wanted))
        except ValueError as error:  # which counts the chunk's rows
            if chunk.start == 0:
                raise
            raise ValueError(
                f"{error} (Rows are counted from row {chunk.start} of the flattened hidden states on.)"
            ) from error
        soft.append(loss)
        of_labels.append(label)
        if upstream is not None and gradient is not None:
            gradient.mul_(upstream[chunk, None])
        if d_hidden is not None and gradient is not None:
            torch.mm(gradient, weight, out=d_hidden[chunk])
        if d_weight is not None and gradient is not None:
            _accumulate(d_weight, gradient, part)
        if d_bias is not None and gradient is not None:
            d_bias += gradient.sum(0, dtype=wide)
        # the torch backend's is no part of the layer's room: two would exist with the next chunk
        del gradient
    total = torch.cat(soft) if settings.per_row else torch.stack(soft).sum()
    dtype = None if late(settings, hidden.dtype) else hidden.dtype
    cast = tuple(g if g is None or dtype is None else g.to(dtype) for g in (d_hidden, d_weight, d_bias))
    return total, torch.stack(of_labels).sum(), cast  # type: ignore[return-value]


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


def _target_of(target: Target | TeacherHead, most: int, *, keep: bool) -> Callable[[slice], Target]:
    """The target of a chunk, of ``most`` rows at most.

    ``keep``: a teacher's logits may lie there while gradients are added up, which takes memory of its own in 16 bits.
    """
    if not isinstance(target, TeacherHead):
        return lambda chunk: _at(target, chunk)
    if not keep:
        return lambda chunk: torch.nn.functional.linear(target.hidden[chunk], target.weight, target.bias)
    layer = _Layer(target.weight, target.bias, most)
    return lambda chunk: layer(target.hidden[chunk])


def _at(target: Target, chunk: slice) -> Target:
    if isinstance(target, TopK):
        rest = None if target.log_rest is None else target.log_rest[chunk]
        return replace(
            target, indices=target.indices[chunk], log_probs=target.log_probs[chunk], log_rest=rest
        )
    if isinstance(target, Sampled):
        return replace(target, indices=target.indices[chunk], weights=target.weights[chunk])
    return target[chunk]


def _chunk_loss(
    logits: Tensor, target: Target, labels: Labels | None, mask: Tensor | None, s: Settings, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both terms, divided by their counts, and the gradient of their weighted sum in the place of the logits."""
    if s.backend == "torch" or (labels is not None and not _one_pass(logits, target, s)):
        return _torch_chunk(logits, target, labels, mask, s, gradient)
    if labels is not None:
        settings = two_terms.Settings(
            target, labels, mask, s.temperature, s.divergence, s.beta, s.weights, ops.number(s.rows), ops.number(s.labelled)
        )  # fmt: skip
        (soft, label), _ = two_terms.compute(logits, settings, logits if gradient else None)
        return soft, label, logits if gradient else None
    fixed = ops.arguments(target, mask, s.rows, s.temperature, s.divergence, s.beta, s.per_row)
    if not gradient:
        loss: Tensor = torch.ops.stillhouse.softmax_kl.default(logits, *fixed, False)[0]
        return loss, loss.new_zeros(()), None
    loss = torch.ops.stillhouse.softmax_kl_.default(logits, *fixed)
    return loss, loss.new_zeros(()), logits


def _one_pass(logits: Tensor, target: Target, s: Settings) -> bool:
    return s.backend == "numba" and fits_one_pass(logits.shape[1], target, s.divergence)


def _torch_chunk(
    logits: Tensor, target: Target, labels: Labels | None, mask: Tensor | None, s: Settings, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    with torch.set_grad_enabled(gradient):
        leaf = logits.detach().requires_grad_(gradient)
        rows = reference.softmax_kl_rows(leaf, target, s.temperature, s.divergence, s.beta, mask)
        total = rows.sum()
        if logits.device.type == "cpu":
            checked(total.item(), rows)
        soft = rows if s.per_row else (total * inverse(s.rows)).to(rows.dtype)
        label = rows.new_zeros(())
        if labels is not None:
            label = (reference.label_rows(leaf, labels, mask).sum() * inverse(s.labelled)).to(rows.dtype)
        still = divisor(s) if late(s, logits.dtype) else 1.0
        scaled = total if s.per_row else s.weights[0] * inverse(s.rows) * still * total
        if labels is not None:
            scaled = scaled + s.weights[1] * still * label
        d_logits = torch.autograd.grad(scaled, leaf)[0] if gradient else None
    return soft.detach(), label.detach(), d_logits


def late(s: Settings, dtype: torch.dtype) -> bool:
    """Is the count divided by in backward? float16 would lose 1/count times a small gradient before a scaler lifts it."""
    return dtype == torch.float16 and not s.per_row


def inverse(count: float | Tensor) -> Any:
    if isinstance(count, Tensor):
        some = count > 0
        return torch.where(some, 1.0 / torch.where(some, count, 1).double(), 0.0)
    return 1.0 / count if count else 0.0
