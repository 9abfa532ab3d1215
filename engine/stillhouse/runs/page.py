"""What a finished run shows: a learning-curve picture and a page with its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.files import write_text
from stillhouse.runs import directory
from stillhouse.runs.contents import REPORT_MARK


def curve(rows: Sequence[Mapping[str, Any]], metric: str, path: Path, title: str) -> None:
    """Loss and validation metric over the updates, with the stages marked, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    losses = [row for row in rows if "loss" in row]
    scores = [row for row in rows if f"validation.{metric}" in row]
    left.plot([row["step"] for row in losses], [row["loss"] for row in losses], color="0.6", lw=0.8)
    right.plot(
        [row["step"] for row in scores],
        [row[f"validation.{metric}"] for row in scores],
        color="tab:blue",
        marker="o",
        ms=3,
    )
    left.set(xlabel="student updates", ylabel="loss of the logged update (grey)", title=title)
    if losses and min(row["loss"] for row in losses) > 0:
        left.set_yscale("log")
    right.set_ylabel(f"validation {metric}", color="tab:blue")
    stage, before = None, 0
    for row in rows:
        if row["stage"] != stage:
            stage = row["stage"]
            left.axvline(before, color="0.85", lw=0.8, zorder=0)
            where: dict[str, Any] = {
                "xycoords": ("data", "axes fraction"),
                "textcoords": "offset points",
                "fontsize": 8,
            }
            left.annotate(stage, (before, 1), xytext=(3, -10), **where)
        before = row["step"]
    figure.savefig(path)


def page(summary: Mapping[str, Any], manifest: Mapping[str, Any], path: Path) -> None:
    """A short README of the run."""
    scores = "\n".join(
        f"| {split} | {' | '.join(f'{value:.4f}' for value in values.values())} |"
        for split, values in summary["scores"].items()
    )
    names: Mapping[str, float] = next(iter(summary["scores"].values()), {})
    header = f"| split | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}"
    stages = "\n".join(
        f"| {stage['name']} | {stage['steps']} | {stage['data']} | {stage['teacher'] or '-'} | {stage['train']} |"
        for stage in manifest["stages"]
    )
    chosen = "\n".join(
        f"- {name} = {item['value']} ({item['why']})" for name, item in manifest["chosen"].items()
    )
    picture = f"![learning curve]({directory.CURVE})\n\n" if (path.parent / directory.CURVE).is_file() else ""
    warnings = "".join(f"\n> **Note:** {warning}\n" for warning in summary["warnings"])
    write_text(
        path,
        f"""# {summary["name"]}, seed {summary["seed"]}

{", ".join(summary["methods"])} on {manifest["task"]["name"]}: {summary["steps"]} student updates in
{summary["seconds"]:.1f} s, {summary["teacher_calls"]} forward passes of the teacher.
{warnings}
{header}
{scores}

{picture}| stage | updates | data | teacher | trained |
| --- | --- | --- | --- | --- |
{stages}

Chosen by default:

{chosen or "- nothing"}

## Files

- `{directory.CONFIG}`: the resolved configuration; `stillhouse run {directory.CONFIG}` makes the run again.
- `{directory.MANIFEST}`: versions, plugins, seeds, fingerprints of data and teacher, git state, machine.
- `{directory.METRICS}`: a row every logged update and every look at the validation split.
- `{directory.SUMMARY}`: the figures above.
- `{directory.STUDENT}`: the trained weights.
- `{directory.COMPRESSION}`, once `stillhouse export` took the student out: parameters, bytes, memory and latency, the
  teacher beside it.

{REPORT_MARK}
""",
    )
