"""examples/trainers: pairs of programs whose difference is the documentation."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "examples" / "trainers"
NAMES = ["loop", "trainer", "accelerate", "lightning"]


def added(name: str) -> list[str]:
    plain, distil = ((FOLDER / f"{kind}_{name}.py").read_text().splitlines() for kind in ("plain", "distil"))
    matcher = difflib.SequenceMatcher(a=plain, b=distil, autojunk=False)
    new: list[str] = []
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "insert":
            new += distil[c:d]
        elif tag == "replace":
            new += distil[c + b - a : d]  # beyond the lines that were changed
    return [line for line in new if line.strip()]


@pytest.mark.parametrize("name", NAMES)
def test_at_most_five_lines_are_added(name):
    assert len(added(name)) <= 5, added(name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "distil"])
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, kind, tmp_path):
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{kind}_{name}.py")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
