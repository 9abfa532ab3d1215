"""From a plan and its results to what a report says: scores, differences, ranks, tuning, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from stillhouse.study import statistics
from stillhouse.study.plan import Cell, Entry, Facts, Plan, cell, cells, chosen, score, trial_scores
from stillhouse.study.statistics import FEWEST, LEVEL, Interval, Ranks
from stillhouse.study.work import DONE, REFUSED

Results = Mapping[str, Mapping[str, Any]]
NOT_RUN = "not run"
FEW_TASKS = 5
"""Pairs from which on ranks are taken over pairs; below, over pairs and seeds."""


@dataclass
class Difference:
    """A method less the baseline on one pair, by the seeds that both have.

    higher
        Whether more is better.
    p, p_holm
        Of the paired t-test; adjusted for every comparison of the study.
    verdict
        ``better`` or ``worse`` at 5 % after the adjustment, else ``open``; None with fewer than 3 seeds.
    """

    interval: Interval
    higher: bool = True
    p: float | None = None
    p_permutation: float | None = None
    p_wilcoxon: float | None = None
    effect: float | None = None
    improvement: float | None = None
    needed: int | None = None
    p_holm: float | None = None
    verdict: str | None = None


@dataclass
class Cost:
    """What a method took on one pair, each the mean over its seeds.

    tuning_seconds
        All of its trials together.
    updates_to_target
        Updates to the baseline's mean final validation score, over the seeds that reached it; reached: how many did.
    """

    updates: int
    seconds: float
    teacher_calls: float
    peak_memory: float
    parameters: int
    tuning_seconds: float
    updates_to_target: float | None
    reached: int


@dataclass
class Row:
    """A method on a pair.

    interval
        None where there is no score; ``status`` and ``reason`` then say why.
    given, gain
        Scores with the method as it is given, and what tuning gains over them, where the study runs both.
    """

    entry: Entry
    title: str
    scores: dict[int, float]
    interval: Interval | None = None
    bca: tuple[float, float] | None = None
    interquartile: float | None = None
    difference: Difference | None = None
    cost: Cost | None = None
    settings: dict[str, Any] | None = None
    trials: list[float | None] = field(default_factory=list)
    chosen: int | None = None
    given: dict[int, float] = field(default_factory=dict)
    gain: Interval | None = None
    curve: list[tuple[int, Interval]] = field(default_factory=list)
    status: str = DONE
    reason: str | None = None
    remarks: list[str] = field(default_factory=list)


@dataclass
class Analysis:
    """All that a report shows."""

    plan: Plan
    rows: dict[str, list[Row]]
    ranks: Ranks | None
    ranked_over: str
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
    for pair, of_pair in rows.items():
        base = next(row for row in of_pair if row.entry.method == plan.baseline)
        target = _target(base, results, plan)
        for row in of_pair:
            if row.scores and row is not base and base.scores:
                row.difference = _difference(row.entry.facts.higher, row.scores, base.scores)
            if row.scores:
                row.cost = _cost(plan, row, results, target)
        _against_control(plan, pair, of_pair)
    _adjust([row.difference for of_pair in rows.values() for row in of_pair if row.difference])
    found, over = _ranks(plan, rows)
    listed = cells(plan, results)
    remarks = list(plan.remarks)
    if len(plan.fresh_seeds) < FEWEST:
        remarks.append(
            f"{len(plan.fresh_seeds)} seed{'s' * (len(plan.fresh_seeds) > 1)}: intervals and tests are withheld; "
            f"{FEWEST} or more give them"
        )
    return Analysis(
        plan=plan,
        rows=rows,
        ranks=found,
        ranked_over=over,
        provenance=[(one, results.get(one.digest)) for one in listed],
        remarks=remarks,
        complete=all(one.digest in results for one in listed),
    )


def _row(plan: Plan, entry: Entry, results: Results) -> Row:
    row = Row(entry, plan.titles[entry.method], {})
    if entry.facts.refused is not None:
        row.status, row.reason = REFUSED, entry.facts.refused
        return row
    row.trials = trial_scores(plan, entry, results)
    row.chosen = chosen(plan, entry, results)
    if row.chosen is None:
        row.status, row.reason = _why(plan, entry, results)
        return row
    row.settings = entry.trials[row.chosen].settings
    finals = {seed: cell(entry, row.chosen, seed, "final") for seed in plan.fresh_seeds}
    metric = entry.facts.metric
    for seed, one in finals.items():
        value = score(results.get(one.digest), "test", metric)
        if value is None:
            value = score(results.get(one.digest), "validation", metric) if _untested(results, one) else None
        if value is not None:
            row.scores[seed] = value
    if not row.scores:
        row.status, row.reason = _why(plan, entry, results)
        return row
    missing = [seed for seed in plan.fresh_seeds if seed not in row.scores]
    if missing:
        row.remarks.append(f"seeds {', '.join(map(str, missing))} are missing: failed, or not run yet")
    values = list(row.scores.values())
    row.interval = statistics.mean_interval(values)
    row.bca = statistics.bca_interval(values)
    row.interquartile = statistics.interquartile_mean(values)
    row.curve = _curve([results[one.digest] for one in finals.values() if one.digest in results], metric)
    if plan.defaults:
        _add_defaults(plan, row, results)
    warned = {
        warning for one in finals.values() for warning in results.get(one.digest, {}).get("warnings", [])
    }
    row.remarks += sorted(warned)[:1]
    return row


def _untested(results: Results, one: Cell) -> bool:
    """Whether the cell's task has no test split: validation is all there is."""
    found = results.get(one.digest)
    return found is not None and found["status"] == DONE and "test" not in found["scores"]


def _why(plan: Plan, entry: Entry, results: Results) -> tuple[str, str | None]:
    """Why there is no score: the status and the error of the first cell that has one."""
    for one in cells(plan.model_copy(update={"entries": [entry]}), results):
        found = results.get(one.digest)
        if found is not None and found["status"] != DONE:
            return str(found["status"]), str(found["error"]["message"])
    return NOT_RUN, None


def _add_defaults(plan: Plan, row: Row, results: Results) -> None:
    for seed in plan.fresh_seeds:
        one = cell(row.entry, 0, seed, "default")
        value = score(results.get(one.digest), "test", row.entry.facts.metric)
        if value is not None:
            row.given[seed] = value
    both = [seed for seed in row.scores if seed in row.given]
    if both:
        row.gain = statistics.mean_interval([row.scores[seed] - row.given[seed] for seed in both])


def _difference(higher: bool, ours: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    both = [seed for seed in ours if seed in base]
    if not both:
        return None
    values = [ours[seed] - base[seed] for seed in both]
    made = Difference(statistics.mean_interval(values), higher)
    if len(both) < FEWEST:
        return made
    mine, its = [ours[seed] for seed in both], [base[seed] for seed in both]
    made.p = statistics.paired_t(values)
    made.p_permutation = statistics.paired_permutation(values)
    made.p_wilcoxon = statistics.wilcoxon(values)
    made.effect = statistics.effect_size(values)
    better = (mine, its) if higher else (its, mine)
    made.improvement = statistics.probability_of_improvement(*better)
    made.needed = None if made.effect is None else statistics.seeds_needed(made.effect)
    return made


def _adjust(differences: Sequence[Difference]) -> None:
    tested = [one for one in differences if one.p is not None]
    for one, adjusted in zip(
        tested, statistics.holm([one.p for one in tested if one.p is not None]), strict=True
    ):
        one.p_holm = adjusted
        if adjusted >= LEVEL:
            one.verdict = "open"
        else:
            one.verdict = "better" if (one.interval.mean > 0) == one.higher else "worse"


def _target(base: Row, results: Results, plan: Plan) -> float | None:
    """The baseline's mean final validation score: what others may reach sooner."""
    if base.chosen is None:
        return None
    made = [results.get(cell(base.entry, base.chosen, seed, "final").digest) for seed in plan.fresh_seeds]
    values = [score(one, "validation", base.entry.facts.metric) for one in made]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _cost(plan: Plan, row: Row, results: Results, target: float | None) -> Cost:
    assert row.chosen is not None
    made = [results[cell(row.entry, row.chosen, seed, "final").digest] for seed in row.scores]
    first = [] if target is None else [_first(row.entry.facts, one["curve"], target) for one in made]
    reached = [step for step in first if step is not None]
    trials = [
        results.get(cell(row.entry, number, seed, "tuning").digest, {}).get("seconds", 0.0)
        for number in range(len(row.entry.trials) if plan.tuned else 0)
        for seed in plan.tuning_seeds
    ]
    return Cost(
        updates=made[0]["steps"],
        seconds=fmean(one["seconds"] for one in made),
        teacher_calls=fmean(one["teacher_calls"] for one in made),
        peak_memory=fmean(one["peak_memory"] for one in made),
        parameters=made[0]["parameters"].get("student", 0),
        tuning_seconds=sum(trials),
        updates_to_target=fmean(reached) if reached else None,
        reached=len(reached),
    )


def _first(facts: Facts, curve: Sequence[Mapping[str, Any]], target: float) -> int | None:
    for row in curve:
        if row.get(facts.metric) is not None and not facts.better(target, row[facts.metric]):
            return int(row["step"])
    return None


def _curve(made: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[int, Interval]]:
    by_step: dict[int, list[float]] = {}
    for one in made:
        for row in one.get("curve", []):
            by_step.setdefault(row["step"], []).append(row[metric])
    return [(step, statistics.mean_interval(values)) for step, values in sorted(by_step.items())]


def _against_control(plan: Plan, pair: str, rows: Sequence[Row]) -> None:
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


def _ranks(plan: Plan, rows: Mapping[str, Sequence[Row]]) -> tuple[Ranks | None, str]:
    """Ranks of the methods that every pair has, over pairs, or over pairs and seeds where pairs are few."""
    everywhere = [
        name
        for number, name in enumerate(plan.titles)
        if all(len(of_pair[number].scores) == len(plan.fresh_seeds) for of_pair in rows.values())
    ]
    table: dict[str, list[float]] = {}
    by_name = {name: number for number, name in enumerate(plan.titles)}
    over = "pairs" if len(plan.pairs) >= FEW_TASKS else "pairs and seeds"
    for name in everywhere:
        found = [of_pair[by_name[name]] for of_pair in rows.values()]
        signed = [
            [(1 if row.entry.facts.higher else -1) * row.scores[seed] for seed in plan.fresh_seeds]
            for row in found
        ]
        table[name] = (
            [fmean(scores) for scores in signed]
            if over == "pairs"
            else [one for scores in signed for one in scores]
        )
    return (statistics.ranks(table) if len(plan.fresh_seeds) >= FEWEST else None), over
