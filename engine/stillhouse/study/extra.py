"""The libraries of the extra ``study``: imported where they are used, and asked for before anything is trained."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from stillhouse.errors import MissingExtra

LIBRARIES = {
    "scipy": "scipy",
    "statsmodels": "statsmodels",
    "scikit_posthocs": "scikit-posthocs",
    "optuna": "optuna",
    "matplotlib": "matplotlib",
}
"""Modules, each with the distribution that brings it."""


def library(module: str) -> ModuleType:
    """The imported module of one of the LIBRARIES; MissingExtra where it is not installed."""
    root = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != root:
            raise
        raise MissingExtra("a study", LIBRARIES[root], "study") from None


def ray() -> ModuleType:
    """Ray; MissingExtra where it is not installed."""
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError:
        raise MissingExtra("--ray", "ray", "ray") from None


def check_installed(*, tuned: bool) -> None:
    """Raise MissingExtra for what a study's tables and tuning need, before it begins."""
    for root, distribution in LIBRARIES.items():
        if importlib.util.find_spec(root) is None and (tuned or root != "optuna"):
            raise MissingExtra("a study", distribution, "study")
