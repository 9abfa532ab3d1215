"""What is checked when a plugin is loaded: whatever pluggy would pass over in silence."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from stillhouse.api import API_VERSION, CAPABILITIES, SUPPORTS, Method, MethodConfig
from stillhouse.contract.hooks import PROJECT, SINCE, LifeHooks, StepHooks
from stillhouse.errors import PluginError, nearest

_MUTABLE = (list, dict, set, bytearray)


MARK = f"{PROJECT}_impl"


@functools.cache
def hook_arguments() -> dict[str, tuple[str, ...]]:
    """The arguments of every hook, by its name."""
    found = {}
    for specs in (StepHooks, LifeHooks):
        for name, function in inspect.getmembers(specs, inspect.isfunction):
            if not name.startswith("_"):
                found[name] = tuple(inspect.signature(function).parameters)[1:]
    return found


def check(who: object, kind: type[Method]) -> None:
    """Raise PluginError for whatever would make the hooks of a method's class misbehave or be ignored."""
    check_version(who, kind)
    check_config(who, kind.Config, MethodConfig)
    if not isinstance(kind.requires, frozenset | set):
        raise PluginError(
            f"{who}: requires is {kind.requires!r}; expected a set, as in frozenset({{'logits'}})"
        )
    for name in sorted(kind.requires - CAPABILITIES):
        raise PluginError(f"{who}: requires '{name}': no such capability{nearest(name, CAPABILITIES)}")
    if not isinstance(kind.supports, frozenset | set):
        raise PluginError(
            f"{who}: supports is {kind.supports!r}; expected a set, as in CLASS_KINDS | {{'regression'}}"
        )
    for name in sorted(kind.supports - SUPPORTS):
        raise PluginError(f"{who}: supports '{name}': no such kind of task{nearest(name, SUPPORTS)}")
    for name, value in _attributes(kind):
        _check_attribute(who, kind, name, value)


def check_version(who: object, kind: type) -> None:
    """Raise PluginError unless ``kind`` was written for a version of the contract that is still spoken."""
    version = getattr(kind, "api_version", None)
    spoken = range(max(1, API_VERSION - 1), API_VERSION + 1)
    if version not in spoken:
        known = " or ".join(map(str, spoken))
        advice = "upgrade stillhouse" if isinstance(version, int) and version > API_VERSION else "upgrade it"
        raise PluginError(f"{who}: api_version is {version}, expected {known}; {advice}")


def check_config(who: object, config: Any, base: type[BaseModel]) -> None:
    """Raise PluginError for a Config that is none, or that has a default which two runs would share."""
    if not (isinstance(config, type) and issubclass(config, base)):
        raise PluginError(f"{who}: Config is {config!r}; expected a subclass of {base.__name__}")
    for name, field in config.model_fields.items():
        if isinstance(field.default, _MUTABLE):
            raise PluginError(
                f"{who}: config field '{name}' has the mutable default {field.default!r}; expected one that nobody "
                f"can change: a tuple, or Field(default_factory={type(field.default).__name__})"
            )
        if field.default_factory is None or field.default_factory_takes_validated_data:
            continue
        first, second = (field.get_default(call_default_factory=True) for _ in range(2))
        if first is second and isinstance(first, _MUTABLE):
            raise PluginError(
                f"{who}: config field '{name}' has a default_factory that hands out one {type(first).__name__} "
                "again and again; expected a new one at each call"
            )


def _attributes(kind: type) -> Iterator[tuple[str, Any]]:
    for name in dir(kind):
        if not name.startswith("__"):
            yield name, inspect.getattr_static(kind, name)


def _check_attribute(who: object, kind: type[Method], name: str, value: Any) -> None:
    hooks = hook_arguments()
    options = _marked(value)
    if options is None:
        young = SINCE.get(name, 1) > kind.api_version
        if name in hooks and value is not None and not young:
            raise PluginError(f"{who}: '{name}' is a hook's name without its mark; put @hookimpl on it")
        return
    if not inspect.isfunction(value):
        raise PluginError(
            f"{who}: hook '{name}' is a {type(value).__name__}, which would be ignored; "
            "expected a plain method with @hookimpl as its outermost decorator"
        )
    if name not in hooks:
        raise PluginError(f"{who}: '{name}' is no hook{nearest(name, hooks)}")
    for option in ("wrapper", "hookwrapper", "tryfirst", "trylast"):
        if options.get(option):
            raise PluginError(f"{who}: hook '{name}': {option} is not used; order is the config's order")
    _check_arguments(who, name, value, hooks[name])


def _check_arguments(who: object, name: str, function: Any, expected: tuple[str, ...]) -> None:
    takes = ", ".join(expected) or "nothing"
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            kind = parameter.kind.description
            raise PluginError(
                f"{who}: hook '{name}': argument '{parameter.name}' is {kind}, which would never be "
                f"filled; name a subset of: {takes}"
            )
        if parameter.default is not parameter.empty:
            raise PluginError(
                f"{who}: hook '{name}': argument '{parameter.name}' has a default, which would stand "
                f"in for what the engine hands over; name a subset of: {takes}"
            )
        if parameter.name not in expected:
            raise PluginError(
                f"{who}: hook '{name}' has no argument '{parameter.name}'"
                f"{nearest(parameter.name, expected)}; it takes a subset of: {takes}"
            )


def _marked(value: Any) -> dict[str, Any] | None:
    """The options that @hookimpl left, also under a wrapper that hides it from pluggy."""
    for _ in range(8):
        options = getattr(value, MARK, None)
        if isinstance(options, dict):
            return options
        inner = getattr(value, "__wrapped__", None) or getattr(value, "func", None)
        inner = inner or getattr(value, "__func__", None)
        if inner is None:
            return None
        value = inner
    return None
