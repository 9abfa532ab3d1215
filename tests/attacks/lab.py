"""Where attacks are made: a small run in three stages, in processes of its own, beside one that nothing happened to."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CONFIG: dict[str, Any] = {
    "name": "attacked",
    "task": {"name": "digits", "labelled": 60, "unlabelled": 60, "validation": 40},
    "teacher": {"name": "mlp", "hidden": 12, "train": {"steps": 8}},
    "student": {"name": "mlp", "hidden": 6},
    "method": {"name": "sld", "shares": [1, 1, 1]},
    "steps": 18,
    "batch_size": 16,
    "scheduler": "CosineAnnealingLR",
    "log_every": 2,
    "validate_every": 4,
    "checkpoint_every": 2,
    "threads": 1,
}
REHEARSED = 4
"""Updates before the run's first: one of each stage and one of the teacher's, with models that are thrown away."""


@dataclass
class Figures:
    """How often an attack was tried and survived; what went wrong otherwise."""

    tried: int = 0
    survived: int = 0
    told: int = 0
    """Of those that survived: refused in words, rather than ended as if nothing had happened."""
    problems: list[str] = field(default_factory=list)
    note: str = ""

    def judged(self, outcome: str) -> None:
        """``same`` or ``told``, or what went wrong."""
        self.tried += 1
        if outcome in ("same", "told"):
            self.survived += 1
            self.told += outcome == "told"
        else:
            self.problems.append(outcome)


class Lab:
    """A folder for attacks, the fork server, and runs that were left alone, by their overrides."""

    def __init__(self, folder: Path, forks: Any) -> None:
        self.folder, self.forks = folder, forks
        self._number = 0
        self._whole: dict[tuple[str, ...], Place] = {}
        self._cut: Place | None = None

    def place(self, like: Path | None = None) -> Place:
        """A folder of its own with the config; ``like``: with a copy of that run in it."""
        self._number += 1
        place = Place(self.folder / f"{self._number}", self.forks)
        if like is not None:
            shutil.copytree(like, place.run, symlinks=True)
        return place

    def whole(self, *overrides: str) -> Place:
        """A run that nothing happened to."""
        if overrides not in self._whole:
            place = self.place()
            assert place.go(*overrides) == 0, place.said()
            self._whole[overrides] = place
        return self._whole[overrides]

    def cut(self) -> Place:
        """A run that was killed in the middle of its last stage: two checkpoints, kept soft labels, rows."""
        if self._cut is None:
            place = self.place()
            update = {
                "function": "stillhouse.training.loop:Loop._update",
                "call": 17 + REHEARSED,
                "when": "after",
            }
            self.whole()  # the teacher is in the cache
            assert place.go(die=update) < 0, place.said()
            self._cut = place
        return self._cut


class Place:
    """One folder with ``run.yaml``; the run goes to ``run`` in it."""

    def __init__(self, folder: Path, forks: Any) -> None:
        folder.mkdir(parents=True)
        self.folder, self.forks = folder, forks
        self.run, self.log = folder / "run", folder / "log"
        (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))

    def start(self, *more: str, **faults: Any) -> int:
        return self.forks.start(
            ["run", "run.yaml", "out=run", *more], self.folder, self.log, **{"quick": True, **faults}
        )

    def go(self, *more: str, **faults: Any) -> int:
        return self.forks.wait(self.start(*more, **faults))

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def result(self) -> tuple[Any, ...] | None:
        """Weights, rows without times, and scores of a finished run."""
        try:
            rows = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
            summary = json.loads((self.run / "summary.json").read_text())
            weights = (self.run / "student.safetensors").read_bytes()
        except (OSError, ValueError):
            return None
        without = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        return weights, without, summary["scores"], summary["steps"]

    def outcome(self, code: int, whole: Place, *, finished: bool = True) -> str:
        """``same`` as the run left alone, ``told`` in words, or what is wrong.

        finished
            A run that says it worked has left its results in the directory.
        """
        said = self.said()
        if "Traceback" in said or "fault of stillhouse" in said:
            return f"a traceback: {said[-400:]}"
        if code == 0:
            if finished and self.result() != whole.result():
                return f"other results with exit 0: {said[-200:]}"
            return "same"
        if code == 2 and "error: " in said:
            return "told"
        return f"exit {code}: {said[-200:]}"


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder with its content, and every folder."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "folder"
    return found


def damage(path: Path, chance: random.Random) -> str:
    """Flip a bit, cut, empty, or overwrite a part; what was done."""
    content = bytearray(path.read_bytes())
    kind = chance.choice(["flip", "flip", "flip", "cut", "empty", "block", "longer"])
    place = chance.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "empty":
        content.clear()
    elif kind == "block":
        before = bytes(content)
        content[place : place + 32] = chance.randbytes(len(content[place : place + 32]))
        if bytes(content) == before:
            content[place] ^= 1
    else:
        content += chance.randbytes(7)
    path.write_bytes(content)
    return f"{kind} at {place}"


Attack = Callable[[Lab, int, random.Random], Figures]


def cycle(items: Sequence[Any], number: int) -> Any:
    return items[number % len(items)]
