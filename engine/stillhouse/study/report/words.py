"""What the report says in words and numbers, the same in every form of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stillhouse.study.analysis import Analysis, Difference, Row
from stillhouse.study.plan import Plan

NONE = "–"  # noqa: RUF001 - an en dash is how tables say nothing


def sentence(plan: Plan, row: Row) -> str:
    """A method on a pair in a sentence."""
    if row.interval is None:
        why = "" if row.reason is None else f": {row.reason}"
        return f"{row.title}, {row.status}{why}."
    name = f"{row.title} scores {row.interval}"
    if row.entry.method == plan.baseline:
        return f"{name}; the others are compared with it."
    difference, base = row.difference, plan.titles[plan.baseline]
    if difference is None:
        return f"{name}; {base} has no score to compare with."
    gap = f"{difference.interval.signed()}, paired by seed"
    if difference.verdict is None:
        return f"{name} ({gap}, to {base}); fewer than 3 seeds show nothing."
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
    lines = [
        "Scores are of the test split, which is opened once in each run, after its last update; the mean over seeds has "
        "Student's 95 % interval. Each seed gives every method the same initial student and the same order of the data. A pair's teacher "
        "is one and the same for all, so intervals say nothing of another teacher.",
        f"Differences are to {plan.titles[plan.baseline]}, paired by seed. A method is called better or worse where the paired "
        "t-test, adjusted for all comparisons of the study by Holm's procedure, has p < 0.05. Permutation and Wilcoxon's tests "
        "stand beside it; with few seeds they can't become small.",
        "Effect: the mean difference in standard deviations of the differences (d_z). P(better): the part of all pairs of runs "
        "in which the method's is the better one. Seeds needed: to show this difference at 5 % with a power of 80 %, one "
        "comparison alone. IQM: the mean of the middle half. BCa: the bootstrap's interval.",
        "Updates to target: to the baseline's mean final validation score, over the seeds that reached it.",
    ]
    if plan.tuned:
        lines.append(
            "Settings are chosen for each method and pair by mean validation score over the tuning seeds, none of which is reported. The "
            "first setting tried is the method as given; the others are quasi-random points of its search space, of one size for "
            "all methods."
        )
    return lines


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
