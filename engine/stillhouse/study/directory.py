"""The study's directory: its plan, a directory for each cell, and who holds it.

``study.yaml`` the study, every default filled in; ``plan.json`` what it came to; ``cells/DIGEST/`` a cell: ``result.json``, its log,
and the run's directory of a reported one; ``report.*`` and the tables.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stillhouse.errors import CheckpointError, DamagedFile
from stillhouse.files import read_json, read_text, write_json, write_text
from stillhouse.files.lock import InUse, Lock, described, holder
from stillhouse.study.plan import Plan, digest

STUDY, PLAN, CELLS, RESULT, LOG = "study.yaml", "plan.json", "cells", "result.json", "log.txt"
REPORTS = ("report.html", "report.md", "report.tex", "scores.csv", "statistics.csv", "costs.csv")
OURS = (STUDY, PLAN, CELLS, *REPORTS)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the directory against other studies; CheckpointError that says who holds it where it is taken."""
    try:
        lock = Lock(folder)
    except InUse:
        raise CheckpointError(
            f"{folder} is in use by {described(holder(folder))} wait for it, or choose another with --out"
        ) from None
    with lock:
        yield


def read_plan(folder: Path) -> Plan | None:
    """The plan that is kept there, or None.

    Raises CheckpointError where the folder holds something else, or a plan that can't be read.
    """
    path = folder / PLAN
    if not path.is_file():
        there = [item.name for item in folder.iterdir()] if folder.is_dir() else []
        others = [name for name in there if name not in OURS and not name.startswith(".")]
        if others:
            raise CheckpointError(
                f"{folder} is not empty and holds no study ({', '.join(sorted(others)[:3])}); choose another with --out"
            )
        return None
    try:
        return Plan.model_validate_json(read_text(path))
    except (ValidationError, DamagedFile):
        raise CheckpointError(
            f"{path} can't be read as a study's plan; remove it to make it again: finished cells are kept"
        ) from None


def write_plan(folder: Path, plan: Plan, study: str) -> None:
    """Keep the plan and the study's text."""
    write_text(folder / STUDY, study)
    write_text(folder / PLAN, plan.model_dump_json(indent=1) + "\n")


def cell_folder(folder: Path, name: str) -> Path:
    """Where the cell of that digest is kept."""
    return folder / CELLS / name


def write_result(cell: Path, result: Mapping[str, Any]) -> None:
    """Keep a cell's result, with a digest of its content. It says that the cell is finished."""
    write_json(cell / RESULT, result, sealed=True)


def read_result(cell: Path) -> dict[str, Any] | None:
    """The result kept in a cell's directory; None where there is none, or a damaged one, or another cell's."""
    try:
        kept = read_json(cell / RESULT, what="result", sealed=True)
    except DamagedFile:
        return None
    return kept if digest(kept.get("made_from")) == kept.get("digest") == cell.name else None


def read_results(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Every result by digest, and the digests of those that are damaged."""
    found, damaged = {}, []
    root = folder / CELLS
    for cell in sorted(root.glob("[!.]*")):
        result = read_result(cell)
        if result is not None:
            found[cell.name] = result
        elif (cell / RESULT).exists():
            damaged.append(cell.name)
    return found, damaged


def drop_result(folder: Path, name: str) -> None:
    """Forget a cell that is to be made again from its beginning."""
    shutil.rmtree(cell_folder(folder, name), ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove a study, and nothing that is not one's."""
    if read_plan(folder) is None:
        return
    for name in (STUDY, CELLS, *REPORTS, PLAN):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            with suppress(FileNotFoundError):
                path.unlink()
