"""From a config to loaded plugins, with every setting checked and every default filled in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from stillhouse.api import Observer, Task
from stillhouse.config import Named, RunConfig, StudentConfig, TeacherConfig, dump, validate
from stillhouse.contract.context import STUDENT, TARGET
from stillhouse.contract.task import Builder
from stillhouse.errors import ConfigError, nearest
from stillhouse.files.lock import Lock
from stillhouse.plugin.builders import arguments
from stillhouse.plugin.catalog import entries, find
from stillhouse.plugin.catalog import load as load_plugin
from stillhouse.plugin.dispatch import Plugin, Plugins
from stillhouse.plugin.load import configured, load_methods
from stillhouse.runs import teachers
from stillhouse.softlabels import StoredLabels
from stillhouse.training import optim

NamedT = TypeVar("NamedT", bound=Named)


@dataclass
class Parts:
    """A config's plugins, loaded and checked, with the config as resolved by them."""

    config: RunConfig
    task: Task
    methods: list[Plugin]
    observers: list[Observer]
    builders: dict[str, Callable[[], nn.Module]]
    teacher: nn.Module | Mapping[str, nn.Module] | None = None
    """A teacher handed over as an object, or several by name, in place of builders."""
    folder: Path | None = None
    """The run directory; None keeps nothing."""
    lock: Lock | None = None
    """What holds the run directory while the run goes on."""
    soft_labels: StoredLabels | None = None
    """Kept labels that the config names, once they were opened and compared with the rest of it."""
    rebuilt: bool = True
    """Whether ``builders`` make new models at each call: not where models were handed over."""
    picture: bool = True
    """Whether the finished run draws its learning curve."""


def resolve(config: RunConfig) -> Parts:
    """Load what the config names, check every setting, and fill in every default.

    Raises PluginError or ConfigError; nothing is trained or written before this has passed.
    """
    _, task = configured("task", config.task, "task")
    named = config.named_methods
    methods = load_methods(named)
    observers = [
        configured("observer", spec, f"observers.{number}")[1] for number, spec in enumerate(config.observers)
    ]
    optim.check(config.optimizer, config.scheduler)
    needs = Plugins(methods).requires
    chosen: dict[str, Any] = {"task": _full(config.task, dump(task.config))}
    builders = {}
    asks = bool(needs & {"logits", "hidden_states"})
    chosen |= {"teacher": None, "teachers": {}, "soft_labels": config.soft_labels if asks else None}
    if asks and (config.soft_labels is None or config.teacher is not None):
        for path, given_teacher in (config.named_teachers or {"teacher": TeacherConfig()}).items():  # type: ignore[call-arg]
            spec = _named(given_teacher, task.teachers, task, "teachers")
            builders[path], full = _teacher(path, spec, task)
            _, _, name = path.partition(".")
            if name:
                chosen["teachers"][name] = full
            else:
                chosen["teacher"] = full
    student = config.student or StudentConfig()  # type: ignore[call-arg]
    for role, given_spec in ((STUDENT, student), (TARGET, config.target)):
        if given_spec is not None:
            named_spec = _named(given_spec, task.students, task, "students")
            builders[role], given = builder_of(named_spec, task.students, role)
            chosen[role] = _full(named_spec, given)
    specs = [
        {**_full(spec, dump(plugin.method.config)), **({"as": spec.alias} if spec.alias else {})}
        for (_, spec), plugin in zip(named, methods, strict=True)
    ]
    alone = config.method is not None and len(specs) == 1
    chosen |= {"method": specs[0]} if alone else {"method": None, "methods": specs}
    resolved = validate({**config.model_dump(exclude=set(chosen)), **chosen})
    return Parts(resolved, task, methods, observers, builders, folder=resolved.run_dir)


def comes_trained(parts: Parts, spec: TeacherConfig) -> bool:
    """Whether the teacher's builder gives it with its weights, so that none are trained."""
    return getattr(parts.task.teachers.get(spec.name), "trained", False) is True


def _teacher(path: str, spec: TeacherConfig, task: Task) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    """What builds the teacher at a path of the config, and its config with every default filled in."""
    build, given = builder_of(spec, task.teachers, path)
    settings = teachers.training(spec.train, task, f"{path}.train")
    optim.check(settings.optimizer, settings.scheduler)
    full = {**_full(spec, given), "checkpoint": spec.checkpoint, "train": dump(settings)}
    if spec.checkpoint is not None:
        full.pop("train")
    return build, full


def by_name(models: Mapping[str, nn.Module]) -> nn.Module | dict[str, nn.Module] | None:
    """Teachers by their path in the config as a step takes them: one, several by name, or None."""
    if len(models) < 2:
        return next(iter(models.values()), None)
    return {path.partition(".")[2]: model for path, model in models.items()}


def _full(spec: Named, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": spec.name, **settings}


def _named(spec: NamedT, builders: Mapping[str, Builder], task: Task, what: str) -> NamedT:
    """The spec, by the name of the task's first builder where it gives none."""
    if spec.name:
        return spec
    if not builders:
        raise ConfigError(f"task {type(task).__name__} has no {what} of its own; name one")
    return spec.model_copy(update={"name": next(iter(builders))})


def builder_of(
    spec: Named, known: Mapping[str, Builder], path: str
) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    """The builder that a config names, of the task or by entry point, with its arguments."""
    builder = known.get(spec.name)
    if builder is None:
        others = {entry.name for entry in entries("model")}
        if spec.name not in others:
            raise ConfigError(
                f"{path}.name: no model is called '{spec.name}'{nearest(spec.name, {*known, *others})}"
            )
        builder = load_plugin(find("model", spec.name))
    given = arguments(builder, spec.settings, path)
    made = builder
    return lambda: made(**given), given


def pick_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ConfigError(f"device: got '{name}'; expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: cuda is not available here; expected auto or cpu ('stillhouse doctor' says why)"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: got '{name}', and this machine has {torch.cuda.device_count()}")
    return device
