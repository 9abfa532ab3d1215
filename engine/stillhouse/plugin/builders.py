"""Models built by name: a builder's arguments, read from its signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from stillhouse.config import explain
from stillhouse.contract.task import Builder
from stillhouse.errors import ConfigError


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
    kind = arguments_model(builder)
    try:
        return kind.model_validate(dict(given)).model_dump()
    except ValidationError as error:
        raise ConfigError(explain(error, kind, path)) from None
