"""Outputs of named modules, taken while a model is called."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillhouse.errors import ConfigError, nearest
from stillhouse.models.calling import Output, unwrapped

_OF_OUTPUT = re.compile(r"((?:encoder_)?(?:hidden_states|attentions))\.(-?\d+)$")


class Captures:
    """Features by model and module name, taken by forward hooks on these instances only.

    A class-wide or global hook would let two runs in one process overwrite each other. Hooks keep something only
    inside of ``collecting``: a layer that is run again in the backward pass (activation checkpointing) adds nothing.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self._models = dict(models)
        self._taken: dict[str, dict[str, Tensor]] = {}
        self._names: dict[str, list[str]] = {}
        self._handles: list[RemovableHandle] = []
        self._collecting: set[str] = set()
        self._of_output: set[tuple[str, str]] = set()

    def offer(self, role: str, model: nn.Module) -> None:
        """Make another model's modules available."""
        self._models[role] = model

    def add(self, role: str, name: str) -> None:
        """Take the output of ``name`` at each forward pass of ``role``; asking twice is the same as once.

        ``name:input`` takes what the module reads instead; ``hidden_states.N`` and ``attentions.N`` are taken from the
        output object of a transformers model: of an encoder and a decoder the decoder's, with ``encoder_`` before it the
        encoder's.
        """
        if role not in self._models:
            raise ConfigError(f"features of '{role}': no such model{nearest(role, self._models)}")
        names = self._names.setdefault(role, [])
        if name in names:
            return
        model = unwrapped(self._models[role])
        modules = dict(model.named_modules())
        path, _, side = name.partition(":")
        of_output = _OF_OUTPUT.match(name) and path not in modules
        if not of_output and (path not in modules or path == "" or side not in ("", "input")):
            offered = nearest(path, [module for module in modules if module])
            raise ConfigError(f"{role}.{name}: no such module in {type(model).__name__}{offered}")
        if isinstance(modules.get(path), torch.jit.ScriptModule):
            raise ConfigError(
                f"{role}.{name}: a scripted module shows no features; expected the model as it was before"
            )
        names.append(name)
        if of_output:
            self._of_output.add((role, name))
        else:
            hook = _Keep(self, role, name, bool(side))
            self._handles.append(modules[path].register_forward_hook(hook))
            _forget_compiled()

    def asked(self, role: str) -> bool:
        """Whether any feature of ``role`` was asked for."""
        return bool(self._names.get(role))

    def asks(self, role: str) -> frozenset[str]:
        """What has to be asked of the model's output object: ``hidden_states``, ``attentions``."""
        return frozenset(name.partition(".")[0] for asking, name in self._of_output if asking == role)

    def collecting(self, role: str) -> AbstractContextManager[None]:
        """Hooks of ``role`` keep what passes them."""
        return self._collect(role) if self._names.get(role) else nullcontext()

    @contextmanager
    def _collect(self, role: str) -> Iterator[None]:
        self._collecting.add(role)
        try:
            yield
        finally:
            self._collecting.discard(role)

    def keep(self, role: str, name: str, value: Any) -> None:
        """Called by the hooks."""
        if role in self._collecting:
            self._taken.setdefault(role, {})[name] = _tensor(value)

    def take(self, role: str, out: Output | None = None) -> dict[str, Tensor]:
        """The last forward pass's features of ``role``; they are dropped here, so that no graph is kept."""
        taken = self._taken.pop(role, {})
        for asking, name in self._of_output:
            if asking != role or out is None:
                continue
            what, _, number = name.partition(".")
            values = out.kept[what]
            if not -len(values) <= int(number) < len(values):
                raise ConfigError(
                    f"{role}.{name}: the model gave {len(values)} {what}; expected a number below that"
                )
            taken[name] = values[int(number)]
        return taken

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._taken.clear()
        self._names.clear()
        self._of_output.clear()


class _Keep:
    """A forward hook that a copy or a pickle of its model takes along as a hook that does nothing."""

    def __init__(self, captures: Captures | None, role: str, name: str, of_input: bool) -> None:
        self._captures, self._of_input = captures, of_input
        self.role, self.name = role, name

    def __call__(self, module: nn.Module, given: Any, output: Any) -> None:
        if self._captures is not None:
            self._captures.keep(self.role, self.name, given if self._of_input else output)

    def __deepcopy__(self, memo: Any) -> _Keep:
        return _Keep(None, self.role, self.name, self._of_input)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Keep, (None, self.role, self.name, self._of_input)


def _forget_compiled() -> None:
    """Drop torch.compile's code for models of this class: it is shared by them, made without the hook, and not checked."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _tensor(value: Any) -> Any:
    """The first tensor of what a module gave or was given."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list) and value:
        return _tensor(value[0])
    return value
