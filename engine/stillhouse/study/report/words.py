"""What the report says in words and numbers, the same in every form of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stillhouse.study.analysis import Analysis, Row, split_of
from stillhouse.study.differences import Difference
from stillhouse.study.live import label
from stillhouse.study.plan import Plan, ended_by
from stillhouse.study.ranking import Ranking
from stillhouse.study.statistics import FEWEST

NONE = "–"  # noqa: RUF001 - an en dash is how tables say nothing


def sentence(plan: Plan, row: Row) -> str:
    """A method on a pair in a sentence."""
    if row.interval is None:
        why = "" if row.reason is None else f": {row.reason}"
        return f"{row.title}, {row.status}{why}."
    name = f"{row.title} scores {row.interval}{' on validation' * (row.split == 'validation')}"
    if row.entry.method == plan.baseline:
        return f"{name}; the others are compared with it."
    difference, base = row.difference, plan.titles[plan.baseline]
    if difference is None:
        return f"{name}; {base} has no score to compare with."
    gap = f"{difference.interval.signed()}, paired by seed"
    if difference.p is None:
        return f"{name} ({gap}, to {base}); fewer than {FEWEST} seeds show nothing."
    if difference.verdict is None:
        return f"{name} ({gap}, to {base}); nothing is claimed before every cell has run."
    p = f"p = {number(difference.p_holm)} after Holm"
    if difference.verdict != "open":
        return f"{name}, {difference.verdict} than {base} ({gap}; {p})."
    return f"{name}; no difference to {base} is shown ({gap}; {p}){_needed(difference)}."


def _needed(difference: Difference) -> str:
    if difference.effect is None:
        return ""
    if difference.needed is None:
        return ": one of this size would need more than 100,000 seeds"
    if difference.needed <= difference.interval.n:
        return ": by itself it would be seen, beside this many comparisons it is not"
    return f": one of this size would need about {difference.needed:,} seeds"


def summary(plan: Plan) -> str:
    """What was run, in a line."""
    parts = [
        _count(len(plan.titles), "method"),
        _count(len(plan.pairs), "pair") + " of teacher and student",
        _count(len(plan.fresh_seeds), "seed"),
        f"{plan.updates:,} updates a run",
    ]
    if plan.tuned:
        trials = max(len(entry.trials) for entry in plan.entries)
        parts.append(
            f"{trials} settings tried for each on {_count(len(plan.tuning_seeds), 'seed')}, by validation"
        )
    else:
        parts.append("no tuning")
    return ", ".join(parts)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def reading(analysis: Analysis) -> list[str]:
    """How the figures were come by: what a reader has to know to believe them."""
    plan = analysis.plan
    splits = {split_of(rows) for rows in analysis.rows.values()}
    of = "of the test split, which is opened once in each run, after its last update"
    if splits == {"validation"}:
        of = "of the validation split, as there is no test split"
    elif len(splits) > 1:
        of += "; where a pair has no test split they are of validation, and its tables say so"
    lines = [
        f"Scores are {of}; the mean over seeds has Student's 95 % interval. Each seed gives every method the same initial student "
        "and the same order of the data. A pair's teacher is one and the same for all, so intervals say nothing of another teacher.",
        f"Differences are to {plan.titles[plan.baseline]}, paired by seed. A method is called better or worse where the paired "
        "t-test, adjusted for all comparisons of the study by Holm's procedure, has p < 0.05, and once every cell has run. Permutation "
        "and Wilcoxon's tests stand beside it; with few seeds they can't become small. Where all differences are equal there is no "
        "spread for t, and the permutation test decides.",
        "Effect: the mean difference in standard deviations of the differences (d_z). P(better): the part of all pairs of runs "
        "in which the method's is the better one. Seeds needed: to show this difference at 5 % with a power of 80 %, one "
        "comparison alone. IQM: the mean of the middle half. BCa: the bootstrap's interval.",
        "Updates: all that a run makes, of helper networks too. Updates to target: by when half of the seeds had reached the baseline's "
        "mean final validation score, those that never did being later than all; known to the updates between two looks at it.",
    ]
    if plan.tuned:
        lines.append(
            "Settings are chosen for each method and pair by mean validation score over the tuning seeds, none of which is reported. The "
            "first setting tried is the method as given; the others are points of its search space, of one size for all methods, and "
            "stand in the table of what was tried. A setting whose run failed can't be chosen; its time counts as tuning."
        )
    return lines


def rank_words(analysis: Analysis, ranking: Ranking) -> str:
    """What the ranks are over, what they show, and who is not among them."""
    found, titles = ranking.ranks, analysis.plan.titles
    over = (
        f"{found.blocks} pairs"
        if ranking.pair is None
        else f"{found.blocks} seeds of {ranking.pair}, and of it alone"
    )
    test = f"Over {over}; 1 is best. Friedman's test that all are equal: p = {number(found.friedman)}."
    if found.different:
        shown = f"Average ranks further apart than {found.critical:.2f} differ at 5 % (Nemenyi)."
    else:
        shown = (
            "So no difference of ranks is shown, and Nemenyi's test, which asks which differ, is not made."
        )
    out = "; ".join(f"{titles[name]}: {why}" for name, why in ranking.left_out.items())
    return f"{test} {shown}" + (f" Not ranked: {out}." if out else "")


def failures(analysis: Analysis) -> list[tuple[str, str]]:
    """What did not run: which, and why."""
    found = [
        (f"{row.title} on {pair}", f"{row.status}: {row.reason}")
        for pair, rows in analysis.rows.items()
        for row in rows
        if row.entry.facts.refused is not None
    ]
    for one, result in analysis.failures:
        error = result["error"]
        where = f" ({error['type']} at {error['where']})" if error["where"] else ""
        found.append(
            (label(one), f"{result['status']}: {'; '.join([ended_by(result), *error['notes']])}{where}")
        )
    return found


def notes(analysis: Analysis) -> list[str]:
    """The study's remarks, and each row's."""
    return [
        *(f"Note: {remark}" for remark in analysis.remarks),
        *(
            f"Note, {row.title} on {row.entry.pair}: {remark}"
            for rows in analysis.rows.values()
            for row in rows
            for remark in row.remarks
        ),
    ]


def number(value: float | None, digits: int = 3) -> str:
    """A probability or an effect, short."""
    if value is None:
        return NONE
    if 0 < abs(value) < 10**-digits:
        return f"{value:.0e}"
    return f"{value:.{digits}f}"


def settings(values: Mapping[str, Any] | None) -> str:
    """A trial's settings on a line."""
    if values is None:
        return NONE
    return ", ".join(f"{path} = {plain(value)}" for path, value in values.items()) or "as given"


def plain(value: Any) -> str:
    """A setting's value as YAML would have it."""
    return str(value) if isinstance(value, str) else json.dumps(value)


def search(space: Mapping[str, Any]) -> str:
    """A search space on a line."""
    told = []
    for path, choices in space.items():
        if isinstance(choices, list):
            told.append(f"{path} in {', '.join(plain(choice) for choice in choices)}")
        else:
            even = ", even in the logarithm" if choices["log"] else ""
            told.append(f"{path} from {choices['low']:g} to {choices['high']:g}{even}")
    return "; ".join(told) or "nothing"


def megabytes(size: float) -> str:
    """Bytes in MB."""
    return f"{size / 1e6:,.0f}"
