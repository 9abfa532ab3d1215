"""The study against itself: how often it claims what is not there, and finds what is, on real per-seed results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
from invented import by_method, planned, results

from stillhouse.study.analysis import analyse
from stillhouse.study.differences import difference, judge
from stillhouse.study.statistics import library

POOL = json.loads(Path(__file__).with_name("real_scores.json").read_text())["scores"]
SEEDS = 10
STUDIES = 2000
"""Ten times 200. Where 5 % is true, the part found has a standard deviation of 0.5 %: 3 and 7 % are four of them away."""


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """statsmodels collects garbage in every multipletests."""
    monkeypatch.setattr("gc.collect", lambda: 0)


def drawn(studies: int, twins: int, planted: float = 0.0) -> Iterator[list[dict[int, float]]]:
    """For each simulated study the scores by seed of the baseline, and of ``twins`` methods that are it under other names.

    Every method draws ten fresh seeds of its own from 200 real runs; ``planted`` is added to the twins' scores.
    """
    draw = np.random.default_rng(0)
    for _ in range(studies):
        made = draw.permutation(POOL)[: SEEDS * (1 + twins)].reshape(1 + twins, SEEDS)
        made[1:] += planted
        yield [dict(enumerate(row.tolist())) for row in made]


def verdicts(scores: list[dict[int, float]]) -> list[str | None]:
    """What the study says of each twin, by the two functions that decide it."""
    made = [difference(True, ours, scores[0]) for ours in scores[1:]]
    judge(made)
    return [one.verdict for one in made]


@pytest.mark.parametrize("twins", [1, 3])
def test_a_method_against_itself_is_called_different_in_one_study_of_twenty(twins):
    false = sum(set(verdicts(scores)) != {"open"} for scores in drawn(STUDIES, twins))
    assert 0.03 * STUDIES <= false <= 0.07 * STUDIES


def test_a_planted_difference_is_found_as_often_as_theory_says():
    """One standard deviation of the paired differences, which is sqrt(2) of the scores'."""
    planted = math.sqrt(2) * stdev(POOL)
    found = sum(verdicts(scores) == ["better"] for scores in drawn(STUDIES, 1, planted))
    power = library("statsmodels.stats.power").TTestPower().power(1.0, SEEDS, 0.05)
    assert power == pytest.approx(0.803, abs=1e-3)
    assert abs(found / STUDIES - power) < 2.5 * math.sqrt(power * (1 - power) / STUDIES)


def test_the_whole_analysis_says_what_the_simulated_studies_do():
    plan = planned(5, seeds=SEEDS)
    said = set()
    for scores in drawn(3, 4, planted=0.02):
        made = analyse(plan, results(plan, by_method(dict(zip(plan.titles, scores, strict=True)))))
        whole = [row.difference.verdict for row in made.rows["digits"][1:]]
        assert whole == verdicts(scores)
        said |= set(whole)
    assert said == {"open", "better"}, "both are there to be mistaken"
