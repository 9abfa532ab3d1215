"""A study whose results are invented: what analysis and report make of them can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stillhouse.study.plan import Cell, Facts, Plan, cells, of_study
from stillhouse.study.schema import validate

Results = dict[str, dict[str, Any]]


def planned(
    methods: int | Sequence[str],
    pairs: Sequence[str] = ("digits",),
    *,
    seeds: int = 5,
    trials: int = 0,
    facts: Mapping[str, Any] | None = None,
    **more: Any,
) -> Plan:
    """A prepared plan; the first method is the baseline, and no two have one config.

    facts
        What preparation came to, the same for all.
    """
    names = [f"m{n}" for n in range(methods)] if isinstance(methods, int) else methods
    space = {"optimizer.lr": {"low": 0.001, "high": 0.1, "log": True}}
    content = {
        "name": "invented",
        "question": "Which is it?",
        "baseline": names[0],
        "budget": {"updates": 60, "trials": trials},
        "seeds": {"tuning": [100] if trials else [], "fresh": list(range(seeds))},
        "common": {"validate_every": 20},
        "pairs": [{"name": pair, "task": "digits", "student": "mlp"} for pair in pairs],
        "methods": {
            name: {
                "title": name.capitalize(),
                "config": {"method": "hard_labels", "optimizer": {"weight_decay": 0.01 * n}},
                **({"search": space} if trials else {}),
            }
            for n, name in enumerate(names)
        },
        **more,
    }  # fmt: skip
    plan = of_study(validate(content))
    known = {"metric": "accuracy", "metrics": ["accuracy"], **(facts or {})}
    return plan.with_facts(
        {
            (entry.method, entry.pair): Facts(**{**known, "data": {"train": entry.pair}})
            for entry in plan.entries
        }
    )


def done(one: Cell, value: float, metric: str = "accuracy", **changes: Any) -> dict[str, Any]:
    """The result of a cell that scored this on every split that it opened."""
    splits = ("validation", "test") if one.test else ("validation",)
    return {
        "digest": one.digest,
        "made_from": one.made_from,
        "started": 0.0,
        "status": "done",
        "scores": {split: {metric: value} for split in splits},
        "metric": metric,
        "steps": 60,
        "teacher_calls": 0,
        "parameters": {"student": 10},
        "seconds": 2.0,
        "wall_seconds": 3.0,
        "cpu_seconds": 3.0,
        "warnings": [],
        "curve": [{"step": 60, metric: value}],
        "peak_memory": 10**6,
        "test_opened": int(one.test),
        "chosen": {},
        "versions": {},
        "plugins": {},
        "machine": {},
        "kernel": {},
        "git": None,
        **changes,
    }


def failed(one: Cell, message: str = "loss is not finite", **changes: Any) -> dict[str, Any]:
    """The result of a cell that failed after 7 seconds."""
    error = {"type": "Diverged", "message": message, "notes": [], "where": None}
    return {
        "digest": one.digest,
        "made_from": one.made_from,
        "started": 0.0,
        "status": "failed",
        "error": error,
        "wall_seconds": 7.0,
        "cpu_seconds": 7.0,
        **changes,
    }


def results(plan: Plan, result: Callable[[Cell], dict[str, Any] | None]) -> Results:
    """A result for every cell of the study; None: it has not run."""
    found: Results = {}
    while new := [
        (one, made)
        for one in cells(plan, found)
        if one.digest not in found and (made := result(one)) is not None
    ]:
        found |= {one.digest: made for one, made in new}
    return found


def by_method(scores: Mapping[str, Sequence[float]], **more: Any) -> Callable[[Cell], dict[str, Any]]:
    """Results by method and fresh seed."""
    return lambda one: done(one, scores[one.method][one.seed], **more)
