"""Logits that are not multiplied out unless somebody asks for the numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from typing_extensions import Self

from stillhouse.errors import ConfigError

_ABOUT: frozenset[Any] = frozenset(
    {
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "_version")
        ),
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.is_floating_point,
        Tensor.is_inference,
        Tensor.__len__,
    }
)
"""What can be asked of a tensor without its numbers."""


class Head(Tensor):
    """Logits ``hidden @ weight.T + bias``: a Tensor of their shape whose numbers are made when an operation needs them.

    ``soft_loss``, ``label_loss`` and ``soft_and_label_terms`` take it apart and multiply out a few rows at a time, those
    that count alone, so that N x V never exists. For everything else it is a tensor like any other.

    hidden
        ``(..., H)``: what the last layer reads.
    weight, bias
        ``(V, H)``, and ``(V,)`` or None.
    """

    def __new__(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Self:
        """See the class."""
        needs = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
        )
        made: Self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # noqa: SLF001 - a shape without memory
            cls,
            (*hidden.shape[:-1], weight.shape[0]),
            dtype=hidden.dtype,
            device=hidden.device,
            requires_grad=needs,
        )
        return made

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See the class."""
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self._made: Tensor | None = None

    @property
    def multiplied(self) -> bool:
        """Whether somebody asked for the numbers."""
        return self._made is not None

    def dense(self) -> Tensor:
        """The logits, multiplied out once."""
        if self._made is None:
            self._made = F.linear(self.hidden, self.weight, self.bias)
        return self._made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Everything but questions about the shape works on the numbers."""
        if func in _ABOUT:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        args, kwargs = tree_map_only(Head, Head.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Below autograd there is nothing to multiply out: whoever comes here (a custom autograd Function) has to ask."""
        raise ConfigError(
            f"{func} was given logits that are not multiplied out, below autograd; expected logits.dense() there"
        )
