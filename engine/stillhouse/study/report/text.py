"""The report as Markdown, LaTeX and CSV. Nothing measured in seconds stands in the tables of scores."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from stillhouse.study.analysis import Analysis, Row
from stillhouse.study.plan import Plan, score
from stillhouse.study.report import words
from stillhouse.study.report.words import NONE, number
from stillhouse.study.statistics import FEWEST


def markdown(analysis: Analysis) -> str:
    """The report in short."""
    plan = analysis.plan
    lines = [f"# {plan.name}", "", plan.question, "", f"{words.summary(plan)}.", ""]
    if not analysis.complete:
        lines += ["**Not finished: some cells have not run yet.**", ""]
    for pair, rows in analysis.rows.items():
        lines += [f"## {pair}", "", *(f"- {words.sentence(plan, row)}" for row in rows), ""]
        lines += [*_table(_score_table(plan, rows)), "", *_table(_cost_table(rows)), ""]
    if plan.tuned:
        lines += ["## Settings chosen", "", *_table(_tuning_table(analysis)), ""]
    if analysis.ranks is not None:
        lines += ["## Ranks", "", *_ranks(analysis), ""]
    if analysis.failures:
        lines += ["## Failed", ""]
        lines += [
            f"- {one.method} on {one.pair}, seed {one.seed}: {found['status']}: {found['error']['message'].splitlines()[0]}"
            for one, found in analysis.failures
        ]
        lines.append("")
    lines += ["## How to read this", "", *(f"- {line}" for line in words.reading(analysis))]
    return "\n".join([*lines, *notes(analysis)]) + "\n"


def notes(analysis: Analysis) -> list[str]:
    """The study's remarks, and each row's, a line each."""
    found = [f"Note: {remark}" for remark in analysis.remarks]
    for rows in analysis.rows.values():
        found += [
            f"Note, {row.title} on {row.entry.pair}: {remark}" for row in rows for remark in row.remarks
        ]
    return ["", *found] if found else []


def brief(analysis: Analysis) -> str:
    """What a terminal shows at the end: a table for each pair."""
    plan = analysis.plan
    lines = []
    for pair, rows in analysis.rows.items():
        metric = next((row.entry.facts.metric for row in rows if row.scores), "score")
        interval = "mean and 95 % interval" if len(plan.fresh_seeds) >= FEWEST else "mean"
        head = [pair, f"test {metric}, {interval}", f"paired difference to {plan.titles[plan.baseline]}", "updates",
                "teacher calls", "seconds"]  # fmt: skip
        lines += [*_table((head, [_brief_cells(plan, row) for row in rows])), ""]
    seeds = ", ".join(map(str, plan.fresh_seeds))
    same = "the same data, student, initial weights, student updates and order of the data in every row"
    lines.append(f"Seeds {seeds}{'' if plan.remarks else f'; {same}'}. Seconds are training alone.")
    lines += [
        f"{one.method} on {one.pair}, seed {one.seed}, {found['status']}: {found['error']['message'].splitlines()[0]}"
        for one, found in analysis.failures
    ]
    return "\n".join([*lines, *notes(analysis)]) + "\n"


def _brief_cells(plan: Plan, row: Row) -> list[str]:
    if row.interval is None or row.cost is None:
        return [row.title, row.status, *[NONE] * 4]
    over = "-" if row.difference is None else row.difference.interval.signed()
    cost = row.cost
    return [
        row.title,
        str(row.interval),
        over,
        f"{cost.updates:,}",
        f"{cost.teacher_calls:,.0f}",
        f"{cost.seconds:.1f}",
    ]


Table = tuple[list[str], list[list[str]]]


def _table(table: Table) -> list[str]:
    head, rows = table
    return [
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]


def _score_table(plan: Plan, rows: Sequence[Row]) -> Table:
    metric = next((row.entry.facts.metric for row in rows if row.scores), "score")
    base = plan.titles[plan.baseline]
    head = [
        "method",
        f"test {metric}",
        "IQM",
        f"to {base}",
        "p (Holm)",
        "effect",
        "P(better)",
        "seeds needed",
    ]
    return head, [[row.title, *_score_cells(row)] for row in rows]


def _score_cells(row: Row) -> list[str]:
    if row.interval is None:
        return [row.status, *[NONE] * 6]
    one = row.difference
    cells = [str(row.interval), f"{row.interquartile:.3f}"]
    if one is None:
        return [*cells, *[NONE] * 5]
    needed = NONE if one.needed is None else f"{one.needed:,}"
    return [
        *cells,
        one.interval.signed(),
        number(one.p_holm),
        number(one.effect, 2),
        number(one.improvement, 2),
        needed,
    ]


def _cost_table(rows: Sequence[Row]) -> Table:
    head = ["method", "seconds", "teacher calls", "peak memory (MB)", "updates to target", "tuning (s)"]
    return head, [[row.title, *_cost_cells(row)] for row in rows if row.cost is not None]


def _cost_cells(row: Row) -> list[str]:
    cost = row.cost
    assert cost is not None
    reached = NONE if cost.updates_to_target is None else f"{cost.updates_to_target:,.0f}"
    return [
        f"{cost.seconds:.1f}",
        f"{cost.teacher_calls:,.0f}",
        words.megabytes(cost.peak_memory),
        f"{reached} ({cost.reached} of {len(row.scores)})",
        f"{cost.tuning_seconds:.0f}",
    ]


def _tuning_table(analysis: Analysis) -> Table:
    head = ["method", "pair", "searched", "chosen", "validation"]
    if analysis.plan.defaults:
        head.append("tuned less as given")
    rows = []
    for pair, of_pair in analysis.rows.items():
        for row in of_pair:
            if row.chosen is None:
                continue
            space = words.search(analysis.plan.spaces[row.entry.method])
            cells = [row.title, pair, space, words.settings(row.settings), number(row.trials[row.chosen], 4)]
            if analysis.plan.defaults:
                cells.append(NONE if row.gain is None else row.gain.signed())
            rows.append(cells)
    return head, rows


def _ranks(analysis: Analysis) -> list[str]:
    found = analysis.ranks
    assert found is not None
    ordered = sorted(found.average.items(), key=lambda item: item[1])
    table = _table((["method", "average rank"], [[analysis.plan.titles[n], f"{r:.2f}"] for n, r in ordered]))
    return [*table, "", rank_words(analysis)]


def rank_words(analysis: Analysis) -> str:
    """What the ranks are over, and what they show."""
    found = analysis.ranks
    assert found is not None
    few = (
        " Fewer than 5 pairs: seeds of one pair are no further tasks, so this says nothing of tasks that are not here."
        if analysis.ranked_over != "pairs"
        else ""
    )
    return (
        f"Over {found.blocks} {analysis.ranked_over}; 1 is best. Friedman's test that all are equal: p = {number(found.friedman)}. "
        f"Average ranks further apart than {found.critical:.2f} differ at 5 % (Nemenyi).{few}"
    )


_TEX = {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    NONE: "--",
}
_TEX |= {letter: f"\\{letter}" for letter in "&%#_${}"}


def _tex(value: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in value)


def latex(analysis: Analysis) -> str:
    """A table for each pair, to be put into a document that has the package booktabs."""
    plan = analysis.plan
    out = [f"% {plan.name}: {words.summary(plan)}".replace("\n", " ")]
    for pair, rows in analysis.rows.items():
        head, body = _score_table(plan, rows)
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


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return made.getvalue()


def scores_csv(analysis: Analysis) -> str:
    """Every cell with its scores."""
    head = ["pair", "method", "phase", "trial", "seed", "status", "metric", "validation", "test", "cell"]
    rows = []
    for one, found in analysis.provenance:
        metric = analysis.plan.entry(one.method, one.pair).facts.metric
        values = [score(found, split, metric) for split in ("validation", "test")]
        status = "not run" if found is None else found["status"]
        rows.append(
            [one.pair, one.method, one.phase, one.trial, one.seed, status, metric, *values, one.digest]
        )
    return _csv(head, rows)


def statistics_csv(analysis: Analysis) -> str:
    """Every method on every pair with all its statistics, unrounded."""
    head = ["pair", "method", "n", "mean", "half_width", "bca_low", "bca_high", "interquartile_mean", "difference",
            "difference_half_width", "p_t", "p_holm", "p_permutation", "p_wilcoxon", "effect", "p_better", "seeds_needed",
            "verdict", "settings", "reason"]  # fmt: skip
    rows = []
    for pair, of_pair in analysis.rows.items():
        for row in of_pair:
            mean, one = row.interval, row.difference
            start = [None] * 3 if mean is None else [mean.n, mean.mean, mean.half]
            over: list[Any] = [None] * 10
            if one is not None:
                over = [one.interval.mean, one.interval.half, one.p, one.p_holm, one.p_permutation, one.p_wilcoxon,
                        one.effect, one.improvement, one.needed, one.verdict]  # fmt: skip
            rows.append(
                [
                    pair,
                    row.entry.method,
                    *start,
                    *(row.bca or (None, None)),
                    row.interquartile,
                    *over,
                    words.settings(row.settings),
                    row.reason,
                ]
            )
    return _csv(head, rows)


def costs_csv(analysis: Analysis) -> str:
    """Every method on every pair with what it cost."""
    head = ["pair", "method", "seconds", "teacher_calls", "peak_memory_bytes", "student_parameters", "tuning_seconds",
            "updates_to_target", "reached_target", "seeds"]  # fmt: skip
    rows = []
    for pair, of_pair in analysis.rows.items():
        for row in of_pair:
            if (cost := row.cost) is not None:
                rows.append(
                    [pair, row.entry.method, round(cost.seconds, 3), cost.teacher_calls, round(cost.peak_memory),
                     cost.parameters, round(cost.tuning_seconds, 3), cost.updates_to_target, cost.reached, len(row.scores)]
                )  # fmt: skip
    return _csv(head, rows)
