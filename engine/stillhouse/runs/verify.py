"""Whether the files of a run are as they were written, and how far the runs under a folder are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.config import dump, parse, validate
from stillhouse.errors import CheckpointError, DamagedFile, StillhouseError
from stillhouse.files import check_seal, digest, read_bytes, read_json, read_text
from stillhouse.files.lock import described, holder
from stillhouse.runs import checkpoint, directory, stored
from stillhouse.runs.directory import CHECKPOINTS, CONFIG, MANIFEST, METRICS, SOFT_LABELS, SUMMARY
from stillhouse.runs.metrics import read_rows

DEEP = 4
"""How far below a folder runs are looked for."""


@dataclass
class File:
    """One file of a run, and what is wrong with it (nothing where ``ok``)."""

    name: str
    ok: bool
    detail: str = ""


def verify(folder: Path) -> list[File]:
    """Every file of the run against its digest.

    Raises CheckpointError where the folder holds no run.
    """
    if not directory.holds_run(folder):
        raise CheckpointError(f"{folder} holds no run of stillhouse; expected a run directory")
    found = [_checked(MANIFEST, lambda: directory.read_manifest(folder))]
    found.append(_checked(CONFIG, lambda: _check_config(folder)))
    newest: dict[str, Any] = {}
    for path in checkpoint.checkpoints(folder / CHECKPOINTS):
        found.append(_checked(f"{CHECKPOINTS}/{path.name}", partial(_check_checkpoint, path, newest)))
    for path in sorted((folder / SOFT_LABELS).glob("*.safetensors")):
        found.append(_checked(f"{SOFT_LABELS}/{path.name}", partial(_check_sealed, path)))
    if (kept := _soft_labels(folder)) and not (folder / SUMMARY).exists():
        found.append(_checked(f"soft labels {kept['config']['soft_labels']}", lambda: stored.verify(kept)))
    if (folder / SUMMARY).exists():
        files: dict[str, str] = {}
        found.append(
            _checked(
                SUMMARY,
                lambda: files.update(read_json(folder / SUMMARY, what="summary", sealed=True)["files"]),
            )
        )
        for name, written in files.items():
            found.append(_checked(name, partial(_check_digest, folder / name, written)))
    elif "metrics" in newest or (folder / METRICS).exists():
        found.append(_checked(METRICS, lambda: _check_metrics(folder / METRICS, newest.get("metrics"))))
    return found


def _checked(name: str, check: Callable[[], object]) -> File:
    try:
        check()
    except StillhouseError as error:
        return File(name, ok=False, detail=str(error))
    return File(name, ok=True)


def _soft_labels(folder: Path) -> dict[str, Any]:
    """The manifest of a run that reads kept labels, which a resume needs as they were; empty for others."""
    try:
        manifest = directory.read_manifest(folder)
    except DamagedFile:
        return {}
    return manifest if "soft_labels" in manifest["teacher"] else {}


def _check_config(folder: Path) -> None:
    try:
        kept = directory.read_manifest(folder)["config"]
    except DamagedFile:
        kept = None
    found = dump(validate(parse(read_text(folder / CONFIG), str(folder / CONFIG))))
    if kept is not None and (differing := [p for p, *_ in directory.differences(kept, found) if p != "out"]):
        raise DamagedFile(f"differs from what was run in {', '.join(differing[:5])}")


def _check_checkpoint(path: Path, newest: dict[str, Any]) -> None:
    newest.update(checkpoint.read(path))


def _check_sealed(path: Path) -> None:
    if problem := check_seal(read_bytes(path)):
        raise DamagedFile(problem)


def _check_digest(path: Path, written: str) -> None:
    if digest(path) != written:
        raise DamagedFile("it was changed or damaged since it was written")


def _check_metrics(path: Path, state: dict[str, Any] | None) -> None:
    content = read_bytes(path)[: state["bytes"]] if state else b""
    if state and hashlib.sha256(content).hexdigest() != state["sha256"]:
        raise DamagedFile("it was changed or damaged since it was written")
    read_rows(path)


def find(folder: Path) -> Iterator[Path]:
    """The run directories at and below ``folder``, in order; links to folders are not followed."""
    base = len(folder.parts)
    for here, folders, files in os.walk(folder):
        path = Path(here)
        folders.sort()
        if MANIFEST in files and directory.holds_run(path):
            folders.clear()
            yield path
        elif len(path.parts) - base >= DEEP:
            folders.clear()


def state(folder: Path) -> dict[str, Any]:
    """``dir``, ``state``, ``step`` of ``steps``, and a ``detail`` of one run."""
    found: dict[str, Any] = {"dir": str(folder), "state": "damaged", "step": 0, "steps": 0, "detail": ""}
    who = holder(folder)
    try:
        manifest = directory.read_manifest(folder)
        found["steps"] = sum(stage["steps"] for stage in manifest["stages"])
        rows = read_rows(folder / METRICS)
        newest = checkpoint.newest(folder / CHECKPOINTS)
        steps = [row["step"] for row in rows[-2:]] + ([checkpoint.step_of(newest)] if newest else [])
        found["step"] = max(steps, default=0)
        if who is not None:
            return {**found, "state": "running", "detail": f"by {described(who).rstrip(',')}"}
        if (folder / SUMMARY).exists():
            summary = directory.read_summary(folder)
            scores = summary["scores"].get("test") or summary["scores"].get("validation") or {}
            shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items() if value is not None)
            return {**found, "state": "finished", "step": summary["steps"], "detail": shown}
    except StillhouseError as error:
        return {**found, "detail": str(error)}
    if manifest["stillhouse"].get("clearing"):
        return {
            **found,
            "state": "cleared",
            "detail": "starting over was cut short; the next run there begins anew",
        }
    if directory.diverged(manifest):
        last = manifest["history"][-1]
        return {
            **found,
            "state": "diverged",
            "detail": f"after update {last['at']}; --resume with a lower optimizer.lr",
        }
    return {**found, "state": "unfinished", "detail": "--resume goes on with it"}
