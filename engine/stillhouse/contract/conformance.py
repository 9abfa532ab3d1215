"""What a plugin tells the conformance checks of ``stillhouse.testing`` about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Conformance:
    """Read by ``stillhouse plugins check`` and ``parametrize_with_checks``, never by a run.

    task
        The kind of task that the checks run on: ``classification`` (a vector a sample), or ``token_classification``
        (tokens with padding) for a method that has no meaning without positions.
    settings
        The config that is checked; default: the defaults.
    minimum
        By the name of a loss term, its value where the student equals the teacher, which is the least it takes.
    expected_failures
        By the name of a check, the reason why this plugin fails it. Strict: a check that is named here and
        passes is an error.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    minimum: Mapping[str, float] = field(default_factory=dict)
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    task: Literal["classification", "token_classification"] = "classification"
