"""What trials try: numbers spread from the first on, choices in turn, the same for methods with the same ranges."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from math import prod

import pytest

from stillhouse.errors import ConfigError
from stillhouse.study.plan import of_study
from stillhouse.study.schema import Range, read
from stillhouse.study.space import numbers, points, turns_of

RATES = Range(low=0.002, high=0.06, log=True)


def tried(search, trials, given=None, seed=100):
    """The settings of a method that is given as ``given``."""
    whole = lambda one: json.dumps({**(given or {}), **one}, sort_keys=True)
    return points(search, trials, "m", seed, whole)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("trials", [3, 4, 7, 10])
def test_no_choice_is_tried_twice_while_another_never_was(seed, trials):
    for given in ({"t": 4}, {"t": 5}):
        made = tried({"lr": RATES, "t": [2, 4, 8]}, trials, given, seed)
        assert made[0] == {}
        counts = Counter({**given, **one}["t"] for one in made)
        spread = [counts[choice] for choice in (2, 4, 8)]
        assert max(spread) - min(spread) <= 1
    assert len({json.dumps(one) for one in made}) == trials


def test_methods_with_the_same_ranges_try_the_same_numbers_whatever_their_lists():
    lists = [{"t": [2, 4, 8]}, {"amount": [0.1, 0.3]}, {}]
    rates = [[one["lr"] for one in tried({"lr": RATES, **listed}, 5, {"t": 4})[1:]] for listed in lists]
    assert rates[0] == rates[1] == rates[2]
    shipped = of_study(read("mnist1d", quick=True))
    assert len({entry.trials[1].settings["optimizer.lr"] for entry in shipped.entries}) == 1


@pytest.mark.parametrize("seed", range(8))
def test_numbers_are_spread_from_the_first_on(seed):
    """Of the first 2, 4, 8, ... one is in each half, quarter, eighth of the range."""
    found = [one for (one,) in islice(numbers([Range(low=0, high=1)], seed), 16)]
    for size in (2, 4, 8, 16):
        assert {int(size * one) for one in found[:size]} == set(range(size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_list_is_not_in_step_with_the_halves_of_a_range(size):
    made = tried({"lr": Range(low=0, high=1), "t": list(range(size))}, 16 * size + 1)[1:]
    for choice in range(size):
        low = sum(one["lr"] < 0.5 for one in made if one["t"] == choice)
        assert 5 <= low <= 11, "of 16"


@pytest.mark.parametrize("sizes", [(3,), (2, 4), (3, 3), (4, 6, 3), (5, 2, 4)])
def test_every_combination_comes_before_any_comes_again_and_each_list_stays_balanced(sizes):
    every = [tuple(turn) for turn in islice(turns_of(sizes), 2 * prod(sizes))]
    assert len(set(every[: prod(sizes)])) == len(set(every[prod(sizes) :])) == prod(sizes)
    for upto in range(1, len(every)):
        for place, size in enumerate(sizes):
            counts = Counter(turn[place] for turn in every[:upto])
            assert max(counts.values()) - min(counts[one] for one in range(size)) <= 1


def test_more_trials_keep_those_before_and_another_seed_gives_others():
    search = {"lr": RATES, "t": [2, 4, 8], "w": [1, 2]}
    assert tried(search, 9)[:4] == tried(search, 4)
    assert tried(search, 4) != tried(search, 4, seed=101)


def test_a_whole_grid_is_tried_and_no_more():
    search = {"t": [2, 4, 8], "w": [1, 2]}
    assert len(tried(search, 6, {"t": 2, "w": 2})) == 6
    with pytest.raises(ConfigError, match="6 different settings with the given ones"):
        tried(search, 7, {"t": 2, "w": 2})


def test_any_two_of_three_lists_meet_in_all_combinations():
    first = list(islice(turns_of([3, 3, 3]), 9))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert len({(turn[one], turn[other]) for turn in first}) == 9
