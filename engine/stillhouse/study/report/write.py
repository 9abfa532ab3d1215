"""Every form of the report, from one analysis."""

from __future__ import annotations

from pathlib import Path

from stillhouse.files import write_text
from stillhouse.study.analysis import Analysis
from stillhouse.study.report import text
from stillhouse.study.report.page import page


def write(analysis: Analysis, folder: Path) -> None:
    """Write ``report.html``, ``report.md``, ``report.tex`` and the three tables as CSV into the folder."""
    write_text(folder / "report.md", text.markdown(analysis))
    write_text(folder / "report.tex", text.latex(analysis))
    write_text(folder / "scores.csv", text.scores_csv(analysis))
    write_text(folder / "statistics.csv", text.statistics_csv(analysis))
    write_text(folder / "costs.csv", text.costs_csv(analysis))
    write_text(folder / "report.html", page(analysis))
