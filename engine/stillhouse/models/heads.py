"""A model called without its last layer: the loss multiplies that out itself, for the rows that count alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.contract.head import Head
from stillhouse.contract.kinds import TaskKind
from stillhouse.models.calling import Output, call, evaluating, forward, unwrapped

SMALLEST = 1024
"""Outputs from which on it pays: below, the layer costs little beside the model."""


class Heads:
    """The output layers of a step's models, by role: those that a loss may multiply out itself."""

    def __init__(self) -> None:
        self._layers: dict[str, nn.Linear] = {}
        self._given: dict[str, Head] = {}

    def offer(self, models: Mapping[str, nn.Module], inputs: Any, kind: TaskKind) -> None:
        """Look for the output layers of these models; ``inputs`` are a few rows that they read."""
        if not kind.positions or kind.class_axis != -1:
            return
        for role, model in models.items():
            layer = output_layer(model, inputs, kind)
            if layer is not None:
                self._layers[role] = layer

    def call(
        self, role: str, model: nn.Module, inputs: Any, kind: TaskKind, asks: frozenset[str] = frozenset()
    ) -> Output:
        """One forward pass; the logits are a Head where the role's output layer is left to the loss."""
        layer = self._layers.get(role) if role in self._layers and _whole(model) else None
        if layer is not None and layer is not (own := find_layer(unwrapped(model))):
            layer = own  # a copy that stands in for the model
        if layer is None or not _plain(layer):  # somebody may have taken hold of it since
            return call(model, inputs, kind, asks)
        with handing_on(layer):
            out = call(model, inputs, kind, asks)
        hidden = out.logits
        if hidden.dtype != layer.weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(layer.weight.dtype)
        self._given[role] = head = Head(hidden, layer.weight, layer.bias)
        return replace(out, logits=head)

    def learn(self) -> None:
        """Where a method asked for all the numbers, the model makes them from now on: twice would be slower than once."""
        for role, head in self._given.items():
            if head.multiplied:
                self._layers.pop(role, None)
        self._given.clear()


def find_layer(model: nn.Module) -> nn.Linear | None:
    """The layer that the model calls its output layer, where it is a plain linear one."""
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if callable(find) else None
    return layer if type(layer) is nn.Linear else None


def output_layer(model: nn.Module, inputs: Any, kind: TaskKind) -> nn.Linear | None:
    """The linear layer whose output is the model's logits, unchanged; None where there is no such layer, or a small one.

    Shown on ``inputs``, not guessed: the model is called with the layer giving large random numbers, which have to come out as
    they are (a soft cap, a scale or a bias behind the layer changes them, whatever the weights are now), and with the
    layer handing on what it reads. A layer that others have taken hold of (hooks, a parametrisation, a forward of its own,
    shards) stays as it is.
    """
    layer = find_layer(model)
    if layer is None or layer.out_features < SMALLEST or not _plain(layer):
        return None
    drawn: list[Tensor] = []

    def draw(hidden: Tensor) -> Tensor:
        drawn.append(100 * torch.randn(*hidden.shape[:-1], layer.out_features).to(hidden))
        return drawn[-1]

    with torch.random.fork_rng(), evaluating(model):
        with _giving(layer, draw):
            logits = forward(model, inputs, kind)
        try:
            with handing_on(layer):
                hidden = forward(model, inputs, kind)
        except RuntimeError:  # what stands behind the layer takes logits of its width alone
            return None
    if len(drawn) != 1 or logits.shape != drawn[0].shape or not torch.equal(logits, drawn[0].to(logits)):
        return None
    fits = hidden.shape == (*logits.shape[:-1], layer.in_features)
    return layer if fits else None


def handing_on(layer: nn.Linear) -> AbstractContextManager[None]:
    """The layer gives what it is given, so that a model's logits are the hidden states that they would be made of."""
    return _giving(layer, _same)


@contextmanager
def _giving(layer: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    layer.forward = forward  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del layer.forward


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _plain(layer: nn.Linear) -> bool:
    own = vars(layer)
    hooks = any(own.get(name) for name in own if name.endswith("_hooks"))
    whole = type(layer.weight) is nn.Parameter and (layer.bias is None or type(layer.bias) is nn.Parameter)
    return whole and not hooks and "forward" not in own


def _whole(model: nn.Module) -> bool:
    """Whether the model's parameters are there between its calls, and a wrapper counts those used beside its outputs."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return not model.find_unused_parameters
    return not hasattr(model, "_fsdp_wrapped_module")
