"""A study of N cells beside the sum of its cells' own time.

stillhouse bench study

Hard labels and KD on digits, half of the seeds each, through the command as a user gives it: imports, preparation, cells,
report. Wall-clock time is what a user waits for and needs a quiet machine; processor time counts work alone, of the
command, the server that cells are forked from and the cells, and is the figure to read on a busy one (Linux alone).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from stillhouse.errors import ConfigError, StillhouseError

SET_CHILD_SUBREAPER = 36
"""Linux's prctl: see ``man 2 prctl``."""


def content(cells: int, updates: int) -> dict[str, Any]:
    """The study's file."""
    return {
        "name": "bench",
        "question": "What does a study cost beside its cells?",
        "baseline": "hard",
        "budget": {"updates": updates},
        "seeds": {"fresh": list(range(cells // 2))},
        "common": {"threads": 1, "log_every": 100, "validate_every": 100, "checkpoint_every": updates},
        "pairs": [{"name": "digits", "task": "digits", "teacher": "mlp", "student": "mlp"}],
        "methods": {"hard": {"config": {"method": "hard_labels"}}, "kd": {"config": {"method": "kd"}}},
    }


def measure(cells: int, updates: int, workers: int) -> dict[str, float]:
    """Seconds of the whole study and of its cells, by the clock and, on Linux, by the processor."""
    counted = _adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as made:
        folder = Path(made)
        (folder / "study.yaml").write_text(yaml.safe_dump(content(cells, updates)), encoding="utf-8")
        words = ["study", str(folder / "study.yaml"), "--out", str(folder / "out"), "--workers", str(workers)]
        used, started = _of_children(), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "stillhouse.cli.main", *words], capture_output=True, text=True, check=False
        )
        wall = time.perf_counter() - started
        if done.returncode:
            raise StillhouseError(f"the study ended with {done.returncode}: {done.stderr[-500:]}")
        results = [json.loads(path.read_bytes()) for path in (folder / "out" / "cells").glob("*/result.json")]
        found = {"wall": wall, "cells_wall": sum(one["wall_seconds"] for one in results) / workers}
        if counted:
            with contextlib.suppress(ChildProcessError):  # none is left
                while True:
                    os.wait()  # the server that cells were forked from ends after the study
            found["cpu"] = _of_children() - used
            found["cells_cpu"] = sum(one["cpu_seconds"] for one in results)
        return found


def _adopt_orphans() -> bool:
    """Make this process the parent of whatever its children leave behind, so that their time is counted; Linux alone."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(options: argparse.Namespace) -> int:
    """Measure, and print a line for each clock."""
    if options.cells < 2 or options.updates < 1 or options.workers < 1:
        raise ConfigError(
            f"got --cells {options.cells} --updates {options.updates} --workers {options.workers}; expected 2, 1 and 1 or more"
        )
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-cache-") as cache:
        kept = os.environ.get("STILLHOUSE_CACHE")
        os.environ["STILLHOUSE_CACHE"] = cache  # the teacher is trained within the study's time
        try:
            found = measure(options.cells, options.updates, options.workers)
        finally:
            os.environ.pop("STILLHOUSE_CACHE")
            if kept is not None:
                os.environ["STILLHOUSE_CACHE"] = kept
    if options.json:
        print(json.dumps({"cells": options.cells, "workers": options.workers, **found}, indent=2))
        return 0
    for clock, name in (("wall", "wall clock"), ("cpu", "processor time")):
        if clock in found:
            whole, own = found[clock], found[f"cells_{clock}"]
            print(
                f"{name}: {whole:.1f} s for {options.cells // 2 * 2} cells of {own:.1f} s together, {whole / own:.3f} times"
            )
    return 0
