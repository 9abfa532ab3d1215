"""Each function against a worked example whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stillhouse.errors import MissingExtra
from stillhouse.study import extra, statistics
from stillhouse.study.statistics import Interval

SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
"""Student 1908: hours of sleep that ten patients gained by one drug over another."""
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
"""Darwin 1876: crossed less self-fertilised plants, in eighths of an inch; Fisher 1935 tried all 2^15 changes of sign."""
SPATIAL = [
    48,
    36,
    20,
    29,
    42,
    42,
    20,
    42,
    22,
    41,
    45,
    14,
    6,
    0,
    33,
    28,
    34,
    4,
    32,
    24,
    47,
    41,
    24,
    26,
    30,
    41,
]
"""Efron & Tibshirani 1993, chapter 14: the A test of 26 children."""
TREES = {
    "C4.5": [.763, .599, .954, .628, .882, .936, .661, .583, .775, 1.000, .940, .619, .972, .957],
    "C4.5+m": [.768, .591, .971, .661, .888, .931, .668, .583, .838, 1.000, .962, .666, .981, .978],
    "C4.5+cf": [.771, .590, .968, .654, .886, .916, .609, .563, .866, 1.000, .965, .614, .97501, .946],
    "C4.5+m+cf": [.798, .569, .967, .657, .898, .931, .685, .625, .875, 1.000, .962, .669, .975, .970],
}  # fmt: skip
"""Demšar 2006, table 6: four settings of a decision tree on 14 data sets. Its ranks have C4.5+cf second on the last but one,
where three digits show a tie: a fifth digit says so."""


def test_the_t_interval_is_the_one_that_r_prints_for_students_sleep_data():
    made = statistics.mean_interval(SLEEP)
    assert made.mean == pytest.approx(1.58)
    assert made.mean - made.half == pytest.approx(0.7001142, abs=1e-6)
    assert made.mean + made.half == pytest.approx(2.4598858, abs=1e-6)


def test_the_paired_t_test_is_the_one_that_r_prints():
    assert statistics.paired_t(SLEEP) == pytest.approx(0.002832890, abs=1e-8)
    assert statistics.paired_t(MAIZE) == pytest.approx(0.0497, abs=5e-5)


def test_two_values_have_a_mean_and_no_interval():
    assert statistics.mean_interval([1.0, 2.0]) == Interval(1.5, None, 2)
    assert statistics.bca_interval([1.0, 2.0]) is None
    assert statistics.effect_size([1.0, 2.0]) is None


def test_fishers_permutation_test_counts_1726_of_32768_changes_of_sign():
    assert statistics.paired_permutation(MAIZE) == pytest.approx(1726 / 32768, abs=1e-12)


def test_wilcoxons_test_is_exact_on_darwins_maize():
    assert statistics.wilcoxon(MAIZE) == pytest.approx(0.04126, abs=5e-6)


def test_differences_of_nought_are_no_difference():
    assert statistics.paired_t([0.0] * 5) == 1.0
    assert statistics.wilcoxon([0.0] * 5) == 1.0
    assert statistics.paired_permutation([0.0] * 5) == 1.0
    assert statistics.effect_size([0.0] * 5) is None


def test_the_bca_interval_is_that_of_efron_and_tibshirani():
    low, high = statistics.bca_interval(SPATIAL, np.var, confidence=0.9)
    assert (low, high) == (pytest.approx(115.8, abs=2), pytest.approx(259.6, abs=4))
    assert statistics.bca_interval(SPATIAL, np.var, confidence=0.9) == (low, high), "made again, the same"


def test_the_bca_interval_of_equal_values_is_the_value():
    assert statistics.bca_interval([0.5] * 4) == (0.5, 0.5)


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
    assert statistics.interquartile_mean([1, 2, 3, 4, 5, 6, 7, 1000]) == 4.5
    assert statistics.interquartile_mean([0, 0, 3, 4, 5, 6, 7, 8, 100, 100]) == 5.5


def test_the_effect_size_is_the_mean_in_standard_deviations():
    assert statistics.effect_size(SLEEP) == pytest.approx(4.0621277 / math.sqrt(10), abs=1e-6)
    assert statistics.effect_size([1, 2, 3]) == pytest.approx(2.0)


def test_the_probability_of_improvement_counts_pairs_and_halves_ties():
    assert statistics.probability_of_improvement([3, 4], [1, 2]) == 1.0
    assert statistics.probability_of_improvement([1, 2], [1, 2]) == 0.5
    assert statistics.probability_of_improvement([2, 5, 1], [1, 4]) == pytest.approx(3.5 / 6)


@pytest.mark.parametrize(("effect", "needed"), [(0.5, 34), (0.8, 15), (1.0, 10), (-0.5, 34), (0.2, 199)])
def test_the_seeds_needed_are_those_of_the_power_tables(effect, needed):
    """Cohen 1988; the same as G*Power prints for a paired t-test at 5 % and 80 %."""
    assert statistics.seeds_needed(effect) == needed


def test_no_number_of_seeds_shows_no_difference():
    assert statistics.seeds_needed(0.0) is None
    assert statistics.seeds_needed(50.0) == 2


def test_holm_multiplies_the_smallest_by_their_number_and_never_goes_down():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert statistics.holm([]) == []


def test_ranks_are_those_of_demsars_table():
    made = statistics.ranks(TREES)
    assert made.average == pytest.approx(
        {"C4.5": 3.143, "C4.5+m": 2.000, "C4.5+cf": 2.893, "C4.5+m+cf": 1.964}, abs=5e-4
    )
    assert made.blocks == 14
    # 2.569 sqrt(4 * 5 / (6 * 14)); the paper rounds to 1.25
    assert made.critical == pytest.approx(1.2535, abs=5e-4)
    # the paper's 9.28; four ties (of 4, 2, 2 and 2) make it 9.28 / (1 - 78 / 840) = 10.23, of 3 degrees of freedom
    assert made.friedman == pytest.approx(0.0167, abs=1e-4)
    different = {pair for pair, p in made.pairwise.items() if p < 0.05}
    apart = {(a, b) for a, b in made.pairwise if abs(made.average[a] - made.average[b]) > made.critical}
    assert different == apart == set()


def test_ranks_need_three_methods_and_three_blocks():
    assert statistics.ranks({"a": [1, 2, 3], "b": [2, 3, 4]}) is None
    assert statistics.ranks({"a": [1, 2], "b": [2, 3], "c": [3, 4]}) is None
    equal = statistics.ranks({name: [0.5] * 4 for name in "abc"})
    assert (equal.friedman, set(equal.average.values())) == (1.0, {2.0})


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(extra.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'stillhouse\[study\]'"):
        extra.check_installed(tuned=True)

    def absent(name, *rest):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(extra.importlib, "import_module", absent)
    with pytest.raises(MissingExtra, match="scipy"):
        statistics.mean_interval([1, 2, 3])
