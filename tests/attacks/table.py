"""``make attack``: every attack at full length, and the table of docs/reliability.md.

python tests/attacks/table.py [--only NAME] [--scale 1.0] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "agg"

ATTACKS = {
    "kills at any moment, then --resume": ("on_runs", "kills", 240),
    "kills inside of --overwrite": ("on_runs", "kills_in_overwrite", 60),
    "signals (INT, TERM, HUP; up to three at once)": ("on_files", "interrupted", 60),
    "damaged newest checkpoint": ("on_files", "newest_checkpoint", 60),
    "checkpoints with one flipped bit, read": ("on_files", "loads", 400),
    "damaged kept soft labels": ("on_files", "soft_labels", 60),
    "damaged teacher in the cache": ("on_files", "teacher_cache", 40),
    "damaged data in the cache": ("on_files", "data_cache", 200),
    "damaged student of a finished run": ("on_files", "student", 60),
    "damaged summary.json": ("on_files", "summary", 60),
    "damaged manifest.json": ("on_files", "manifest", 60),
    "damaged config.yaml": ("on_files", "config", 60),
    "damaged metrics.jsonl": ("on_files", "metrics", 60),
    "one file of a run deleted": ("on_files", "deleted", 60),
    "stillhouse verify: damage found": ("on_files", "verify", 80),
    "two and three processes, other configs": ("on_runs", "processes", 24),
    "two processes, one config": ("on_runs", "twice", 48),
    "folders of somebody's: out, --overwrite, --resume": ("on_runs", "foreign_folders", 90),
    "hostile git repositories": ("on_runs", "hostile_repositories", 6),
    "a full disk (a limit on a file's size)": ("on_files", "full_disk", 60),
    "output that nobody reads": ("on_files", "unread_output", 10),
    "configs from a stranger": ("on_configs", "configs", 8400),
    "accepted configs that may not go together": ("on_configs", "accepted", 200),
    "kernel calls": ("on_kernels", "kernel_calls", 5800),
}
"""What is attacked: the module, the function, and how often at full length."""


def main() -> int:
    """Run the attacks and print the table; 1 where one was not survived."""
    words = argparse.ArgumentParser()
    words.add_argument("--only", default="", help="a part of an attack's name")
    words.add_argument("--scale", type=float, default=1.0, help="part of the full length")
    words.add_argument("--seed", type=int, default=0)
    options = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillhouse-attacks-") as folder:
        os.environ["STILLHOUSE_CACHE"] = str(Path(folder) / "cache")
        return _all(Path(folder), options)


def _all(folder: Path, options: argparse.Namespace) -> int:
    import importlib

    import torch
    from forkserver import Forks

    from attacks.lab import Lab

    torch.set_num_threads(1)
    forks = Forks()
    lost, problems = 0, []
    print(
        "| attack | tried | survived | of these, refused in words | seconds |\n| --- | --- | --- | --- | --- |"
    )
    for name, (module, function, count) in ATTACKS.items():
        if options.only not in name:
            continue
        act = getattr(importlib.import_module(f"attacks.{module}"), function)
        started = time.perf_counter()
        figures = act(
            Lab(folder / function, forks),
            max(1, round(count * options.scale)),
            random.Random(f"{options.seed} {function}"),
        )
        seconds = time.perf_counter() - started
        note = f" ({figures.note})" if figures.note else ""
        print(
            f"| {name}{note} | {figures.tried:,} | {figures.survived:,} | {figures.told:,} | {seconds:.0f} |",
            flush=True,
        )
        lost += figures.tried - figures.survived
        problems += [f"{name}: {problem}" for problem in figures.problems]
    for problem in problems[:60]:
        print(problem, file=sys.stderr)
    forks.close()
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
