"""Models: built by name, run on a batch, watched by forward hooks, checked for randomness."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillhouse.errors import ConfigError, nearest
from stillhouse.tasks import Builder


def arguments_model(builder: Builder) -> type[BaseModel]:
    """A pydantic model of a builder's keyword arguments, from its signature."""
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(builder, eval_str=True).parameters.items():
        kind = Any if parameter.annotation is parameter.empty else parameter.annotation
        fields[name] = (kind, ... if parameter.default is parameter.empty else parameter.default)
    name = getattr(builder, "__name__", "model")
    return create_model(name, __config__=ConfigDict(extra="forbid", frozen=True), **fields)


def arguments(builder: Builder, given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Validated arguments with the defaults filled in; ConfigError with the config path otherwise."""
    from stillhouse.config import explain

    kind = arguments_model(builder)
    try:
        return kind.model_validate(dict(given)).model_dump()
    except ValidationError as error:
        raise ConfigError(explain(error, kind, path)) from None


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


class Captures:
    """Outputs of named modules, taken by forward hooks on these instances only.

    A class-wide or global hook would let two runs in one process overwrite each other.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self._models = dict(models)
        self._taken: dict[str, dict[str, Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def offer(self, role: str, model: nn.Module) -> None:
        """Make another model's modules available."""
        self._models[role] = model

    def add(self, role: str, name: str) -> None:
        """Take the output of ``name`` at each forward pass of ``role``; asking twice is the same as once.

        ``name:input`` takes what the module reads instead.
        """
        if role not in self._models:
            raise ConfigError(f"features of '{role}': no such model{nearest(role, self._models)}")
        taken = self._taken.setdefault(role, {})
        if name in taken:
            return
        modules = dict(self._models[role].named_modules())
        path, _, side = name.partition(":")
        if path not in modules or path == "" or side not in ("", "input"):
            offered = nearest(path, [module for module in modules if module])
            raise ConfigError(
                f"{role}.{name}: no such module in {type(self._models[role]).__name__}{offered}"
            )
        taken[name] = torch.empty(0)

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            found = given if side else output
            taken[name] = found[0] if isinstance(found, tuple) else found

        self._handles.append(modules[path].register_forward_hook(keep))

    def asked(self, role: str) -> bool:
        """Whether any feature of ``role`` was asked for."""
        return bool(self._taken.get(role))

    def take(self, role: str) -> dict[str, Tensor]:
        """The last forward pass's features of ``role``; they are dropped here, so that no graph is kept."""
        taken = self._taken.get(role)
        if not taken:
            return {}
        found = dict(taken)
        for name in taken:
            taken[name] = torch.empty(0)
        return found

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._taken.clear()


def freeze(model: nn.Module) -> nn.Module:
    """No gradient, eval mode."""
    return model.requires_grad_(False).eval()


def versions(model: nn.Module) -> int:
    """A count that grows whenever a parameter or buffer is written to."""
    return sum(tensor._version for tensor in (*model.parameters(), *model.buffers()))  # noqa: SLF001


def checksum(model: nn.Module) -> int:
    """A sum over the bits of every parameter and buffer: it sees writes that ``versions`` does not (``.data``)."""
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        bits = tensor.detach().contiguous().reshape(-1)
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(bits.element_size(), torch.int64)
        total += int(bits.view(whole).sum(dtype=torch.int64)) if bits.device.type != "meta" else 0
    return total


def digest(model: nn.Module) -> str:
    """A digest of the model's parameters and buffers, bit for bit."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


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


def stochastic_module(model: nn.Module, inputs: Any) -> str | None:
    """Call the model twice on the same inputs; None if the outputs are the same bit for bit.

    Otherwise the name and class of the first module whose output differed while its inputs did not.
    """
    seen: list[list[tuple[str, Any, Any]]] = []

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            seen[-1].append((name, given, output))

        return module.register_forward_hook(keep)

    outputs = []
    with torch.random.fork_rng(), evaluating(model):
        for _ in range(2):
            outputs.append(forward(model, inputs))
        if _same(outputs[0], outputs[1]):
            return None
        handles = [watch(name, module) for name, module in model.named_modules()]
        try:
            for _ in range(2):
                seen.append([])
                forward(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    # Hooks fire when a module is left, so inner modules come first.
    for (name, given, output), (_, given_again, output_again) in zip(*seen, strict=False):
        if _same(given, given_again) and not _same(output, output_again):
            kind = type(dict(model.named_modules())[name]).__name__
            return f"{name} ({kind})" if name else f"{kind} itself"
    return type(model).__name__


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return True
