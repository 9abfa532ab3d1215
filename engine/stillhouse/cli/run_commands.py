"""``stillhouse verify`` and ``stillhouse runs``: what lies in run directories, and whether it is as it was written."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from stillhouse.errors import ConfigError, StillhouseError, printable
from stillhouse.terminal import show


def verify(options: argparse.Namespace) -> int:
    """Check every file of each run against its digest; 1 where one is missing or was changed."""
    from stillhouse.runs.verify import verify as check

    found, none = {}, False
    for name in options.runs:
        try:
            found[name] = check(Path(name).expanduser())
        except StillhouseError as error:  # told beside the others, which are looked at all the same
            print(printable(f"error: {error}"), file=sys.stderr)
            none = True
    bad = sum(not file.ok for files in found.values() for file in files)
    if options.json:
        rows = {name: [vars(file) for file in files] for name, files in found.items()}
        show(json.dumps({"runs": rows, "damaged": bad}, indent=2))
    else:
        for name, files in found.items():
            for file in files:
                show(
                    f"{'ok      ' if file.ok else 'DAMAGED '} {name}/{file.name}{': ' if file.detail else ''}{file.detail}"
                )
        total = sum(len(files) for files in found.values())
        show(f"{total - bad} of {total} files as they were written")
    return 2 if none else 1 if bad else 0


def runs(options: argparse.Namespace) -> int:
    """List the runs under a folder: finished, running (by whom), unfinished, diverged, damaged, and how far."""
    from stillhouse.runs.verify import find, state

    folder = Path(options.dir).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; expected one with run directories in it")
    found = [state(path) for path in find(folder)]
    if options.json:
        show(json.dumps(found, indent=2))
        return 0
    rows = [("run", "state", "updates", "")]
    for run in found:
        done = f"{run['step']:,} of {run['steps']:,}" if run["steps"] else "-"
        rows.append((run["dir"], run["state"], done, run["detail"]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows if found else ():
        show(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]
            ).rstrip()
        )
    if not found:
        show(f"no runs under {folder}")
    return 0
