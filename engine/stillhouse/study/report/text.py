"""The report as Markdown, LaTeX and CSV. Nothing measured in seconds stands in the tables of scores."""

from __future__ import annotations

import csv
import io
import re

from stillhouse.study.analysis import Analysis
from stillhouse.study.report import tables, words
from stillhouse.study.report.tables import Table
from stillhouse.study.report.words import NONE


def markdown(analysis: Analysis) -> str:
    """The report in short."""
    plan = analysis.plan
    lines = [f"# {plan.name}", "", _flat(plan.question), "", f"{words.summary(plan)}.", ""]
    if not analysis.complete:
        lines += ["**Not finished: some cells have not run yet.**", ""]
    for pair, rows in analysis.rows.items():
        lines += [f"## {pair}", "", *(f"- {_flat(words.sentence(plan, row))}" for row in rows), ""]
        lines += [*_table(tables.scores(analysis, pair)), "", *_table(tables.costs(analysis, pair)), ""]
    if plan.tuned:
        lines += ["## Settings chosen", "", *_table(tables.chosen(analysis)), ""]
        lines += ["## Settings tried", "", *_table(tables.tried(analysis)), ""]
    if analysis.rankings:
        lines += ["## Ranks", ""]
    for ranking in analysis.rankings:
        lines += [*_table(tables.ranks(analysis, ranking)), "", words.rank_words(analysis, ranking), ""]
    failed = words.failures(analysis)
    if failed:
        lines += ["## What did not run", "", *(_line(who, why) for who, why in failed), ""]
    lines += ["## How to read this", "", *(f"- {line}" for line in words.reading(analysis))]
    return _inert("\n".join([*lines, *_notes(analysis)]) + "\n")


def _line(who: str, why: str) -> str:
    return f"- {_flat(who)}: {_flat(why)}"


def _flat(words: str) -> str:
    return " ".join(words.split())


def _inert(page: str) -> str:
    """Markdown without what a renderer would take for tags, links or pictures: a study's words are words."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", page).replace("](", "]\\(")


def _notes(analysis: Analysis) -> list[str]:
    found = [_flat(note) for note in words.notes(analysis)]
    return ["", *found] if found else []


def brief(analysis: Analysis) -> str:
    """What a terminal shows at the end: a table for each pair."""
    plan = analysis.plan
    lines = []
    for pair in analysis.rows:
        lines += [*_table(tables.brief(analysis, pair)), ""]
    seeds = ", ".join(map(str, plan.fresh_seeds))
    same = "the same data, student, initial weights, student updates and order of the data in every row"
    lines.append(f"Seeds {seeds}{'' if plan.remarks else f'; {same}'}. Seconds are training alone.")
    lines += [_line(who, why).removeprefix("- ") for who, why in words.failures(analysis)]
    return "\n".join([*lines, *_notes(analysis)]) + "\n"


def _table(table: Table) -> list[str]:
    head, rows = table.texts()
    return [
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(_flat(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]


_TEX = {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    NONE: "--",
}
_TEX |= {letter: f"\\{letter}" for letter in "&%#_${}"}


def _tex(value: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in _flat(value))


def latex(analysis: Analysis) -> str:
    """A table for each pair, to be put into a document that has the package booktabs."""
    plan = analysis.plan
    out = [f"% {plan.name}: {words.summary(plan)}".replace("\n", " ")]
    for pair in analysis.rows:
        head, body = tables.scores(analysis, pair).texts()
        caption = f"{plan.question} {pair}: mean and 95 % interval over {len(plan.fresh_seeds)} seeds."
        out += [
            r"\begin{table}",
            rf"\caption{{{_tex(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            " & ".join(map(_tex, head)) + r" \\",
            r"\midrule",
            *(" & ".join(map(_tex, cells)) + r" \\" for cells in body),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    return "\n".join(out) + "\n"


def _csv(table: Table) -> str:
    head, rows = table.raw()
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return made.getvalue()


def scores_csv(analysis: Analysis) -> str:
    """Every cell with its scores."""
    return _csv(tables.runs(analysis))


def statistics_csv(analysis: Analysis) -> str:
    """Every method on every pair with all its statistics, unrounded."""
    return _csv(tables.joined(tables.scores(analysis, pair) for pair in analysis.rows))


def costs_csv(analysis: Analysis) -> str:
    """Every method on every pair with what it cost."""
    return _csv(tables.joined(tables.costs(analysis, pair) for pair in analysis.rows))
