"""Which module's output is a model's feature, and whether it can be projected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.api import ConfigError, RunContext


@dataclass(frozen=True)
class Feature:
    """A named module's output, as rows of ``width`` numbers.

    module
        Its dotted name.
    rows
        The leading shape: that of the model's outputs without their last axis.
    width
        Numbers a row, after flattening what follows the rows.
    outputs
        Width of the model's outputs.
    """

    role: str
    module: str
    rows: tuple[int, ...]
    width: int
    outputs: int


def feature(
    run: RunContext, role: str, model: nn.Module, inputs: Any, asked: str | None, option: str
) -> Feature:
    """Ask the engine for the named module's output, or for the penultimate layer's, and measure it.

    ``option`` is the setting that names the module, for messages.

    Raises ConfigError for a module that doesn't exist (with the nearest names), that isn't called, or
    whose output has no row for each row of the model's outputs.
    """
    if asked is not None:
        run.capture(role, asked)
    calls, outputs = watch(model, inputs)
    name = asked or penultimate(calls, role, option)
    run.capture(role, name)
    rows = tuple(outputs.shape[:-1])
    if name not in calls:
        raise ConfigError(f"{role}.{name} was not called in a forward pass; name a module that is")
    shape = calls[name]
    if shape is None or shape[: len(rows)] != rows or len(shape) == 0 or 0 in shape:
        got = "something that is no float tensor" if shape is None else f"shape {shape}"
        raise ConfigError(
            f"{role}.{name} gives {got}, which can't be projected; expected {(*rows, '...')}, a row for each "
            f"of the outputs {tuple(outputs.shape)}: name another module under {option}"
        )
    width = 1
    for size in shape[len(rows) :]:
        width *= size
    if asked is None:
        run.chose(f"{option}", f"{name}, {width} wide", "the last module before the head")
    return Feature(role, name, rows, width, int(outputs.shape[-1]))


def watch(model: nn.Module, inputs: Any) -> tuple[dict[str, tuple[int, ...] | None], Tensor]:
    """Every module that a forward pass calls, in order of its end, with its output's shape; and the outputs."""
    calls: dict[str, tuple[int, ...] | None] = {}
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(_keeper(name, calls)))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            out = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    out = getattr(out, "logits", out)
    return calls, out[0] if isinstance(out, tuple) else out


def _keeper(name: str, calls: dict[str, tuple[int, ...] | None]) -> Any:
    def keep(module: nn.Module, given: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        usable = isinstance(output, Tensor) and output.is_floating_point()
        calls.pop(name, None)
        calls[name] = tuple(output.shape) if usable else None

    return keep


def penultimate(calls: Mapping[str, tuple[int, ...] | None], role: str, option: str) -> str:
    """The last module without children that is called before the last one: what the head reads."""
    inner = [
        name
        for name, shape in calls.items()
        if shape is not None and not any(other.startswith(f"{name}.") for other in calls)
    ]
    if len(inner) < 2:
        raise ConfigError(
            f"the {role} has no module before its head; expected at least two: wrap its layers in modules, or "
            f"name one under {option}"
        )
    return inner[-2]


def as_rows(value: Tensor, logits: Tensor, asked: Feature) -> Tensor:
    """The feature as ``(*rows, width)``, for the batch whose outputs are ``logits``."""
    rows = logits.shape[:-1]
    flat = value.reshape(*rows, -1)
    if flat.shape[-1] != asked.width:
        raise ConfigError(
            f"{asked.role}.{asked.module} gave {flat.shape[-1]} numbers a row, and {asked.width} before; expected a "
            "fixed width: name a module behind the pooling over positions"
        )
    return flat
