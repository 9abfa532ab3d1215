"""One table from a finished comparison: scores, paired differences to every control, and what each row cost.

``python examples/comparison/table.py runs/comparison hard kd``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean

from stillhouse.study.intervals import mean_interval

VIEWS = {"tcmd.network", "pddm.path", "pddm.small1", "pddm.small2", "pddm.small3"}
"""Modules of a run that hold another's parameters, or a snapshot of them: not counted as trained."""


def main(folder: str, *controls: str) -> None:
    """Print it as Markdown."""
    made = json.loads((Path(folder) / "comparison.json").read_text())["runs"]
    metric = next(iter(made.values()))[0]["metric"]
    scores = {name: [run["scores"]["test"][metric] for run in runs] for name, runs in made.items()}
    heads = ["run", f"test {metric}", *[f"to {name}" for name in controls]]
    heads += ["seconds", "teacher calls", "parameters trained"]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    for name, runs in made.items():
        over = [
            mean_interval([a - b for a, b in zip(scores[name], scores[other], strict=True)]).signed()
            if other != name
            else "-"
            for other in controls
        ]
        sizes = runs[0]["parameters"]
        trained = sum(size for module, size in sizes.items() if module not in VIEWS)
        seconds, calls = (fmean(run[key] for run in runs) for key in ("seconds", "teacher_calls"))
        cells = [name, str(mean_interval(scores[name])), *over]
        print("| " + " | ".join([*cells, f"{seconds:.0f}", f"{calls:,.0f}", f"{trained:,}"]) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
