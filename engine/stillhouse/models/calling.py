"""Calling a model on a batch's inputs, and what it answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import ConfigError


def forward(model: nn.Module, inputs: Any) -> Tensor:
    """The model's logits: a mapping is passed as keyword arguments; an output object's ``.logits`` is taken."""
    out = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(out, Tensor):
        return out
    logits = getattr(out, "logits", None)
    if logits is None and isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        logits = out[0]
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"{type(model).__name__} gave {type(out).__name__}; expected a tensor of logits, an object with "
            ".logits, or a tuple that starts with them"
        )
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without a graph; each module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
