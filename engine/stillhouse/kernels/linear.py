"""``linear_softmax_kl``: the last linear layer and the loss over its outputs, a few rows at a time.

Neither the logits (N, V) nor their gradient ever exist whole: a chunk of rows is multiplied out, turned into its
gradient in place, and folded into the gradients of hidden states, weight and bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillhouse.kernels import ops
from stillhouse.kernels.checks import (
    check_floating,
    check_label_values,
    check_labels,
    check_mask,
    check_settings,
    check_target,
    check_values,
)
from stillhouse.kernels.chunks import TeacherHead, Work, run
from stillhouse.kernels.errors import fail, require
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
from stillhouse.kernels.targets import Target

Layer = tuple[Tensor, Tensor, Tensor | None]


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

    ``hidden`` (..., H): last hidden states of the student; ``weight`` (V, H) and ``bias`` (V,) or None: its output layer, of their dtype
    (under autocast all are cast). ``target`` may also be a :class:`TeacherHead`, so that the teacher's logits do not exist whole
    either. All else, and the loss, is as of :func:`softmax_kl`. Gradients reach ``hidden``, ``weight`` and ``bias``;
    ``reduction="none"`` multiplies the layer out again in backward.

    Raises:
        ValueError: as :func:`softmax_kl`, and for shapes of hidden, weight and bias that do not fit.
    """
    check_settings(temperature, divergence, beta, reduction, count)
    settings = (1 if reduction == "sum" else count, temperature, divergence, beta)
    loss = _apply((hidden, weight, bias), target, mask, settings, backend, per_row=reduction == "none")[0]
    return loss.reshape(hidden.shape[:-1]) if reduction == "none" else loss


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

    ``hidden`` (..., H), ``weight`` (V, H), ``bias`` (V,) and ``target`` are as for :func:`linear_softmax_kl`, all else, and both terms,
    as of :func:`distillation_loss`. Other multiples of the terms than ``weights`` multiply the layer out again in backward. Of
    labels that are probabilities (..., V) the caller holds N x V.

    Raises:
        ValueError: as :func:`distillation_loss`, and for shapes of hidden, weight and bias that do not fit.
    """
    check_settings(temperature, divergence, beta, "mean", count)
    settings = (count, temperature, divergence, beta)
    terms = (labels, label_smoothing, weights, label_count)
    return Terms(*_apply((hidden, weight, bias), target, mask, settings, backend, terms=terms))


def _logits_like(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.new_empty(1).expand(*hidden.shape[:-1], weight.shape[0])  # a shape, no memory


def _apply(
    layer: Layer, target: Target | TeacherHead, mask: Tensor | None, settings: tuple[Any, float, str, float],
    backend: str | None, *, terms: tuple[Any, ...] | None = None, per_row: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both terms; ``settings``: count, temperature, divergence, beta; ``terms``: labels, smoothing, weights, their count."""
    count, temperature, divergence, beta = settings
    hidden, weight, bias = _cast(*layer)
    _check_layer("", hidden, weight, bias)
    logits, head, labels = _logits_like(hidden, weight), None, None if terms is None else terms[0]
    if isinstance(target, TeacherHead):
        _check_head(hidden, target)
        if mask is not None:
            check_mask(logits, mask)
        parts = (target.hidden.reshape(-1, target.hidden.shape[-1]), target.weight, target.bias)
        head = TeacherHead(*(None if x is None else x.detach() for x in parts))  # type: ignore[arg-type]
        target = _logits_like(target.hidden, target.weight)
    else:
        check_target(logits, target, mask, temperature, divergence)
    chosen = choose(logits, target, divergence, backend, labels=labels)
    _, flat, mask = flatten(hidden, target, mask)
    if head is None:
        check_values(flat, weight.shape[0], mask, chosen)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if count is None:
        count = rows_of(hidden, mask)
    by_torch, of_labels = chosen in {"torch", "small"}, {}
    if terms is not None:
        labels, smoothing, weights, label_count = terms
        check_labels(logits, labels, smoothing, weights, label_count)
        by_torch = by_torch or not fits_one_pass(logits, target, divergence, labels)
        y = flat_labels(labels, smoothing)
        if hidden.device.type == "cpu":
            check_label_values(y, weight.shape[0], mask)
        label_count = labelled_rows_of(y, mask) if label_count is None else label_count
        of_labels = {"labels": y, "weights": weights, "label_count": label_count}
    call = ops.call_of(flat, mask, count, temperature, divergence, beta, per_row=per_row, **of_labels)
    ops.refuse_forward_mode(hidden, weight, bias)
    if torch.is_grad_enabled():
        call = call.held()
    else:  # a Function is told what requires a gradient, not that none is wanted
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    work = Work(call if head is None else call._replace(dense=None, kind="dense"), head, by_torch)
    with torch.autocast(hidden.device.type, enabled=False):
        soft, label, _ = _LinearSoftmaxKL.apply(hidden, weight, bias, work)  # type: ignore[no-untyped-call]
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
    shapes = tuple(hidden.shape), tuple(weight.shape)
    fits = bool(shapes[0]) and len(shapes[1]) == 2 and shapes[0][-1] == shapes[1][1]
    got, fix = f"hidden {shapes[0]} and weight {shapes[1]}", "pass weight as torch.nn.Linear holds it"
    require(fits, f"{side}layer shapes", got, "(..., H) and (V, H)", fix)
    fix = "pass the output layer's weight"
    require(weight.numel() > 0, f"{side}weight shape", shapes[1], "(V, H), both >= 1", fix)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise fail(f"{side}{name} device", x.device, f"{hidden.device}, that of hidden", "move it there")
        if x is not None and x.dtype != hidden.dtype:
            raise fail(f"{side}{name} dtype", x.dtype, f"{hidden.dtype}, that of hidden", "cast one of them")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise fail(f"{side}bias shape", tuple(bias.shape), f"({shapes[1][0]},)", "pass the layer's own bias")


def _check_head(hidden: Tensor, target: TeacherHead) -> None:
    _check_layer("teacher ", target.hidden, target.weight, target.bias)
    rows, shape, device = tuple(hidden.shape[:-1]), tuple(target.hidden.shape), target.hidden.device
    require(shape[:-1] == rows, "teacher hidden shape", shape, f"{rows} + (H',)", "align the rows")
    expected = f"{hidden.device}, the student's"
    require(device == hidden.device, "teacher hidden device", device, expected, "move it there")


class _LinearSoftmaxKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: Work
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.wanted, ctx.work, ctx.dtype = ctx.needs_input_grad[:3], work, hidden.dtype
        ctx.set_materialize_grads(False)
        made = (False, False, False) if work.call.per_row else ctx.wanted
        soft, label, gradients = run((hidden, weight, bias), work, made, None)
        ctx.labelled = work.call.label_term() is not None
        # the layer, where backward may have to multiply it out again
        layer = (hidden, weight, bias) if work.call.per_row or ctx.labelled else ()
        anchor = soft.new_empty(0)
        ctx.save_for_backward(*gradients, anchor, *layer)
        return soft, label, anchor

    @staticmethod
    def backward(ctx: Any, soft: Tensor | None, label: Tensor | None, _: None) -> tuple[Any, ...]:  # type: ignore[override]
        *gradients, anchor = ctx.saved_tensors[:4]
        layer, work = ctx.saved_tensors[4:], ctx.work
        call = work.call
        with torch.no_grad():
            if ctx.labelled:
                common, again = ops.reweighted(call, soft, label)
                if again is not None:
                    call = again
                    gradients = run(layer, Work(call, work.head, work.by_torch), ctx.wanted, None)[2]
                soft = anchor.new_full((), common)
            if soft is not None and work.call.per_row:
                gradients = run(layer, work, ctx.wanted, soft)[2]
            elif soft is not None and ctx.dtype == torch.float16:
                factor = soft.double() / call.late(ctx.dtype)
                gradients = [None if g is None else (g.float() * factor).to(ctx.dtype) for g in gradients]
            elif soft is not None:
                gradients = [None if g is None else ops.scaled_in_place(g, soft) for g in gradients]
        if torch.is_grad_enabled():
            gradients = [None if g is None else ops.no_second_derivative(g, anchor) for g in gradients]
        return (*gradients, None)
