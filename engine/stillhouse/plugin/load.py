"""From names and settings to loaded, configured plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

from pydantic import BaseModel, ValidationError

from stillhouse.api import Method, Observer, Task, TaskConfig
from stillhouse.config import Named, explain
from stillhouse.contract.observers import ObserverConfig
from stillhouse.errors import ConfigError, PluginError
from stillhouse.plugin import catalog
from stillhouse.plugin.dispatch import Plugin, blame
from stillhouse.plugin.validate import check, check_config, check_version

MethodLike = str | Method | Mapping[str, Any] | Named
_BASES: dict[str, type] = {"method": Method, "task": Task, "observer": Observer}
_CONFIGS: dict[str, type[BaseModel]] = {"task": TaskConfig, "observer": ObserverConfig}


def loaded(entry: catalog.Entry) -> Any:
    """The class that the entry names.

    Raises PluginError where it can't be loaded, is not of the kind, speaks another version of the contract, has a
    Config that can't be trusted, or hooks that would misbehave.
    """
    made = catalog.load(entry)
    base = _BASES[entry.kind]
    if not (isinstance(made, type) and issubclass(made, base)):
        raise PluginError(f"{entry}: {entry.value} is {made!r}; expected a subclass of {base.__name__}")
    kind: Any = made
    if entry.kind == "method":
        check(entry, kind)
    else:
        check_version(entry, kind)
        check_config(entry, kind.Config, _CONFIGS[entry.kind])
    return kind


def configured(kind: catalog.Kind, spec: Named, path: str) -> tuple[catalog.Entry, Any]:
    """Load the named plugin and build it with its validated settings.

    Raises PluginError where it can't be found, loaded or trusted; ConfigError with the config path for its
    settings.
    """
    entry = catalog.find(kind, spec.name)
    made = loaded(entry)
    settings = settings_of(made.Config, spec.settings, path)
    try:
        return entry, made(settings)
    except Exception as error:
        blame(error, f"in the constructor of {entry}")
        raise


def settings_of(kind: type[BaseModel], given: Mapping[str, Any], path: str) -> BaseModel:
    """A plugin's settings from plain values; ConfigError with the config path otherwise."""
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        raise ConfigError(explain(error, kind, path)) from None


def lifted(specs: Sequence[tuple[str, Named]]) -> list[tuple[str, Named]]:
    """The methods of a config, those that stand under one that composes set beside it, before it.

    ``{name: hldm, methods: [kd, fitnets]}`` and ``[kd, fitnets, hldm]`` are one run: both come to the latter.
    """
    flat = []
    for path, spec in specs:
        under = spec.settings.get("methods")
        if not under or not loaded(catalog.find("method", spec.name)).composes:
            flat.append((path, spec))
            continue
        items = [under] if isinstance(under, str | Mapping) else under
        if not isinstance(items, list | tuple):
            raise ConfigError(
                f"{path}.methods: got {under!r}; expected a list of methods, as in [kd, fitnets]"
            )
        for number, item in enumerate(items):
            flat += lifted([_named(f"{path}.methods.{number}", item)])
        rest = {name: value for name, value in spec.settings.items() if name != "methods"}
        flat.append((path, Named.model_validate({"name": spec.name, **rest})))
    return flat


def _named(path: str, given: Any) -> tuple[str, Named]:
    try:
        return path, Named.model_validate(given)
    except ValidationError as error:
        raise ConfigError(explain(error, Named, path)) from None


def load_methods(specs: Sequence[tuple[str, Named]]) -> list[Plugin]:
    """The methods of a config, in its order; what stands under a method is lifted before."""
    plugins = []
    for path, spec in specs:
        entry, method = configured("method", spec, path)
        plugins.append(Plugin(entry.name, f"{entry.distribution} {entry.version}", method))
    return plugins


def as_plugins(method: MethodLike | Sequence[MethodLike]) -> list[Plugin]:
    """Methods given in Python: names, ``{"name": ..., setting: ...}``, or Method objects."""
    given = [method] if isinstance(method, str | Method | Mapping | Named) else method
    if not isinstance(given, Sequence) or not given:
        raise ConfigError(
            f"method: got {method!r}; expected a name, {{'name': ...}}, a Method, or a list of these"
        )
    plugins = []
    for number, item in enumerate(given):
        if isinstance(item, Method):
            if item.composes and item.config.methods:
                plugins += as_plugins(item.config.methods)
            plugins.append(Plugin(_name(item), _distribution(item), item))
            continue
        path = "method" if len(given) == 1 else f"methods.{number}"
        plugins += load_methods(lifted([_named(path, item)]))
    return plugins


def _name(method: Method) -> str:
    return type(method).__name__.lower()


def _distribution(method: Method) -> str:
    """Which distribution an object's class came from, as far as can be known."""
    module = type(method).__module__
    names = packages_distributions().get(module.partition(".")[0])
    if not names:
        return f"module {module}"
    try:
        return f"{names[0]} {version(names[0])}"
    except PackageNotFoundError:
        return names[0]
