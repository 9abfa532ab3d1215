"""``linear_softmax_kl``: the last linear layer and the loss over its outputs, a few rows at a time.

Neither the logits (N, V) nor their gradient ever exist whole: a chunk of rows is multiplied out, turned into its
gradient in place, and folded into the gradients of hidden states, weight and bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillhouse.kernels import ops, reference, two_terms
from stillhouse.kernels.checks import (
    check_floating,
    check_label_values,
    check_labels,
    check_mask,
    check_settings,
    check_target,
    check_values,
    checked,
)
from stillhouse.kernels.errors import fail
from stillhouse.kernels.loss import (
    Divergence,
    Reduction,
    Terms,
    choose,
    fits_one_pass,
    flat_labels,
    flatten,
    labelled_rows_of,
    rows_of,
)
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


class _Settings(NamedTuple):
    temperature: float
    divergence: str
    beta: float
    rows: float | Tensor  # what the sum is divided by
    per_row: bool
    backend: str
    labelled: float | Tensor = 0  # what the label term's sum is divided by
    weights: tuple[float, float] = (1.0, 0.0)  # of both terms in the gradient that is made with them


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear_softmax_kl(
    hidden: Tensor,
    weight: Tensor,
    target: Target | TeacherHead,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    count: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``softmax_kl(hidden @ weight.T + bias, target, ...)`` without holding N x V logits or their gradient.

    Args:
        hidden: (..., H) last hidden states of the student.
        weight: (V, H) its output layer, of the same dtype as ``hidden`` (under autocast both are cast).
        target: as for :func:`softmax_kl`, or a :class:`TeacherHead`, so that the teacher's logits do not exist
            whole either.
        bias: (V,) or None.
        temperature: see :func:`softmax_kl`, as for all that follow.
        divergence: ``forward``, ``reverse`` or ``jsd``.
        beta: weight of the teacher in the mixture of ``jsd``.
        mask: (...) bool, True where a row counts.
        reduction: ``mean``, ``sum`` or ``none``; the last one multiplies the layer out again in backward.
        count: what ``mean`` divides by.
        backend: ``torch``, ``numba`` or ``cuda``.

    Returns:
        The loss, as of :func:`softmax_kl`. Gradients reach ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: as :func:`softmax_kl`, and for shapes of hidden, weight and bias that do not fit.
    """
    check_settings(temperature, divergence, beta, reduction, count)
    call = _prepare(hidden, weight, bias, target, mask, temperature, divergence, backend)
    if reduction == "sum":
        count = 1
    elif count is None:
        count = rows_of(call.hidden, call.mask)
    settings = _Settings(temperature, divergence, beta, count, reduction == "none", call.backend)
    loss = _apply(call, None, settings)[0]
    return loss.reshape(hidden.shape[:-1]) if settings.per_row else loss


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Target | TeacherHead,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    weights: tuple[float, float] = (1.0, 1.0),
    divergence: Divergence = "forward",
    beta: float = 0.5,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    count: float | Tensor | None = None,
    label_count: float | Tensor | None = None,
    backend: str | None = None,
) -> Terms:
    """``distillation_loss(hidden @ weight.T + bias, target, labels, ...)`` without holding N x V logits or their gradient.

    Args:
        hidden: (..., H), as for :func:`linear_softmax_kl`, as for ``weight``, ``target`` and ``bias``.
        weight: (V, H).
        target: the teacher's side.
        labels: as for :func:`distillation_loss`, as all that follow. Of probabilities (..., V) the caller holds N x V.
        bias: (V,) or None.
        temperature: of the first term.
        weights: what the caller multiplies the terms by; another combination multiplies the layer out again in backward.
        divergence: of the first term.
        beta: of a ``jsd``.
        label_smoothing: the share of every label that goes to all V entries alike.
        mask: (...) bool.
        count: what the first term is divided by.
        label_count: what the second one is divided by.
        backend: ``torch``, ``numba`` or ``cuda``.

    Returns:
        Both terms. Gradients reach ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: as :func:`distillation_loss`, and for shapes of hidden, weight and bias that do not fit.
    """
    check_settings(temperature, divergence, beta, "mean", count)
    call = _prepare(hidden, weight, bias, target, mask, temperature, divergence, backend, labels=True)
    check_labels(_logits_like(hidden, weight), labels, label_smoothing, weights, label_count)
    y = flat_labels(labels, label_smoothing)
    if hidden.device.type == "cpu":
        check_label_values(y, weight.shape[0], call.mask)
    if count is None:
        count = rows_of(call.hidden, call.mask)
    if label_count is None:
        label_count = labelled_rows_of(y, call.mask)
    settings = _Settings(
        temperature, divergence, beta, count, False, call.backend, label_count, (float(weights[0]), float(weights[1]))
    )  # fmt: skip
    return Terms(*_apply(call, y, settings))


class _Call(NamedTuple):
    """What was passed, checked, with the rows in one dimension."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Target | TeacherHead
    mask: Tensor | None
    backend: str


def _logits_like(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.new_empty(1).expand(*hidden.shape[:-1], weight.shape[0])  # a shape, no memory


def _prepare(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Target | TeacherHead, mask: Tensor | None,
    temperature: float, divergence: str, backend: str | None, *, labels: bool = False,
) -> _Call:  # fmt: skip
    hidden, weight, bias = _cast(hidden, weight, bias)
    _check_layer("", hidden, weight, bias)
    logits = _logits_like(hidden, weight)
    if isinstance(target, TeacherHead):
        _check_head(hidden, target)
        if mask is not None:
            check_mask(logits, mask)
        flat_mask = None if mask is None else mask.reshape(-1)
        flat: Target | TeacherHead = TeacherHead(
            target.hidden.detach().reshape(-1, target.hidden.shape[-1]), target.weight.detach(),
            None if target.bias is None else target.bias.detach(),
        )  # fmt: skip
        teacher = _logits_like(target.hidden, target.weight)
        chosen = choose(logits, teacher, divergence, backend, labels=labels, small_too=False)
    else:
        check_target(logits, target, mask, temperature, divergence)
        chosen = choose(logits, target, divergence, backend, labels=labels, small_too=False)
        _, flat, flat_mask = flatten(hidden, target, mask)
        check_values(flat, weight.shape[0], flat_mask, chosen)
    return _Call(hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat, flat_mask, chosen)


def _apply(call: _Call, labels: Labels | None, settings: _Settings) -> tuple[Tensor, Tensor]:
    """Both terms; the second is 0 without labels."""
    hidden, weight, bias = call.hidden, call.weight, call.bias
    ops.refuse_forward_mode(hidden, weight, bias)
    if not torch.is_grad_enabled():  # a Function is told what requires a gradient, not that none is wanted
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        soft, label, _ = _LinearSoftmaxKL.apply(
            hidden, weight, bias, call.target, labels, call.mask, settings
        )  # type: ignore[no-untyped-call]
    return soft, label


def _cast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_floating(name, tensor)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return hidden, weight, bias


def _check_layer(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating(f"{side}hidden", hidden)
    check_floating(f"{side}weight", weight)
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        got = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        raise fail(
            f"{side}layer shapes", got, "(..., H) and (V, H)", "pass weight as torch.nn.Linear holds it"
        )
    if weight.numel() == 0:
        raise fail(
            f"{side}weight shape", tuple(weight.shape), "(V, H), both >= 1", "pass the output layer's weight"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise fail(
                f"{side}{name} device", tensor.device, f"{hidden.device}, that of hidden", "move it there"
            )
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise fail(
                f"{side}{name} dtype", tensor.dtype, f"{hidden.dtype}, that of hidden", "cast one of them"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise fail(
            f"{side}bias shape", tuple(bias.shape), f"({weight.shape[0]},)", "pass the layer's own bias"
        )


def _check_head(hidden: Tensor, target: TeacherHead) -> None:
    _check_layer("teacher ", target.hidden, target.weight, target.bias)
    rows = tuple(hidden.shape[:-1])
    if target.hidden.shape[:-1] != hidden.shape[:-1]:
        raise fail("teacher hidden shape", tuple(target.hidden.shape), f"{rows} + (H',)", "align the rows")
    if target.hidden.device != hidden.device:
        expected = f"{hidden.device}, the student's"
        raise fail("teacher hidden device", target.hidden.device, expected, "move it there")


class _LinearSoftmaxKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Target | TeacherHead,
        labels: Labels | None, mask: Tensor | None, settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wanted = ctx.needs_input_grad[:3]
        ctx.wanted, ctx.settings, ctx.rest = wanted, settings, (target, labels, mask)
        ctx.dtype = hidden.dtype
        ctx.set_materialize_grads(False)
        made = (False, False, False) if settings.per_row else wanted
        soft, label, gradients = _run(hidden, weight, bias, target, labels, mask, settings, made, None)
        # the layer, where backward may have to multiply it out again
        layer = (hidden, weight, bias) if settings.per_row or labels is not None else ()
        anchor = soft.new_empty(0)
        ctx.save_for_backward(*gradients, anchor, *layer)
        return soft, label, anchor

    @staticmethod
    def backward(ctx: Any, soft: Tensor | None, label: Tensor | None, _: None) -> tuple[Any, ...]:  # type: ignore[override]
        *gradients, anchor = ctx.saved_tensors[:4]
        layer, settings = ctx.saved_tensors[4:], ctx.settings

        def again(settings: _Settings, upstream: Tensor | None) -> Any:
            hidden, weight, bias = layer
            target, labels, mask = ctx.rest
            return _run(hidden, weight, bias, target, labels, mask, settings, ctx.wanted, upstream)[2]

        with torch.no_grad():
            if settings.per_row:
                gradients = again(settings, soft)
            else:
                if layer:
                    asked = tuple(0.0 if g is None else g.item() for g in (soft, label))
                    factor = two_terms.common_factor(asked, settings.weights)
                    if factor is None:
                        settings, factor = settings._replace(weights=asked), 1.0
                        gradients = again(settings, None)
                    soft = anchor.new_full((), factor)
                assert soft is not None
                gradients = _scaled(gradients, soft, settings, ctx.dtype)
        if torch.is_grad_enabled():
            gradients = [None if g is None else ops.no_second_derivative(g, anchor) for g in gradients]
        return (*gradients, None, None, None, None)


def _scaled(gradients: Any, upstream: Tensor, settings: _Settings, dtype: torch.dtype) -> list[Tensor | None]:
    if not _late(settings, dtype):
        return [None if g is None else ops.scaled_in_place(g, upstream) for g in gradients]
    factor = upstream * _inverse(_divisor(settings))
    return [None if g is None else (g.float() * factor).to(dtype) for g in gradients]


def _divisor(settings: _Settings) -> float | Tensor:
    """What a late gradient is still to be divided by, see :func:`_late`."""
    if settings.weights[1] == 0:
        return settings.rows
    return ops.number(settings.rows) or ops.number(settings.labelled) or 1.0


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Target | TeacherHead, labels: Labels | None,
    mask: Tensor | None, settings: _Settings, wanted: tuple[bool, bool, bool], upstream: Tensor | None,
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
    dtype = None if _late(settings, hidden.dtype) else hidden.dtype
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
    logits: Tensor, target: Target, labels: Labels | None, mask: Tensor | None, s: _Settings, gradient: bool
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


def _one_pass(logits: Tensor, target: Target, s: _Settings) -> bool:
    return s.backend == "numba" and fits_one_pass(logits.shape[1], target, s.divergence)


def _torch_chunk(
    logits: Tensor, target: Target, labels: Labels | None, mask: Tensor | None, s: _Settings, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    with torch.set_grad_enabled(gradient):
        leaf = logits.detach().requires_grad_(gradient)
        rows = reference.softmax_kl_rows(leaf, target, s.temperature, s.divergence, s.beta, mask)
        total = rows.sum()
        if logits.device.type == "cpu":
            checked(total.item(), rows)
        soft = rows if s.per_row else (total * _inverse(s.rows)).to(rows.dtype)
        label = rows.new_zeros(())
        if labels is not None:
            label = (reference.label_rows(leaf, labels, mask).sum() * _inverse(s.labelled)).to(rows.dtype)
        late = _divisor(s) if _late(s, logits.dtype) else 1.0
        scaled = total if s.per_row else s.weights[0] * _inverse(s.rows) * late * total
        if labels is not None:
            scaled = scaled + s.weights[1] * late * label
        d_logits = torch.autograd.grad(scaled, leaf)[0] if gradient else None
    return soft.detach(), label.detach(), d_logits


def _late(s: _Settings, dtype: torch.dtype) -> bool:
    """Is the count divided by in backward? float16 would lose 1/count times a small gradient before a scaler lifts it."""
    return dtype == torch.float16 and not s.per_row


def _inverse(count: float | Tensor) -> Any:
    if isinstance(count, Tensor):
        some = count > 0
        return torch.where(some, 1.0 / torch.where(some, count, 1).double(), 0.0)
    return 1.0 / count if count else 0.0
