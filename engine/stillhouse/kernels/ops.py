"""The operators ``torch.ops.stillhouse.softmax_kl`` and ``softmax_kl_``, and their place in autograd.

The gradient is computed with the loss, in one go over the logits, and kept for backward.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from stillhouse.kernels.checks import check_count_value, check_values, checked
from stillhouse.kernels.reference import top_k_at
from stillhouse.kernels.targets import Sampled, Target, TopK

_ARGUMENTS = (
    "Tensor? dense, Tensor? indices, Tensor? values, Tensor? rest, str kind, float held_at, Tensor? mask, Tensor? count, "
    "float divisor, float temperature, str divergence, float beta, bool look, bool per_row"
)
_library = torch.library.Library("stillhouse", "FRAGMENT")
_library.define(f"softmax_kl(Tensor student, {_ARGUMENTS}, bool gradient) -> (Tensor, Tensor)")
_library.define(f"softmax_kl_(Tensor(a!) student, {_ARGUMENTS}) -> Tensor")

Arguments = tuple[Any, ...]  # in the order of _ARGUMENTS


def arguments(
    target: Target, mask: Tensor | None, count: float | Tensor | None, temperature: float, divergence: str,
    beta: float, per_row: bool,
) -> Arguments:  # fmt: skip
    """The operator's arguments after the student; ``look``: its values were not checked yet, and are to be."""
    dense = target if isinstance(target, Tensor) else None
    indices = None if isinstance(target, Tensor) else target.indices
    values, rest, kind, held_at = None, None, "dense", 1.0
    if isinstance(target, TopK):
        values, rest, kind = target.log_probs, target.log_rest, target.rest
        held_at = float(target.temperature)
    elif isinstance(target, Sampled):
        values, kind = target.weights, "sampled"
    look = torch.compiler.is_compiling() and not (isinstance(target, Tensor) or target.trusted)
    divisor, tensor = (1.0, count) if isinstance(count, Tensor) else (float(count or 0), None)
    return (
        dense, indices, values, rest, kind, held_at, mask, tensor, divisor, float(temperature), divergence,
        float(beta) if divergence == "jsd" else 0.5, look, per_row,
    )  # fmt: skip


def _target(
    dense: Tensor | None, indices: Tensor | None, values: Tensor | None, rest: Tensor | None, kind: str,
    held_at: float,
) -> Target:  # fmt: skip
    if dense is not None:
        return dense
    assert indices is not None
    assert values is not None
    if kind == "sampled":
        return Sampled(indices, values)
    return TopK(indices, values, kind, held_at, log_rest=rest)  # type: ignore[arg-type]


def _compute(student: Tensor, arguments: Arguments, out: Tensor | None) -> Tensor:
    """The loss, reduced; the gradient to ``out``."""
    *target, mask, count, divisor, temperature, divergence, beta, look, per_row = arguments
    against = _target(*target)
    late = student.dtype == torch.float16  # its gradient is divided in backward
    restricted = divergence == "reverse" and isinstance(against, TopK) and against.rest == "renormalise"
    settings = {
        "temperature": temperature, "divergence": divergence, "beta": beta, "mask": mask, "out_grad": out,
    }  # fmt: skip
    if student.is_cuda:
        factor: Any = 1.0 if per_row else reciprocal(divisor)
        if count is not None and not per_row:
            factor = reciprocal(count).to(device=student.device, dtype=torch.float32)
        rows_of = _within(_cuda_rows) if restricted else _cuda_rows
        rows = rows_of(student, against, scale=1.0 if late else factor, **settings)
        return rows if per_row else rows.sum() * factor
    if count is not None:
        divisor = number(count)
    if look:
        check_values(against, student.shape[1], mask)
    factor = 1.0 if per_row else reciprocal(divisor)
    settings |= {"scale": 1.0 if late else factor, "loss_scale": factor or 1.0}
    loss = None if per_row else student.new_empty((), dtype=torch.float32)
    if restricted:
        rows = _within(lambda *of, **how: cpu().softmax_kl_fwd_bwd(*of, **how)[0][0])(
            student, against, **settings
        )
        total = rows.sum().item()
        if loss is not None:
            loss.fill_(total)
    else:
        rows, (total, _) = cpu().softmax_kl_fwd_bwd(student, against, loss=loss, **settings)
    checked(
        total, rows[0] if rows.dim() == 2 else rows, "logits at the k entries" if restricted else "logits"
    )
    if loss is None:
        return rows[0] if rows.dim() == 2 else rows
    return loss if factor else loss.zero_()


def number(count: Any) -> float:
    """A count that may be a tensor on the CPU."""
    value = count.item() if isinstance(count, Tensor) else float(count)
    check_count_value(value)
    return float(value)


def reciprocal(count: Any) -> Any:
    """1 / count; 0 for no valid row at all."""
    if isinstance(count, Tensor):
        return torch.where(count > 0, 1.0 / count, 0.0)
    return 1.0 / count if count else 0.0


@lru_cache(maxsize=1)
def cpu() -> Any:
    from stillhouse.kernels import cpu as backend  # loads or compiles the kernels: not before they are used

    return backend


def _cuda_rows(student: Tensor, target: Target, *, out_grad: Tensor | None, **settings: Any) -> Tensor:
    from stillhouse.kernels import cuda

    if isinstance(target, TopK):
        temperature = settings["temperature"]
        target = replace(target, log_probs=top_k_at(target, temperature), temperature=temperature)
    if not isinstance(target, Tensor) or target.dtype == student.dtype:
        return cuda.softmax_kl_fwd_bwd(student, target, out_grad=out_grad, **settings)
    # the kernel reads both in one type
    wide = (
        None if out_grad is None else torch.empty(student.shape, dtype=torch.float32, device=student.device)
    )
    rows = cuda.softmax_kl_fwd_bwd(student.float(), target.float(), out_grad=wide, **settings)
    if out_grad is not None and wide is not None:
        out_grad.copy_(wide)
    return rows


def _within(rows_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The rows of KL(s || t) where the student too is restricted to the k entries: those of logits k wide.

    An index that is none of the row's makes its loss -inf on the CPU and NaN elsewhere, as in the kernels.
    """

    def rows_within(
        student: Tensor, target: TopK, *, temperature: float, mask: Tensor | None, out_grad: Tensor | None,
        **settings: Any,
    ) -> Tensor:  # fmt: skip
        wrong = ((target.indices < 0) | (target.indices >= student.shape[1])).any(-1)
        keep = ~wrong if mask is None else mask & ~wrong
        indices = torch.where(keep[:, None], target.indices, 0)
        kept = student.gather(-1, indices)
        gradient = None if out_grad is None else torch.empty_like(kept)
        teacher = target.log_probs
        if target.temperature != 1.0 or teacher.dtype == torch.float64:
            # relative to the largest, or flat ones lose in float32 what they differ by
            teacher = teacher.double() - teacher.double().amax(-1, keepdim=True)
            teacher = (teacher * target.temperature).to(torch.float32)
        rows = rows_of(kept, teacher, temperature=temperature, mask=keep, out_grad=gradient, **settings)
        if out_grad is not None and gradient is not None:
            out_grad.zero_().scatter_add_(-1, indices, gradient)
        fault = -math.inf if student.device.type == "cpu" else math.nan
        return torch.where(wrong if mask is None else mask & wrong, fault, rows)

    return rows_within


def _forward(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *arguments, gradient = rest
    student = student if student.stride(1) == 1 else student.contiguous()
    if not gradient:
        out = student.new_empty(0)
        return _compute(student, tuple(arguments), None), out
    out = torch.empty_like(student, memory_format=torch.contiguous_format)
    return _compute(student, tuple(arguments), out), out


def _forward_inplace(student: Tensor, *arguments: Any) -> Tensor:
    return _compute(student, arguments, student)


def _shape_of_loss(student: Tensor, arguments: Arguments) -> Tensor:
    return student.new_empty(student.shape[:1] if arguments[-1] else (), dtype=torch.float32)


def _fake(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *arguments, gradient = rest
    return _shape_of_loss(student, tuple(arguments)), student.new_empty(student.shape if gradient else (0,))


for _key in ("CPU", "CUDA"):
    _library.impl("softmax_kl", _forward, _key)
    _library.impl("softmax_kl_", _forward_inplace, _key)
torch.library.register_fake("stillhouse::softmax_kl", _fake, lib=_library)
torch.library.register_fake(
    "stillhouse::softmax_kl_", lambda student, *arguments: _shape_of_loss(student, arguments), lib=_library
)


def softmax_kl(student: Tensor, arguments: Arguments, inplace: bool) -> Tensor:
    """The operator with its gradient; student (N, V)."""
    refuse_forward_mode(student)
    if not (torch.is_grad_enabled() and student.requires_grad):
        loss: Tensor = torch.ops.stillhouse.softmax_kl.default(student, *arguments, False)[0]
        return loss
    inplace = inplace and not torch.compiler.is_compiling() and overwritable(student, arguments)
    return _SoftmaxKL.apply(student, arguments, inplace)[0]  # type: ignore[no-any-return, no-untyped-call]


def overwritable(student: Tensor, arguments: Sequence[Any]) -> bool:
    """Is a row of the student its own memory, which no other row, target or mask is read from?"""
    first, last = _span(student)
    others = (_span(x) for x in arguments if isinstance(x, Tensor) and x.device == student.device)
    return (
        student.is_contiguous()
        and not student.is_neg()
        and all(end <= first or last <= start for start, end in others)
    )


def _span(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one after the last."""
    if x.is_contiguous():
        return x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()


def is_constant(x: Tensor | None) -> bool:
    """Is there surely nothing to detach ``x`` from, be it for backward, for forward mode or for torch.func?"""
    return x is None or not (x.requires_grad or torch.compiler.is_compiling() or is_transformed())


def is_transformed() -> bool:
    """Is the call inside of forward mode or of torch.func?"""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def refuse_forward_mode(*inputs: Tensor | None) -> None:
    """Raise where a tangent would be dropped without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(
            "softmax_kl: got a forward-mode derivative (jvp, a dual tensor); expected backward, since the fused kernel "
            "has no other. Fix: pass softmax_kl backend='torch' (after the layer, where this was linear_softmax_kl), or take the "
            "derivative by backward."
        )


class _SoftmaxKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, arguments: Arguments, inplace: bool) -> tuple[Tensor, Tensor]:
        if inplace:
            gradient = student.detach()
            try:
                loss: Tensor = torch.ops.stillhouse.softmax_kl_.default(gradient, *arguments)
            finally:  # who saved these logits is told that they are gone, also where a row was refused
                torch.autograd.graph.increment_version(student)
        else:
            loss, gradient = torch.ops.stillhouse.softmax_kl.default(student, *arguments, True)
        count, divisor, per_row = arguments[7], arguments[8], arguments[-1]
        # float16 would lose 1/count times a small gradient before the loss scaler can lift it: divided in backward
        late = student.dtype == torch.float16 and not per_row
        ctx.divisor = (count if count is not None else divisor) if late else None
        anchor = loss.new_empty(0)
        ctx.save_for_backward(gradient, anchor)
        ctx.set_materialize_grads(False)
        return loss, anchor

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor, None, None]:  # type: ignore[override]
        gradient, anchor = ctx.saved_tensors
        if ctx.divisor is not None:
            upstream = upstream * reciprocal(ctx.divisor)
        if torch.compiler.is_compiling():
            return _scaled(gradient, upstream), None, None
        gradient = scaled_in_place(gradient, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            gradient = no_second_derivative(gradient, anchor)
        return gradient, None, None


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    return (gradient * (upstream[:, None] if upstream.dim() else upstream)).to(gradient.dtype)


def scaled_in_place(gradient: Tensor, upstream: Tensor) -> Tensor:
    """The saved gradient times the upstream one: as it is for 1, in place where no second backward will need it."""
    if upstream.dim() == 0 and upstream.device.type == "cpu" and upstream.item() == 1.0:
        return gradient
    with torch.no_grad():
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return _scaled(gradient, upstream)
        return gradient.mul_(upstream[:, None] if upstream.dim() else upstream)


def no_second_derivative(gradient: Tensor, anchor: Tensor) -> Tensor:
    """The gradient, such that differentiating it raises.

    ``anchor`` is an empty output of the function whose gradient it is: by it the graph goes on to that function's
    inputs. Without, a derivative in one of them would be "unused", which some callers take for zero.
    """
    return _NoSecondDerivative.apply(gradient.detach().requires_grad_(), anchor)  # type: ignore[no-any-return, no-untyped-call]


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, anchor: Tensor) -> Tensor:  # noqa: ARG004
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError(
            "softmax_kl: got a request for its second derivative; expected a first derivative only, since the fused "
            "kernel keeps the gradient and not the logits. Fix: pass softmax_kl backend='torch' (after the layer, where this "
            "was linear_softmax_kl), which can be differentiated any number of times."
        )
