"""Optimizers and schedulers of torch, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler

from stillhouse.config import Named, OptimizerConfig
from stillhouse.errors import ConfigError, nearest

LENGTHS = ("T_max", "total_iters", "total_steps")
"""Scheduler arguments that mean the schedule's length; filled in with the updates it spans."""


def check(optimizer: OptimizerConfig, scheduler: Named | None) -> None:
    """Raise ConfigError for a name or an argument that torch does not have."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    made = make_optimizer([{"params": [parameter]}], optimizer)
    schedule = make_scheduler(made, scheduler, 10)
    for path, kind in (("optimizer", made), ("scheduler", schedule)):
        try:
            if kind is not None:
                kind.step()
        except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            if not isinstance(error, TypeError):
                raise ConfigError(f"{path}: {type(kind).__name__}: a step fails: {error}") from None
            # LBFGS wants a closure, ReduceLROnPlateau a metric
            raise ConfigError(
                f"{path}: {type(kind).__name__} can't be used here, a step takes no arguments: {error}"
            ) from None


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    """An optimizer over parameter groups."""
    kind = _named(torch.optim, config.name, Optimizer, "optimizer.name")
    given: dict[str, Any] = {"lr": config.lr, **config.settings}
    takes = inspect.signature(kind).parameters
    if "weight_decay" in takes:
        given["weight_decay"] = config.weight_decay
    # One pass over the parameters where torch has it: half the update's time for a small student.
    if "fused" in takes and "foreach" not in given and all(_fusable(group["params"]) for group in groups):
        given.setdefault("fused", True)
    made: Optimizer = _call(kind, "optimizer", takes, given, groups)
    return made


def make_scheduler(optimizer: Optimizer, config: Named | None, steps: int) -> LRScheduler | None:
    """A scheduler that spans ``steps`` updates, or None."""
    if config is None:
        return None
    kind = _named(schedulers, config.name, LRScheduler, "scheduler.name")
    takes = inspect.signature(kind).parameters
    given = dict(config.settings)
    for name in LENGTHS:
        if name in takes:
            given.setdefault(name, steps)
    made: LRScheduler = _call(kind, "scheduler", takes, given, optimizer)
    return made


def _fusable(parameters: list[Tensor]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def _named(module: Any, name: str, base: type, path: str) -> Any:
    known = {
        key
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base and key[0] != "_"
    }
    if name not in known:
        raise ConfigError(f"{path}: no '{name}' in {module.__name__}{nearest(name, known)}")
    return getattr(module, name)


def _call(kind: Any, path: str, takes: Mapping[str, Any], given: dict[str, Any], first: Any) -> Any:
    for name in given:
        if name not in takes:
            raise ConfigError(f"{path}.{name}: {kind.__name__} has no such argument{nearest(name, takes)}")
    try:
        return kind(first, **given)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError, LookupError) as error:
        raise ConfigError(f"{path}: {kind.__name__}: {error}") from None
