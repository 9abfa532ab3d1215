"""The study against itself: how often it claims what is not there, and finds what is, on real per-seed results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
from small_study import small

from stillhouse.study import statistics
from stillhouse.study.analysis import _adjust, _difference
from stillhouse.study.plan import of_study
from stillhouse.study.schema import validate
from stillhouse.study.statistics import library

POOL = json.loads(Path(__file__).with_name("real_scores.json").read_text())["scores"]
STUDIES, SEEDS = 200, 10


@pytest.fixture(autouse=True)
def _the_test_that_claims_alone(monkeypatch):
    """What stands beside it takes most of the time, and enters no claim."""
    for name in ("paired_permutation", "wilcoxon", "seeds_needed", "probability_of_improvement"):
        monkeypatch.setattr(statistics, name, lambda *given: None)
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels does it in every multipletests


@pytest.fixture(scope="module")
def plan():
    content = small(budget={"updates": 1}, seeds={"fresh": list(range(SEEDS))})
    for method in content["methods"].values():
        del method["search"]
    return of_study(validate(content))


def verdicts(plan, twins: int, planted: float = 0.0) -> list[set[str]]:
    """What each simulated study says of ``twins`` methods that are the baseline under other names.

    Every method draws ten fresh seeds of its own from 200 real runs; ``planted`` is added to the twins' scores.
    """
    draw = np.random.default_rng(0)
    found = []
    for _ in range(STUDIES):
        drawn = draw.permutation(POOL)[: SEEDS * (1 + twins)].reshape(1 + twins, SEEDS)
        drawn[1:] += planted
        scores = [dict(enumerate(row.tolist())) for row in drawn]
        differences = [_difference(True, ours, scores[0]) for ours in scores[1:]]
        _adjust(differences)
        found.append({one.verdict for one in differences})
    return found


@pytest.mark.parametrize("twins", [1, 4])
def test_a_method_against_itself_is_called_different_in_one_study_of_twenty(plan, twins):
    false = sum(bool(said - {"open"}) for said in verdicts(plan, twins))
    assert 0.03 * STUDIES <= false <= 0.07 * STUDIES


def test_a_planted_difference_is_found_as_often_as_theory_says(plan):
    """One standard deviation of the paired differences, which is sqrt(2) of the scores'."""
    found = sum("better" in said for said in verdicts(plan, 1, planted=math.sqrt(2) * stdev(POOL)))
    power = library("statsmodels.stats.power").TTestPower().power(1.0, SEEDS, 0.05)
    assert power == pytest.approx(0.803, abs=1e-3)
    assert abs(found / STUDIES - power) < 2.5 * math.sqrt(power * (1 - power) / STUDIES)
