"""What a method took on a pair: updates, seconds, teacher calls, memory, tuning, and how soon it reached a score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median_low
from typing import Any

from stillhouse.study.plan import Facts


@dataclass
class Cost:
    """What a method took on one pair, each the mean over its seeds where nothing else is said.

    updates
        The most that one of its runs made.
    tuning_seconds
        All of its trials together: of one that failed, the time until it did.
    updates_to_target
        Updates to the baseline's mean final validation score: the first of them by which half of the seeds had reached it,
        those that never did counting as later than all; None where fewer than half did. ``reached``: how many did.
    grid
        Updates between two looks at the validation score: ``updates_to_target`` is known to that only.
    """

    updates: int
    seconds: float
    teacher_calls: float
    peak_memory: float
    parameters: int
    tuning_seconds: float
    updates_to_target: int | None
    reached: int
    grid: int
    peak_gpu_memory: float | None = None


def cost(
    facts: Facts,
    made: Sequence[Mapping[str, Any]],
    trials: Sequence[Mapping[str, Any]],
    *,
    target: float | None,
    grid: int,
) -> Cost:
    """The cost of the finished runs ``made`` (one or more), chosen by ``trials``, finished or not."""
    first = [math.inf if target is None else _first(facts, one, target) for one in made]
    half = median_low(first)
    on_gpu = [one["peak_gpu_memory"] for one in made if one.get("peak_gpu_memory") is not None]
    return Cost(
        updates=max(one["steps"] for one in made),
        seconds=fmean(one["seconds"] for one in made),
        teacher_calls=fmean(one["teacher_calls"] for one in made),
        peak_memory=fmean(one["peak_memory"] for one in made),
        parameters=made[0]["parameters"].get("student", 0),
        tuning_seconds=sum(one.get("seconds", one["wall_seconds"]) for one in trials),
        updates_to_target=None if half == math.inf else int(half),
        reached=sum(step < math.inf for step in first),
        grid=grid,
        peak_gpu_memory=fmean(on_gpu) if on_gpu else None,
    )


def _first(facts: Facts, made: Mapping[str, Any], target: float) -> float:
    """The update of the first validation as good as the target, that of the end among them; infinity where there is none."""
    end = {"step": made["steps"], **made["scores"].get("validation", {})}
    for row in (*made["curve"], end):
        value = row.get(facts.metric)
        if value is not None and math.isfinite(value) and not facts.better(target, value):
            return int(row["step"])
    return math.inf
