"""The config's JSON schema, with every installed plugin's settings, so that an editor completes a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from stillhouse.api import Method, Observer, Task
from stillhouse.config import RunConfig
from stillhouse.contract.task import Builder
from stillhouse.errors import PluginError
from stillhouse.plugin import catalog
from stillhouse.plugin.builders import arguments_model


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a run's config. A plugin that can't be loaded is named, not described."""
    made = RunConfig.model_json_schema()
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    made["title"] = "Stillhouse run"
    defs = made["$defs"]
    methods, tasks, observers = ({} for _ in range(3))
    students: list[tuple[str, Any]] = []  # several tasks may have a builder of one name
    teachers: list[tuple[str, Any]] = []
    for entry in catalog.entries():
        try:
            found = catalog.load(entry)
        except PluginError:
            found = None
        if entry.kind == "method":
            methods[entry.name] = _settings(found, Method)
        elif entry.kind == "observer":
            observers[entry.name] = _settings(found, Observer)
        elif entry.kind == "model":
            students.append((entry.name, _builder(found)))
            teachers.append((entry.name, _builder(found)))
        else:
            tasks[entry.name] = _settings(found, Task)
            if found is not None:
                students += [(name, _builder(builder)) for name, builder in found.students.items()]
                teachers += [(name, _builder(builder)) for name, builder in found.teachers.items()]
    training = defs["TeacherConfig"]["properties"]
    extra = {name: training[name] for name in ("checkpoint", "train")}
    for name, known, more in (
        ("Method", list(methods.items()), {}),
        ("Task", list(tasks.items()), {}),
        ("Observer", list(observers.items()), {}),
        ("Student", students, {}),
        ("Teacher", teachers, extra),
    ):
        # the task's first builder stands where a model is not named
        defs[name] = _choice(known, more, defs, required=() if name in ("Student", "Teacher") else ("name",))
    properties = made["properties"]
    for key, name in (("task", "Task"), ("method", "Method"), ("student", "Student"), ("target", "Student")):
        properties[key] = _refer(properties[key], name)
    properties["teacher"] = _refer(properties["teacher"], "Teacher")
    properties["methods"]["items"] = {"$ref": "#/$defs/Method"}
    properties["observers"]["items"] = {"$ref": "#/$defs/Observer"}
    for name in ("OptimizerConfig", "Named"):
        defs[name] = {"anyOf": [{"type": "string"}, defs[name]]}
    return made


def _refer(old: Mapping[str, Any], name: str) -> dict[str, Any]:
    kept = {key: value for key, value in old.items() if key in ("description", "default")}
    return {**kept, "$ref": f"#/$defs/{name}"}


def _settings(found: Any, base: type) -> type[BaseModel] | None:
    ours = isinstance(found, type) and issubclass(found, base)
    return found.Config if ours else None  # type: ignore[attr-defined]


def _builder(found: Builder | None) -> type[BaseModel] | None:
    return None if found is None else arguments_model(found)


def _choice(
    known: Sequence[tuple[str, type[BaseModel] | None]],
    more: Mapping[str, Any],
    defs: dict[str, Any],
    required: Sequence[str],
) -> dict[str, Any]:
    """Either a bare name, or a mapping whose other keys depend on its name."""
    options: list[dict[str, Any]] = [{"type": "string", "enum": sorted({name for name, _ in known})}]
    for name, kind in sorted(known, key=lambda item: item[0]):
        described = {} if kind is None else kind.model_json_schema(ref_template="#/$defs/{model}")
        defs.update(described.pop("$defs", {}))
        options.append(
            {
                "type": "object",
                "title": name,
                "description": described.get("description", ""),
                "properties": {"name": {"const": name}, **described.get("properties", {}), **more},
                "required": [*required, *described.get("required", [])],
                "additionalProperties": kind is None,
            }
        )
    return {"anyOf": options}
