"""From a plan and its results to what a report says: scores, differences, ranks, tuning, cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from stillhouse.study import statistics
from stillhouse.study.costs import Cost, cost
from stillhouse.study.differences import Difference, describe, difference, judge
from stillhouse.study.plan import Cell, Entry, Plan, cell, cells, chosen, ended_by, trial_scores
from stillhouse.study.ranking import Ranking, Scored, rankings
from stillhouse.study.statistics import FEWEST, Interval
from stillhouse.study.work import DONE

Results = Mapping[str, Mapping[str, Any]]
NOT_RUN, NO_SCORE = "not run", "no score"
WARNINGS = 3
"""Different warnings of a method's runs that are told; the others are counted."""


@dataclass
class Row:
    """A method on a pair.

    scores
        By fresh seed; a score that is not finite is none.
    split
        What the scores are of: ``test``, or ``validation`` where the task has no test split.
    interval
        None where there is no score; ``status`` and ``reason`` then say why.
    trials, lost
        Each tried setting's mean validation score; why one has none, where its cells have run.
    given, gain
        Scores with the method as it is given, and what tuning gains over them, where the study runs both.
    """

    entry: Entry
    title: str
    scores: dict[int, float]
    split: str = "test"
    interval: Interval | None = None
    bca: tuple[float, float] | None = None
    interquartile: float | None = None
    difference: Difference | None = None
    cost: Cost | None = None
    settings: dict[str, Any] | None = None
    trials: list[float | None] = field(default_factory=list)
    lost: dict[int, str] = field(default_factory=dict)
    chosen: int | None = None
    given: dict[int, float] = field(default_factory=dict)
    gain: Interval | None = None
    curve: list[tuple[int, Interval]] = field(default_factory=list)
    status: str = DONE
    reason: str | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The method's key in the study's file."""
        return self.entry.method


@dataclass
class Analysis:
    """All that a report shows.

    complete
        Whether every cell has run. Until then there are no verdicts and no ranks.
    """

    plan: Plan
    rows: dict[str, list[Row]]
    rankings: list[Ranking]
    provenance: list[tuple[Cell, Mapping[str, Any] | None]]
    remarks: list[str]
    complete: bool

    @property
    def failures(self) -> list[tuple[Cell, Mapping[str, Any]]]:
        """The cells that gave no figures, each with its result."""
        return [
            (one, found) for one, found in self.provenance if found is not None and found["status"] != DONE
        ]


def analyse(plan: Plan, results: Results) -> Analysis:
    """Everything that can be said of the results so far."""
    rows = {
        pair: [_row(plan, plan.entry(name, pair), results) for name in plan.titles] for pair in plan.pairs
    }
    for of_pair in rows.values():
        base = next(row for row in of_pair if row.method == plan.baseline)
        target = _target(base, results, plan)
        for row in of_pair:
            if row.scores and row is not base and base.scores:
                row.difference = _difference(row, base)
            if row.scores:
                row.cost = _cost(plan, row, results, target)
        _against_control(of_pair)
    listed = cells(plan, results)
    complete = all(_answered(results.get(one.digest)) for one in listed)
    if complete:
        judge([row.difference for of_pair in rows.values() for row in of_pair if row.difference])
    return Analysis(
        plan=plan,
        rows=rows,
        rankings=rankings(_scored(rows), plan.fresh_seeds) if complete else [],
        provenance=[(one, results.get(one.digest)) for one in listed],
        remarks=[*plan.remarks, *_remarks(plan, rows)],
        complete=complete,
    )


def _answered(result: Mapping[str, Any] | None) -> bool:
    """Whether the cell has had its turn; one that was lost, and not by its own fault, is to run again."""
    return result is not None and not result.get("again", False)


def _remarks(plan: Plan, rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """What a reader has to know of the study as a whole."""
    found = []
    if len(plan.fresh_seeds) < FEWEST:
        found.append(
            f"{_seeds(plan.fresh_seeds, count=True)}: intervals and tests are withheld; {FEWEST} or more give them"
        )
    others = [
        f"{row.title} on {pair} {row.cost.updates:,}"
        for pair, of_pair in rows.items()
        for row in of_pair
        if row.cost is not None and row.cost.updates != plan.updates
    ]
    if others:
        found.append(f"not every run made {plan.updates:,} updates: {', '.join(others)}")
    untested = [pair for pair, of_pair in rows.items() if split_of(of_pair) == "validation"]
    if untested:
        chose = ", which also chose the settings" if plan.tuned else ""
        found.append(f"{', '.join(untested)}: no test split, so scores are of validation{chose}")
    return found


def split_of(rows: Iterable[Row]) -> str:
    """The split that the scores of a pair's rows are of."""
    return next((row.split for row in rows if row.scores), "test")


def _seeds(seeds: Sequence[int], *, count: bool = False) -> str:
    many = "s" * (len(seeds) > 1)
    return f"{len(seeds)} seed{many}" if count else f"seed{many} {', '.join(map(str, seeds))}"


def _row(plan: Plan, entry: Entry, results: Results) -> Row:
    row = Row(entry, plan.titles[entry.method], {})
    if entry.facts.refused is not None:
        row.status, row.reason = entry.facts.status, entry.facts.refused
        return row
    row.trials = [_finite(value) for value in trial_scores(plan, entry, results)]
    row.lost = _lost(plan, row, results)
    row.remarks += [f"trial {trial} could not be chosen: {why}" for trial, why in row.lost.items()]
    row.chosen = chosen(plan, entry, results)
    if row.chosen is None:
        row.status, row.reason = _why(plan, entry, results)
        return row
    row.settings = entry.trials[row.chosen].settings
    made = _made(plan, row, results, row.chosen, "final")
    metric = entry.facts.metric
    row.split = "test" if not made or any("test" in one["scores"] for one in made.values()) else "validation"
    odd = _add_scores(row.scores, made, row.split, metric)
    if not row.scores:
        row.status, row.reason = (NO_SCORE, odd) if odd else _why(plan, entry, results)
        return row
    if odd:
        row.remarks.append(f"{odd}, which counts as no score")
    missing = [seed for seed in plan.fresh_seeds if seed not in made]
    if missing:
        row.remarks.append(
            f"{_seeds(missing)} {'are' if len(missing) > 1 else 'is'} missing: failed, or not run yet"
        )
    _describe(row, list(made.values()))
    if plan.defaults:
        _add_scores(row.given, _made(plan, row, results, 0, "default"), row.split, metric)
        both = [seed for seed in row.scores if seed in row.given]
        if both:
            row.gain = statistics.mean_interval([row.scores[seed] - row.given[seed] for seed in both])
    row.remarks += _warnings(made)
    return row


def _describe(row: Row, made: Sequence[Mapping[str, Any]]) -> None:
    values = list(row.scores.values())
    row.interval = statistics.mean_interval(values)
    row.bca = statistics.bca_interval(values)
    row.interquartile = statistics.interquartile_mean(values)
    row.curve = _curve(made, row.entry.facts.metric)


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _made(plan: Plan, row: Row, results: Results, trial: int, phase: Any) -> dict[int, Mapping[str, Any]]:
    """The finished cells of the setting, by fresh seed."""
    found = {seed: results.get(cell(row.entry, trial, seed, phase).digest) for seed in plan.fresh_seeds}
    return {seed: one for seed, one in found.items() if one is not None and one["status"] == DONE}


def _add_scores(
    scores: dict[int, float], made: Mapping[int, Mapping[str, Any]], split: str, metric: str
) -> str | None:
    """Add the finite scores by seed; what the others are, or None where there are no others."""
    odd: dict[str, list[int]] = {}
    for seed, one in made.items():
        value = one["scores"].get(split, {}).get(metric)
        finite = _finite(value)
        if finite is not None:
            scores[seed] = finite
        else:
            odd.setdefault("not there" if value is None else str(value), []).append(seed)
    told = [f"{split} {metric} is {what} for {_seeds(seeds)}" for what, seeds in odd.items()]
    return "; ".join(told) or None


def _lost(plan: Plan, row: Row, results: Results) -> dict[int, str]:
    """Why a trial has no score, of those whose cells have ended."""
    found = {}
    for trial, value in enumerate(row.trials):
        ended = [results.get(cell(row.entry, trial, seed, "tuning").digest) for seed in plan.tuning_seeds]
        if value is not None or any(one is None for one in ended):
            continue
        bad = next((one for one in ended if one is not None and one["status"] != DONE), None)
        found[trial] = (
            f"validation {row.entry.facts.metric} is not finite"
            if bad is None
            else f"{bad['status']}: {ended_by(bad).splitlines()[0]}"
        )
    return found


def _warnings(made: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Each different warning of the runs with the seeds that it is of."""
    by_text: dict[str, list[int]] = {}
    for seed, one in made.items():
        for warning in one.get("warnings", []):
            by_text.setdefault(warning, []).append(seed)
    told = [
        warning if len(set(seeds)) == len(made) else f"{warning} ({_seeds(sorted(set(seeds)))})"
        for warning, seeds in sorted(by_text.items())
    ]
    more = len(told) - WARNINGS
    return told if more <= 0 else [*told[:WARNINGS], f"{more} more warnings, in the cells' logs"]


def _why(plan: Plan, entry: Entry, results: Results) -> tuple[str, str | None]:
    """Why there is no score: the status and the error of the first cell that has one."""
    for one in cells(plan.model_copy(update={"entries": [entry]}), results):
        found = results.get(one.digest)
        if found is not None and found["status"] != DONE:
            return str(found["status"]), ended_by(found)
    return NOT_RUN, None


def _difference(row: Row, base: Row) -> Difference | None:
    made = difference(row.entry.facts.higher, row.scores, base.scores)
    if made is not None:
        describe(made, row.scores, base.scores)
        if made.equal and made.interval.mean:
            row.remarks.append(
                "the difference is the same for every seed: its p is the permutation test's, and it has no interval or effect size"
            )
    return made


def _target(base: Row, results: Results, plan: Plan) -> float | None:
    """The baseline's mean final validation score: what others may reach sooner."""
    if base.chosen is None:
        return None
    scores: dict[int, float] = {}
    made = _made(plan, base, results, base.chosen, "final")
    _add_scores(scores, made, "validation", base.entry.facts.metric)
    return fmean(scores.values()) if scores else None


def _cost(plan: Plan, row: Row, results: Results, target: float | None) -> Cost:
    assert row.chosen is not None
    made = _made(plan, row, results, row.chosen, "final")
    tuning = [
        results.get(cell(row.entry, trial, seed, "tuning").digest)
        for trial in range(len(row.entry.trials) if plan.tuned else 0)
        for seed in plan.tuning_seeds
    ]
    return cost(
        row.entry.facts,
        [made[seed] for seed in row.scores],
        [one for one in tuning if one is not None],
        target=target,
        grid=row.entry.trials[row.chosen].config["validate_every"],
    )


def _curve(made: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[int, Interval]]:
    by_step: dict[int, list[float]] = {}
    for one in made:
        for row in one.get("curve", []):
            value = _finite(row.get(metric))
            if value is not None:
                by_step.setdefault(row["step"], []).append(value)
    return [(step, statistics.mean_interval(values)) for step, values in sorted(by_step.items())]


def _against_control(rows: Sequence[Row]) -> None:
    """Remark a teacher that is no better than what the labels alone give."""
    controls = [row for row in rows if row.entry.facts.teacher is None and row.curve]
    if not controls:
        return
    control = max(controls, key=lambda row: row.curve[-1][1].mean * (1 if row.entry.facts.higher else -1))
    level = control.curve[-1][1].mean
    for row in rows:
        metric = row.entry.facts.metric
        teacher = row.entry.facts.teacher_scores.get(metric)
        if row.scores and teacher is not None and not row.entry.facts.better(teacher, level):
            row.remarks.append(
                f"the teacher's validation {metric} ({teacher:.3f}) is no better than that of {control.title} "
                f"({level:.3f}): distilling from it can be expected to hurt"
            )


def _scored(rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Scored]]:
    return {
        pair: {
            row.method: Scored(row.scores, row.entry.facts.higher, None if row.scores else row.status)
            for row in of_pair
        }
        for pair, of_pair in rows.items()
    }
