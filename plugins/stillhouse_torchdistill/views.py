"""What models read and gave, in the form in which losses of torchdistill look it up: ``io[path]["output"]``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ROOT, IDS = ".", "sample_ids"
"""Paths that are no module's: the whole model, and the rows' numbers as CRD asks for them."""


class Wanted(Exception):
    """A loss looked up something that is not there (yet)."""

    def __init__(self, role: str, path: str, side: str) -> None:
        super().__init__(f"{role}, module '{path}', {side}")
        self.role, self.path, self.side = role, path, side


@dataclass(frozen=True)
class View:
    """One model's ``io`` dictionary; ``look`` gets the role, the path and ``input`` or ``output``."""

    role: str
    look: Callable[[str, str, str], Any]

    def __getitem__(self, path: str) -> Side:
        return Side(self, path)


@dataclass(frozen=True)
class Side:
    """One module's entry."""

    view: View
    path: str

    def __getitem__(self, side: str) -> Any:
        return self.view.look(self.view.role, self.path, side)


def feature_name(path: str, side: str) -> str:
    """The name under which the engine captures it."""
    return f"{path}:input" if side == "input" else path
