"""What a plugin is, as plain values: hooks, order, settings with defaults and docs, capabilities, origin."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from stillhouse.api import Method, Observer, Task
from stillhouse.contract.hooks import FIRST_RESULT, LifeHooks, StepHooks
from stillhouse.plugin.builders import arguments_model
from stillhouse.plugin.catalog import Entry, load
from stillhouse.plugin.load import loaded
from stillhouse.plugin.validate import hook_arguments

ORDER = {True: "first result: one plugin of a run may have it", False: "config order"}


def describe(entry: Entry) -> dict[str, Any]:
    """The plugin's facts, JSON-ready. Imports it; raises PluginError where it can't be loaded or trusted."""
    facts: dict[str, Any] = entry.as_dict()
    if entry.kind == "model":
        builder = load(entry)
        return {**facts, "summary": summary(builder), **_settings(arguments_model(builder))}
    kind = loaded(entry)
    facts |= {"api_version": kind.api_version, "summary": summary(kind)}
    if issubclass(kind, Method):
        facts |= {
            "hooks": hooks(kind),
            "requires": sorted(kind.requires),
            "supports": sorted(kind.supports),
            "expected_failures": dict(kind.conformance.expected_failures),
        }
    elif issubclass(kind, Task):
        facts |= {
            "hooks": _overridden(kind, Task, "one task of a run"),
            "metric": kind.metric,
            "teachers": list(kind.teachers),
            "students": list(kind.students),
        }
    elif issubclass(kind, Observer):
        facts["hooks"] = _overridden(kind, Observer, ORDER[False])
    return {**facts, **_settings(kind.Config)}


def summary(thing: Any) -> str:
    """The first paragraph of a docstring of its own, on one line."""
    own = vars(thing).get("__doc__") if isinstance(thing, type) else getattr(thing, "__doc__", None)
    text = inspect.cleandoc(own or "")
    return " ".join(text.split("\n\n")[0].split())


def hooks(kind: type[Method]) -> list[dict[str, Any]]:
    """The hooks that a method implements, in the order of a step, with the arguments that it takes."""
    found = []
    offers = hook_arguments()
    for name in (hook for specs in (StepHooks, LifeHooks) for hook in vars(specs) if hook in offers):
        function = getattr(kind, name, None)
        if function is not None:
            taken = [
                argument for argument in inspect.signature(function).parameters if argument in offers[name]
            ]
            found.append({"name": name, "arguments": taken, "order": ORDER[name in FIRST_RESULT]})
    return found


def _overridden(kind: type, base: type, order: str) -> list[dict[str, Any]]:
    """The methods of the base that a task or an observer has made its own, in the base's order."""
    return [
        {
            "name": name,
            "arguments": list(inspect.signature(getattr(kind, name)).parameters)[1:],
            "order": order,
        }
        for name, function in vars(base).items()
        if inspect.isfunction(function) and not name.startswith("_") and getattr(kind, name) is not function
    ]


def _settings(config: type[BaseModel]) -> dict[str, Any]:
    schema = config.model_json_schema()
    fields = []
    for name, field in config.model_fields.items():
        default = (
            field.get_default(call_default_factory=True) if field.default_factory is None else "made anew"
        )
        fields.append(
            {
                "name": name,
                "type": _spelled(field.annotation),
                "default": None if default is PydanticUndefined else _plain(default),
                "required": field.is_required(),
                "description": field.description or "",
            }
        )
    return {"config": fields, "schema": schema}


def _spelled(annotation: Any) -> str:
    name = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else None
    )
    return name or str(annotation).replace("typing.", "")


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple | frozenset):
        return list(value)
    return value if value is None or isinstance(value, str | int | float | bool | list | dict) else str(value)


def text(facts: dict[str, Any]) -> str:
    """The facts for a terminal."""
    lines = [
        f"{facts['kind']} {facts['name']}: {facts['summary'] or 'no description'}",
        f"from          {facts['distribution']} {facts['version']}, {facts['value']}",
    ]
    if "api_version" in facts:
        lines.append(f"api version   {facts['api_version']}")
    for key in ("requires", "teachers", "students"):
        if key in facts:
            lines.append(f"{key:12}  {', '.join(facts[key]) or 'nothing'}")
    if "metric" in facts:
        lines.append(f"metric        {facts['metric']}")
    for number, hook in enumerate(facts.get("hooks", [])):
        call = f"{hook['name']}({', '.join(hook['arguments'])})"
        lines.append(f"{'' if number else 'hooks':12}  {call}: {hook['order']}")
    for number, field in enumerate(facts["config"]):
        given = "required" if field["required"] else f"default {field['default']!r}"
        line = f"{field['name']}: {field['type']}, {given}. {field['description']}".rstrip()
        lines.append(f"{'' if number else 'config':12}  {line}")
    for check, reason in facts.get("expected_failures", {}).items():
        lines.append(f"{'fails':12}  {check}: {reason}")
    return "\n".join(lines)
