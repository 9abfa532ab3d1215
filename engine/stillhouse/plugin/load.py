"""From names and settings to loaded, configured plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

from pydantic import BaseModel, ValidationError

from stillhouse.api import Method, Observer, Task, TaskConfig
from stillhouse.config import MethodSpec, Named, explain
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
    if entry.kind == "task" and hasattr(kind, "score"):
        raise PluginError(
            f"{entry}: the task has a method 'score', which nothing calls; expected 'metrics': a function of a whole "
            "split's outputs is a metric by metrics() -> {'': WholeSplit(function)}"
        )
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


def _named(path: str, given: Any) -> tuple[str, MethodSpec]:
    try:
        return path, MethodSpec.model_validate(given)
    except ValidationError as error:
        raise ConfigError(explain(error, MethodSpec, path)) from None


def load_methods(specs: Sequence[tuple[str, MethodSpec]]) -> list[Plugin]:
    """The methods of a config, in its order, each under its own name or the one that ``as`` gives it."""
    plugins = []
    for path, spec in specs:
        entry, method = configured("method", spec, path)
        plugins.append(Plugin(spec.alias or entry.name, f"{entry.distribution} {entry.version}", method))
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
            plugins.append(Plugin(_name(item), _distribution(item), item))
            continue
        path = "method" if len(given) == 1 else f"methods.{number}"
        plugins += load_methods([_named(path, item)])
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
