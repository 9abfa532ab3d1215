"""``linear_softmax_kl``: the last linear layer and the loss over its outputs, a few rows at a time.

Neither the logits (N, V) nor their gradient ever exist whole: a chunk of rows is multiplied out, turned into its
gradient in place, and folded into the gradients of hidden states, weight and bias.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillhouse.kernels import ops, two_terms
from stillhouse.kernels.checks import (
    check_floating,
    check_label_values,
    check_labels,
    check_mask,
    check_settings,
    check_target,
    check_values,
)
from stillhouse.kernels.chunks import Settings, TeacherHead, divisor, inverse, late, run
from stillhouse.kernels.errors import fail
from stillhouse.kernels.loss import (
    Divergence,
    Reduction,
    Terms,
    choose,
    flat_labels,
    flatten,
    labelled_rows_of,
    rows_of,
)
from stillhouse.kernels.targets import Labels, Target


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
    settings = Settings(temperature, divergence, beta, count, reduction == "none", call.backend)
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
    settings = Settings(
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


def _apply(call: _Call, labels: Labels | None, settings: Settings) -> tuple[Tensor, Tensor]:
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
        labels: Labels | None, mask: Tensor | None, settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wanted = ctx.needs_input_grad[:3]
        ctx.wanted, ctx.settings, ctx.rest = wanted, settings, (target, labels, mask)
        ctx.dtype = hidden.dtype
        ctx.set_materialize_grads(False)
        made = (False, False, False) if settings.per_row else wanted
        soft, label, gradients = run(hidden, weight, bias, target, labels, mask, settings, made, None)
        # the layer, where backward may have to multiply it out again
        layer = (hidden, weight, bias) if settings.per_row or labels is not None else ()
        anchor = soft.new_empty(0)
        ctx.save_for_backward(*gradients, anchor, *layer)
        return soft, label, anchor

    @staticmethod
    def backward(ctx: Any, soft: Tensor | None, label: Tensor | None, _: None) -> tuple[Any, ...]:  # type: ignore[override]
        *gradients, anchor = ctx.saved_tensors[:4]
        layer, settings = ctx.saved_tensors[4:], ctx.settings

        def again(settings: Settings, upstream: Tensor | None) -> Any:
            hidden, weight, bias = layer
            target, labels, mask = ctx.rest
            return run(hidden, weight, bias, target, labels, mask, settings, ctx.wanted, upstream)[2]

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


def _scaled(gradients: Any, upstream: Tensor, settings: Settings, dtype: torch.dtype) -> list[Tensor | None]:
    if not late(settings, dtype):
        return [None if g is None else ops.scaled_in_place(g, upstream) for g in gradients]
    factor = upstream * inverse(divisor(settings))
    return [None if g is None else (g.float() * factor).to(dtype) for g in gradients]
