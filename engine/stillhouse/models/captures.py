"""Outputs of named modules, taken while a model is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillhouse.errors import ConfigError, nearest


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
