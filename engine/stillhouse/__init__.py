"""Stillhouse: a plugin-based engine for knowledge distillation.

In a script or a notebook::

    import stillhouse
    result = stillhouse.distill(student, teacher, data, method="sld")
    print(result.scores)

Importing this module imports neither torch nor any plugin; the names below come with their first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillhouse.contract.batch import Batch
    from stillhouse.errors import StillhouseError
    from stillhouse.runs.from_objects import Distilled, distill
    from stillhouse.training.distillation import Distillation
    from stillhouse.training.step import DistillStep

_HOMES = {
    "Batch": "contract.batch",
    "DistillStep": "training.step",
    "Distillation": "training.distillation",
    "Distilled": "runs.from_objects",
    "StillhouseError": "errors",
    "distill": "runs.from_objects",
}

__all__ = ["Batch", "DistillStep", "Distillation", "Distilled", "StillhouseError", "distill"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("stillhouse")
    if name not in _HOMES:
        raise AttributeError(f"module 'stillhouse' has no attribute '{name}'")
    return getattr(import_module(f"stillhouse.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
