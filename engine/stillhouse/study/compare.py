"""Several configs, several seeds, one table: means with intervals, and whether the comparison is fair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from stillhouse.config import RunConfig, dump
from stillhouse.contract.splits import Splits
from stillhouse.contract.task import Task
from stillhouse.errors import ConfigError
from stillhouse.files import write_json, write_text
from stillhouse.runs.directory import differences
from stillhouse.runs.display import display
from stillhouse.runs.resolve import resolve
from stillhouse.runs.train import run
from stillhouse.study.intervals import Interval, mean_interval
from stillhouse.study.picture import curves

OWN = ("method", "methods", "name", "out", "seed", "teacher", "observers")
"""What compared runs may differ in."""


@dataclass
class Row:
    """One config over all seeds."""

    name: str
    metric: str
    score: Interval
    over_first: Interval | None
    steps: int
    teacher_calls: float
    seconds: float
    warnings: list[str]


def fair(configs: Sequence[RunConfig]) -> list[str]:
    """What the configs differ in besides the method: each line a reason to doubt the comparison."""
    first = resolve(configs[0]).config
    found = []
    for other in configs[1:]:
        for path, mine, its in differences(dump(first), dump(resolve(other).config)):
            if path.partition(".")[0] not in OWN:
                found.append(f"{path}: {mine!r} in {first.name}, {its!r} in {other.name}")
    return found


def compare(
    configs: Sequence[RunConfig],
    seeds: Sequence[int],
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> list[Row]:
    """Run every config with every seed, and return a row for each config.

    Everything that a config can get wrong is checked for all of them before the first is trained. Each
    run has a directory under ``out``; those that are there, finished, are not made again.
    """
    if len({config.name for config in configs}) < len(configs):
        raise ConfigError("two configs have the same name; give each its own 'name'")
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ConfigError(f"seeds {list(seeds)}: expected one or more, each once")
    unfair = fair(configs)
    data = _Shared()
    summaries: dict[str, list[dict[str, Any]]] = {config.name: [] for config in configs}
    for seed in seeds:
        for config in configs:
            folder = out / f"{config.name}-seed{seed}"
            cell = config.model_copy(update={"seed": seed, "out": folder})
            shown = display(f"{config.name} seed {seed}: ")
            made = run(cell, overwrite=overwrite, resume=resume, display=shown, splits=data)
            summaries[config.name].append(made)
    rows = _rows(summaries)
    write_json(out / "comparison.json", {"seeds": list(seeds), "differences": unfair, "runs": summaries})
    curves(summaries, out / "curves.png")
    write_text(out / "comparison.md", table(rows, seeds, unfair))
    return rows


class _Shared:
    """Makes each task's data once for all runs of the comparison."""

    def __init__(self) -> None:
        self._made: dict[str, Splits] = {}

    def __call__(self, task: Task) -> Splits:
        key = f"{type(task).__module__}.{type(task).__qualname__} {task.config.model_dump_json()}"
        if key not in self._made:
            self._made[key] = task.splits()
        return self._made[key]


def _rows(summaries: dict[str, list[dict[str, Any]]]) -> list[Row]:
    rows: list[Row] = []
    first: list[float] = []
    for name, made in summaries.items():
        metric = made[0]["metric"]
        scores = [summary["scores"]["test"][metric] for summary in made]
        over = mean_interval([mine - its for mine, its in zip(scores, first, strict=True)]) if first else None
        first = first or scores
        calls = fmean(summary["teacher_calls"] for summary in made)
        seconds = fmean(summary["seconds"] for summary in made)
        warnings = sorted({warning for summary in made for warning in summary["warnings"]})
        warnings += _against_control(made, summaries)
        rows.append(
            Row(name, metric, mean_interval(scores), over, made[0]["steps"], calls, seconds, warnings)
        )
    return rows


def _against_control(made: Sequence[dict[str, Any]], summaries: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A warning where the teacher is no better than the control trained on the labels alone."""
    metric = made[0]["metric"]
    controls = [
        summary["scores"]["validation"][metric]
        for others in summaries.values()
        for summary in others
        if summary["methods"] == ["hard_labels"] and "validation" in summary["scores"]
    ]
    teacher = made[0]["teacher"]
    if not teacher or not controls or teacher[metric] > fmean(controls):
        return []
    return [
        f"the teacher's validation {metric} ({teacher[metric]:.3f}) is no better than that of the control on "
        f"hard labels ({fmean(controls):.3f}): distilling from it can be expected to hurt"
    ]


def table(rows: Sequence[Row], seeds: Sequence[int], unfair: Sequence[str]) -> str:
    """The comparison as Markdown."""
    first = rows[0]
    lines = [
        f"| run | test {first.metric}, mean and 95 % interval | paired difference to {first.name} | updates "
        "| teacher calls | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        over = "-" if row.over_first is None else row.over_first.signed()
        lines.append(
            f"| {row.name} | {row.score} | {over} | {row.steps:,} | {row.teacher_calls:,.0f} | {row.seconds:.1f} |"
        )
    listed = ", ".join(map(str, seeds))
    if unfair:
        lines += ["", f"Seeds {listed}. Not the same for every row, so read the differences with care:", ""]
        lines += [f"- {line}" for line in unfair]
    else:
        lines += [
            "",
            f"Seeds {listed}; the same task, data, student, initial weights, student updates, batch size, "
            "optimizer and schedule in every row. Seconds are training alone.",
        ]
    lines += [f"Note, {row.name}: {warning}" for row in rows for warning in row.warnings]
    return "\n".join(lines) + "\n"
