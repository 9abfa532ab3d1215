"""The learning curves of a comparison in one picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.runs.directory import METRICS
from stillhouse.runs.metrics import read_rows


def curves(summaries: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Validation metric over the student updates, a line for each config's mean, a thin one for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    metric = ""
    for number, (name, made) in enumerate(summaries.items()):
        metric = made[0]["metric"]
        by_step = defaultdict(list)
        for summary in made:
            points = _points(Path(summary["dir"]), metric)
            axes.plot(*zip(*points, strict=True), color=f"C{number}", lw=0.6, alpha=0.5)
            for step, value in points:
                by_step[step].append(value)
        steps = sorted(by_step)
        means = [sum(by_step[step]) / len(by_step[step]) for step in steps]
        axes.plot(steps, means, color=f"C{number}", lw=2, label=name)
    axes.set(xlabel="student updates", ylabel=f"validation {metric}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _points(folder: Path, metric: str) -> list[tuple[int, float]]:
    path = folder / METRICS  # a run shorter than log_every has none
    rows = read_rows(path)
    key = f"validation.{metric}"
    return [(row["step"], row[key]) for row in rows if key in row] or [(0, float("nan"))]
