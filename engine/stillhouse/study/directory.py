"""The study's directory: its plan, a directory for each cell, and who holds it.

``study.yaml`` the file as it was read; ``plan.json`` what it came to; ``cells/DIGEST/`` a cell: ``result.json``, its log,
and the run's directory of a reported one; ``report.*`` and the tables.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from stillhouse.errors import CheckpointError
from stillhouse.files import write_json, write_text
from stillhouse.study.plan import Plan, digest

STUDY, PLAN, CELLS, RESULT, LOG = "study.yaml", "plan.json", "cells", "result.json", "log.txt"
LOCK, HOLDER = ".lock", ".holder.json"
REPORTS = ("report.html", "report.md", "report.tex", "scores.csv", "statistics.csv", "costs.csv")
OURS = (STUDY, PLAN, CELLS, LOCK, HOLDER, *REPORTS)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the directory against other studies; CheckpointError that says who holds it where it is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"{folder} is in use{_holder(folder)}; wait for it, or choose another with --out"
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        write_json(
            folder / HOLDER,
            {"process": os.getpid(), "host": socket.gethostname(), "user": _user(), "since": since},
        )
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in some containers
        return str(os.getuid())


def _holder(folder: Path) -> str:
    try:
        who = json.loads((folder / HOLDER).read_text())
    except (OSError, ValueError):
        return ""
    return f" by process {who['process']} of {who['user']} on {who['host']} since {who['since']}"


def read_plan(folder: Path) -> Plan | None:
    """The plan that is kept there, or None.

    Raises CheckpointError where the folder holds something else, or a plan that can't be read.
    """
    path = folder / PLAN
    if not path.is_file():
        others = [item.name for item in folder.iterdir() if item.name not in OURS] if folder.is_dir() else []
        if any(not name.startswith(".") for name in others):
            raise CheckpointError(
                f"{folder} is not empty and holds no study ({', '.join(sorted(others)[:3])}); choose another with --out"
            )
        return None
    try:
        return Plan.model_validate_json(path.read_text())
    except (ValidationError, UnicodeDecodeError):
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
    content = json.loads(json.dumps(result))  # as it will be read
    write_json(cell / RESULT, {**content, "content": digest(content)})


def read_result(cell: Path) -> dict[str, Any] | None:
    """The result kept in a cell's directory; None where there is none, or a damaged one, or another cell's."""
    try:
        kept = json.loads((cell / RESULT).read_text())
        content = kept.pop("content")
        whole = digest(kept) == content and digest(kept["made_from"]) == kept["digest"] == cell.name
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return kept if whole else None


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
