"""The settings that a method's trials try: the given ones, then quasi-random points of its search space.

The points depend on the space alone, not on what was scored (as in AlgoPerf, Dahl et al. 2023, arXiv:2306.07179): all
trials can run at once, in any order, on any machine, and two methods with the same ranges try the same values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from stillhouse.errors import ConfigError
from stillhouse.study.extra import library
from stillhouse.study.schema import Range

ASKED = 64
"""Points asked for, for each that is kept: lists of few choices repeat themselves."""


def points(
    search: Mapping[str, list[Any] | Range], trials: int, method: str, key: Callable[[dict[str, Any]], str]
) -> list[dict[str, Any]]:
    """``trials`` different settings by path, the first of them none: the method as it is given.

    key
        What settings come to; two with one key are the same.

    Raises ConfigError where the space has fewer.
    """
    made: list[dict[str, Any]] = [{}]
    if trials <= 1:
        return made
    seen = {key({})}
    optuna = library("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(
            scramble=True, seed=0, warn_independent_sampling=False, warn_asynchronous_seeding=False
        )
        study = optuna.create_study(sampler=sampler)
        for _ in range(ASKED * trials):
            trial = study.ask({path: _distribution(choices) for path, choices in search.items()})
            study.tell(trial, 0.0)  # a finished trial: the sampler takes its space from it
            point = {path: _value(search[path], drawn) for path, drawn in trial.params.items()}
            if key(point) not in seen:
                seen.add(key(point))
                made.append(point)
            if len(made) == trials:
                return made
    raise ConfigError(
        f"methods.{method}.search: {len(made)} different settings with the given ones, and budget.trials is {trials}; "
        "expected as many, or fewer trials for all"
    )


def _distribution(choices: list[Any] | Range) -> Any:
    distributions = library("optuna.distributions")
    if isinstance(choices, Range):
        return distributions.FloatDistribution(choices.low, choices.high, log=choices.log)
    return distributions.IntDistribution(0, len(choices) - 1)  # by its place: quasi-random too


def _value(choices: list[Any] | Range, drawn: float) -> Any:
    """The value, a number with four digits: what is printed is what was run."""
    return float(f"{drawn:.4g}") if isinstance(choices, Range) else choices[int(drawn)]
