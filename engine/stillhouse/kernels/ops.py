"""The operator ``torch.ops.stillhouse.softmax_kl``, and its place in autograd.

The gradient is computed with the loss, in one go over the logits, and kept for backward. With labels there are two losses, and the
gradient is that of their weighted sum.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

from stillhouse.kernels.checks import check_count_value, check_values, checked, checked_labels
from stillhouse.kernels.normalise import single
from stillhouse.kernels.reference import top_k_at
from stillhouse.kernels.targets import Labels, Sampled, Target, TopK, restricted

SAME = 1e-6  # relative: weights that differ by no more count as those that the gradient was made for
LIFT = 1024.0  # far enough from float16's largest number for a product with a layer's weights
Count = float | Tensor


class Call(NamedTuple):
    """All of a call but the student's logits, as the operators take it; rows in one dimension."""

    dense: Tensor | None
    indices: Tensor | None
    values: Tensor | None
    rest: Tensor | None
    kind: str  # "dense", "sampled", or what a TopK's rest is
    held_at: float  # the temperature of a TopK's log-probabilities
    labels: Tensor | None
    probabilities: Tensor | None
    smoothing: float
    mask: Tensor | None
    soft_count: Tensor | None  # a divisor that is a tensor, in whose place the number is 1
    soft_divisor: float
    label_count: Tensor | None
    label_divisor: float
    weight: float  # of the divergence in the gradient
    label_weight: float
    temperature: float
    divergence: str
    beta: float
    look: bool  # the target's values were not checked yet, and are to be
    per_row: bool

    def target(self) -> Target:
        """The teacher's side."""
        if self.dense is not None:
            return self.dense
        assert self.indices is not None
        assert self.values is not None
        if self.kind == "sampled":
            return Sampled(self.indices, self.values)
        return TopK(self.indices, self.values, self.kind, self.held_at, log_rest=self.rest)  # type: ignore[arg-type]

    def label_term(self) -> Labels | None:
        """The labels, where there are any."""
        if self.labels is None and self.probabilities is None:
            return None
        return Labels(self.labels, self.probabilities, self.smoothing)

    def counts(self) -> tuple[Count, Count]:
        """What either term is divided by."""
        return (
            self.soft_divisor if self.soft_count is None else self.soft_count,
            self.label_divisor if self.label_count is None else self.label_count,
        )

    def held(self) -> Call:
        """With counts of its own, where they are tensors: the caller may change these before backward."""
        soft, label = (x if x is None else x.detach().clone() for x in (self.soft_count, self.label_count))
        return self if soft is label is None else self._replace(soft_count=soft, label_count=label)

    def weights(self) -> tuple[float, float]:
        """Of both terms."""
        return self.weight, self.label_weight

    def late(self, dtype: torch.dtype) -> Any:
        """What a gradient is divided by in backward: float16 would lose 1 / count times it before a scaler lifts it.

        The count of the divergence, or more where the label term is divided by a larger one, less where by a smaller one: such that
        neither term exceeds ``LIFT``.
        """
        if dtype != torch.float16 or self.per_row:
            return 1.0
        count, labelled = (
            torch.where(x > 0, x, 1) if isinstance(x, Tensor) else x or 1.0 for x in self.counts()
        )
        if self.label_weight == 0:  # as without labels
            return count
        if self.weight == 0:
            return labelled
        least: Any = min
        most: Any = max
        if isinstance(count, Tensor) or isinstance(labelled, Tensor):
            count, labelled = torch.as_tensor(count), torch.as_tensor(labelled)
            least, most = torch.minimum, torch.maximum
        more = least(labelled, count * (LIFT / self.weight / self.temperature))
        return least(most(count, more), labelled * (LIFT / self.label_weight))


def call_of(
    target: Target, mask: Tensor | None, count: Count | None, temperature: float, divergence: str, beta: float, *,
    per_row: bool = False, labels: Labels | None = None, weights: tuple[float, float] = (1.0, 0.0), label_count: Count = 0,
) -> Call:  # fmt: skip
    """The operator's arguments after the student."""
    dense, indices, values, rest, kind, held_at = None, None, None, None, "dense", 1.0
    if isinstance(target, Tensor):
        dense = target
    else:
        indices, kind = target.indices, "sampled"
        values = target.weights if isinstance(target, Sampled) else target.log_probs
    if isinstance(target, TopK):
        rest, kind, held_at = target.log_rest, target.rest, float(target.temperature)
    look = torch.compiler.is_compiling() and not (isinstance(target, Tensor) or target.trusted)
    of_labels = (
        (None, None, 0.0) if labels is None else (labels.indices, labels.probabilities, labels.smoothing)
    )
    return Call(
        dense, indices, values, rest, kind, held_at, *of_labels, mask, *_divisor(0.0 if count is None else count),
        *_divisor(label_count), float(weights[0]), float(weights[1]), float(temperature), divergence,
        float(beta) if divergence == "jsd" else 0.5, look, per_row,
    )  # fmt: skip


def _divisor(count: Count) -> tuple[Tensor | None, float]:
    return (count, 1.0) if isinstance(count, Tensor) else (None, float(count))


def number(count: Any, name: str) -> float:
    """A count that may be a tensor on the CPU."""
    value = count.item() if isinstance(count, Tensor) else float(count)
    check_count_value(value, name)
    return float(value)


def reciprocal(count: Count) -> Any:
    """1 / count, in float64; 0 for no valid row at all."""
    if isinstance(count, Tensor):
        return torch.where(count > 0, 1.0 / count.double(), 0.0)
    return 1.0 / count if count else 0.0


def divided(total: Tensor, share: Any) -> Tensor:
    """``total`` times its :func:`reciprocal` share, of its dtype; what nothing is divided by is 0, also where a row is +inf."""
    if isinstance(share, Tensor):
        return torch.where(share > 0, total * share, 0).to(total.dtype)
    return total * share if share else torch.zeros_like(total)


def compute(student: Tensor, call: Call, out: Tensor | None) -> Tensor:
    """The loss, reduced, or both terms (2,); the gradient, still to be divided by ``call.late``, to ``out``."""
    on_cpu = not student.is_cuda
    if on_cpu:
        soft, label = map(number, call.counts(), ("count", "label_count"))
        call = call._replace(soft_count=None, soft_divisor=soft, label_count=None, label_divisor=label)
    target, labels, late = call.target(), call.label_term(), call.late(student.dtype)
    if isinstance(target, Tensor) and target.dtype == torch.float64 and call.divergence == "forward":
        target = target[
            :, : student.shape[1]
        ]  # what is dropped is not to be the largest that ``single`` subtracts
    if call.look and on_cpu:
        check_values(target, student.shape[1], call.mask)
    each = (1.0, 0.0) if call.per_row else tuple(map(reciprocal, call.counts()))
    within = restricted(target, call.divergence)
    rows_of = _cpu_rows if on_cpu else _cuda_rows
    rows, totals = (_within(rows_of) if within else rows_of)(
        student, target, temperature=call.temperature, divergence=call.divergence, beta=call.beta, mask=call.mask,
        scales=(call.weight * each[0] * late, call.label_weight * each[1] * late), out_grad=out, labels=labels,
    )  # fmt: skip
    if on_cpu:
        checked(float(totals[0]), rows[0], "logits at the k entries" if within else "logits")
        if labels is not None:
            checked_labels(totals[1], rows[1], labels, student.shape[1], call.mask)
    if call.per_row:
        return rows[0]
    if on_cpu:  # what nothing is divided by is 0, also where a row is +inf
        terms = [total * share if share else 0.0 for total, share in zip(totals, each, strict=False)]
        loss = student.new_tensor(terms, dtype=torch.float32)
    else:
        loss = torch.stack([divided(total, share) for total, share in zip(totals, each, strict=False)])
    return loss[0] if labels is None else loss


def _cpu_rows(student: Tensor, target: Target, **settings: Any) -> tuple[Tensor, Any]:
    from stillhouse.kernels import cpu  # loads or compiles the kernels: not before they are used

    return cpu.softmax_kl_fwd_bwd(student, target, **settings)


def _cuda_rows(
    student: Tensor, target: Target, *, out_grad: Tensor | None, **settings: Any
) -> tuple[Tensor, Any]:
    from stillhouse.kernels import cuda

    wide = out_grad
    if isinstance(target, TopK):
        temperature = settings["temperature"]
        target = replace(target, log_probs=top_k_at(target, temperature), temperature=temperature)
    elif isinstance(target, Tensor) and target.dtype != student.dtype:  # the kernel reads both in one type
        student, target = student.float(), single(target)
        wide = None if out_grad is None else torch.empty_like(student)
    rows = cuda.softmax_kl_fwd_bwd(student, target, out_grad=wide, **settings)
    if out_grad is not None and wide is not None and wide is not out_grad:
        out_grad.copy_(wide)
    return rows, rows.sum(-1).unbind()


def _within(rows_of: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
    """The rows of KL(s || t) where the student too is restricted to the k entries: those of logits k wide.

    An index that is none of the row's makes its loss -inf on the CPU and NaN elsewhere, as in the kernels.
    """

    def rows_within(
        student: Tensor, target: TopK, *, temperature: float, mask: Tensor | None, out_grad: Tensor | None,
        **settings: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
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
        rows, _ = rows_of(kept, teacher, temperature=temperature, mask=keep, out_grad=gradient, **settings)
        if out_grad is not None and gradient is not None:
            out_grad.zero_().scatter_add_(-1, indices, gradient)
        fault = -math.inf if student.device.type == "cpu" else math.nan
        rows = torch.where(wrong if mask is None else mask & wrong, fault, rows)
        totals = rows.sum(-1)
        return rows, totals.unbind() if student.is_cuda else totals.tolist()

    return rows_within


# -- the operators


def _forward(student: Tensor, call: Call, gradient: bool) -> tuple[Tensor, Tensor]:
    student = student if student.stride(1) == 1 else student.contiguous()
    if not gradient:
        return compute(student, call, None), student.new_empty(0)
    out = torch.empty_like(student, memory_format=torch.contiguous_format)
    return compute(student, call, out), out


def _fake(student: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    call, gradient = Call(*rest[:-1]), rest[-1]
    several = student.shape[:1] if call.per_row else (2,) if call.label_term() is not None else ()
    loss = student.new_empty(several, dtype=torch.float32)
    return loss, student.new_empty(student.shape if gradient else (0,))


_ARGUMENTS = ", ".join(
    f"{getattr(kind, '__forward_arg__', kind)} {name}".replace("Tensor | None", "Tensor?")
    for name, kind in Call.__annotations__.items()
)
_library = torch.library.Library("stillhouse", "FRAGMENT")
_library.define(f"softmax_kl(Tensor student, {_ARGUMENTS}, bool gradient) -> (Tensor, Tensor)")
for _key in ("CPU", "CUDA"):
    _library.impl("softmax_kl", lambda s, *rest: _forward(s, Call(*rest[:-1]), rest[-1]), _key)
torch.library.register_fake("stillhouse::softmax_kl", _fake, lib=_library)


def _fresh(student: Tensor, call: Call, gradient: bool) -> tuple[Tensor, Tensor]:
    """By the operator where torch traces the call, else without: a dispatcher of a score of arguments is a tenth of a call at 4096 x 1000."""
    if _is_plain(student):
        return _forward(student, call, gradient)
    made: tuple[Tensor, Tensor] = torch.ops.stillhouse.softmax_kl.default(student, *call, gradient)
    return made


def _is_plain(student: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(student) in {Tensor, torch.nn.Parameter}
        and not is_transformed()
    )


# -- and their derivative


def softmax_kl(student: Tensor, call: Call, inplace: bool) -> tuple[Tensor, Tensor]:
    """(Divergence, label term or 0) with their gradient; student (N, V)."""
    refuse_forward_mode(student)
    if not (torch.is_grad_enabled() and student.requires_grad):
        return _terms(_fresh(student, call, False)[0], call)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(_DERIVATIVE.format(got="a derivative by torch.func"))
    inplace = inplace and _is_plain(student) and overwritable(student, call)
    return _SoftmaxKL.apply(student, call.held(), inplace)[:2]  # type: ignore[no-any-return]


def _terms(losses: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    if call.label_term() is None:
        return losses, losses.new_zeros(())
    return losses[0].clone(), losses[1].clone()


class _SoftmaxKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, call: Call, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
        if inplace:
            gradient = student.detach()
            try:
                losses = compute(gradient, call, gradient)
            finally:  # who saved these logits is told that they are gone, also where a row was refused
                torch.autograd.graph.increment_version(student)
        else:
            losses, gradient = _fresh(student, call, True)
        ctx.call, ctx.inplace = call, inplace
        anchor = losses.new_empty(0)
        again = (student,) if call.label_term() is not None and not inplace else ()
        ctx.save_for_backward(gradient, anchor, *again)
        ctx.set_materialize_grads(False)
        return *_terms(losses, call), anchor

    @staticmethod
    def backward(
        ctx: Any, soft: Tensor | None, label: Tensor | None, _: None
    ) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        (gradient, anchor, *again), call = ctx.saved_tensors, ctx.call
        if call.label_term() is not None:
            factor, other = reweighted(call, soft, label)
            if other is not None:
                if ctx.inplace:
                    got = tuple(factor * weight for weight in other.weights())
                    raise RuntimeError(_OVERWRITTEN.format(got=got, expected=call.weights()))
                call = other
                with torch.no_grad():
                    gradient = _fresh(again[0], call, True)[1]
            soft = anchor.new_full((), factor)
        if soft is None:
            return None, None, None
        late = call.late(gradient.dtype)
        upstream = soft if isinstance(late, float) and late == 1.0 else soft / late
        if torch.compiler.is_compiling():
            return _scaled(gradient, upstream), None, None
        gradient = scaled_in_place(gradient, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            gradient = no_second_derivative(gradient, anchor)
        return gradient, None, None


_OVERWRITTEN = (
    "distillation_loss: got derivatives of its terms weighted {got}; expected a multiple of weights={expected}, for which "
    "inplace=True has overwritten the logits by their gradient. Fix: pass these weights, or drop inplace."
)


def reweighted(call: Call, soft: Tensor | None, label: Tensor | None) -> tuple[float, Call | None]:
    """(Factor of the gradient that was made, None) for these derivatives of the terms, where the call's weights times it are what
    is asked for; else (their size, the call of the gradient to be made, less that size: with a loss scaler's factor in its
    weights float16 would not hold it). On a GPU it waits for the derivatives.
    """
    x, y = 0.0 if soft is None else float(soft.item()), 0.0 if label is None else float(label.item())
    a, b = call.weights()
    if (a == b == 0 and not x == y == 0) or abs(x * b - y * a) > SAME * max(abs(x * b), abs(y * a)):
        size = max(abs(x), abs(y))
        return size, call._replace(weight=x / size, label_weight=y / size)
    return (0.0 if a == b == 0 else x / a if a >= b else y / b), None


def overwritable(student: Tensor, read: Iterable[Any]) -> bool:
    """Is a row of the student its own memory, which no other row, target or mask is read from?"""
    first, last = _span(student)
    others = (_span(x) for x in read if isinstance(x, Tensor) and x.device == student.device)
    apart = all(end <= first or last <= start for start, end in others)
    return student.is_contiguous() and not student.is_neg() and apart


def _span(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one after the last."""
    reach = (
        sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        if x.numel()
        else -1
    )
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()


def is_constant(x: Tensor | None) -> bool:
    """Is ``x`` as it lies in memory, with surely nothing to detach it from, be it for backward, for forward mode or for torch.func?"""
    return x is None or not (
        x.requires_grad or torch.compiler.is_compiling() or is_transformed() or x.is_neg()
    )


def is_transformed() -> bool:
    """Is the call inside of forward mode or of torch.func?"""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def refuse_forward_mode(*inputs: Tensor | None) -> None:
    """Raise where a tangent would be dropped without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(_DERIVATIVE.format(got="a forward-mode derivative (jvp, a dual tensor)"))


_DERIVATIVE = (
    "softmax_kl: got {got}; expected a first derivative by backward only, since the fused kernel keeps the gradient and not the "
    "logits. Fix: pass softmax_kl backend='torch' (after the layer, where this was linear_softmax_kl), which has the others too."
)


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    return (gradient * (upstream[:, None] if upstream.dim() else upstream)).to(gradient.dtype)


def scaled_in_place(gradient: Tensor, upstream: Tensor) -> Tensor:
    """The saved gradient times the upstream one: in place, or as it is for 1, where no second backward will need it."""
    with torch.no_grad():
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return _scaled(gradient, upstream)
        if upstream.dim() == 0 and upstream.device.type == "cpu" and upstream.item() == 1.0:
            return gradient
        return gradient.mul_(upstream[:, None] if upstream.dim() else upstream)


def no_second_derivative(gradient: Tensor, anchor: Tensor) -> Tensor:
    """The gradient, such that differentiating it raises.

    ``anchor`` is an empty output of the function whose gradient it is: by it the graph goes on to that function's
    inputs. Without, a derivative in one of them would be "unused", which some callers take for zero.
    """
    return _NoSecondDerivative.apply(gradient.detach().requires_grad_(), anchor)  # type: ignore[no-any-return]


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, anchor: Tensor) -> Tensor:  # noqa: ARG004
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError(_DERIVATIVE.format(got="a request for its second derivative"))
