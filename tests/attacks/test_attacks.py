"""Every attack a few times; ``make attack`` makes them at full length and prints the table of docs/reliability.md."""

from __future__ import annotations

import importlib
import random

import pytest

from attacks.lab import Lab
from attacks.table import ATTACKS

FEW = {
    "kills": 6, "kills_in_overwrite": 3, "interrupted": 3, "newest_checkpoint": 2, "loads": 60, "soft_labels": 2, "teacher_cache": 1,
    "data_cache": 40, "student": 2, "summary": 2, "manifest": 4, "config": 3, "metrics": 2, "deleted": 2, "verify": 3, "processes": 2,
    "twice": 3, "foreign_folders": 5, "hostile_repositories": 1, "full_disk": 2, "unread_output": 1, "configs": 150, "accepted": 6,
    "kernel_calls": 80,
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory, forks):
    return Lab(tmp_path_factory.mktemp("attacks"), forks)


@pytest.mark.parametrize(
    ("module", "function"), [(module, function) for module, function, _ in ATTACKS.values()]
)
def test_is_survived(module, function, lab):
    figures = getattr(importlib.import_module(f"attacks.{module}"), function)(
        lab, FEW[function], random.Random(function)
    )
    assert figures.tried >= FEW[function]
    assert not figures.problems
    assert figures.survived == figures.tried
