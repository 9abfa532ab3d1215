"""The settings that a method's trials try: the given ones, then points spread over its search space.

Numbers are quasi-random from the first point on; a list's choices come in turn, so that none is tried twice while another
was never tried. The points depend on the space and the seed alone, not on what was scored (as in AlgoPerf, Dahl et al.
2023, arXiv:2306.07179): all trials can run at once, in any order, on any machine, more trials keep those before, and two
methods with the same ranges try the same values.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from stillhouse.errors import ConfigError
from stillhouse.study.extra import library
from stillhouse.study.schema import Range

ASKED = 64
"""Points looked at, for each that is kept: two may come to the same setting."""


def points(
    search: Mapping[str, list[Any] | Range],
    trials: int,
    method: str,
    seed: int,
    key: Callable[[dict[str, Any]], str],
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
    drawn = numbers([one for one in search.values() if isinstance(one, Range)], seed)
    listed = _places({path: one for path, one in search.items() if isinstance(one, list)}, seed, key)
    for _, values, places in zip(range(ASKED * trials), drawn, listed, strict=False):
        ranged = iter(values)
        point = {
            path: next(ranged) if isinstance(one, Range) else one[places[path]]
            for path, one in search.items()
        }
        if key(point) not in seen:
            seen.add(key(point))
            made.append(point)
        if len(made) == trials:
            return made
    raise ConfigError(
        f"methods.{method}.search: {len(made)} different settings with the given ones, and budget.trials is {trials}; "
        "expected as many, or fewer trials for all"
    )


def numbers(ranges: Sequence[Range], seed: int) -> Iterator[list[float]]:
    """A scrambled Sobol sequence in the ranges; each number has four digits: what is printed is what was run.

    The sequence goes from half to half of a range as regularly as choices come in turn: its first two points, the next two,
    the next four, ... are shuffled, so that no choice is tried in one half alone.
    """
    if not ranges:
        while True:
            yield []
    optuna = library("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {
        str(number): optuna.distributions.FloatDistribution(one.low, one.high, log=one.log)
        for number, one in enumerate(ranges)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(scramble=True, seed=seed, warn_asynchronous_seeding=False)
    study = optuna.create_study(sampler=sampler)
    # The sampler takes its space from a finished trial, and draws at random where there is none.
    low = {name: one.low for name, one in space.items()}
    study.add_trial(optuna.trial.create_trial(params=low, distributions=space, value=0.0))
    order, drawn = random.Random(seed), 0  # noqa: S311 - no secret
    while True:
        part = [study.ask(space).params for _ in range(max(2, drawn))]
        drawn += len(part)
        order.shuffle(part)
        yield from ([float(f"{found[name]:.4g}") for name in space] for found in part)


def _places(
    lists: Mapping[str, list[Any]], seed: int, key: Callable[[dict[str, Any]], str]
) -> Iterator[dict[str, int]]:
    """Places in the lists by path, in an order of the seed's; where the given setting is a point of them, behind it."""
    orders, given = [], True
    for number, (path, choices) in enumerate(lists.items()):
        order = list(range(len(choices)))
        random.Random(f"{seed}/{number}").shuffle(order)  # noqa: S311 - no secret
        own = next((place for place in order if _comes_to({path: choices[place]}, key)), None)
        if own is None:
            given = False
        else:
            order.remove(own)
            order.insert(0, own)
        orders.append(order)
    turns = turns_of([len(order) for order in orders])
    if given:
        next(turns)
    for turn in turns:
        yield {path: order[place] for path, order, place in zip(lists, orders, turn, strict=True)}


def _comes_to(setting: dict[str, Any], key: Callable[[dict[str, Any]], str]) -> bool:
    """Whether the setting alone changes nothing; one that only goes with others is none."""
    try:
        return key(setting) == key({})
    except ConfigError:
        return False


def turns_of(sizes: Sequence[int]) -> Iterator[list[int]]:
    """A place in each of several lists, for ever: every list's come equally often, and no combination comes again before
    all have come.

    Each list is gone through in turn; where that would bring a combination of it and those before again, it moves on by
    one. A third list of the first's size moves on by two with each round of the first, where the second moves by one: any
    two of three lists then meet in all combinations, as in an orthogonal array.
    """
    for number in count():
        turn, combinations = [], 1
        for place, size in enumerate(sizes):
            period = math.lcm(combinations, size)
            apart = place * (number % combinations // sizes[0]) if place > 1 and size == sizes[0] else 0
            turn.append((number + apart + number // period % math.gcd(combinations, size)) % size)
            combinations *= size
        yield turn
