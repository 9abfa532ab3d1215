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


def test_wilcoxons_test_drops_noughts_and_shares_the_ranks_of_ties():
    """By hand: ranks 2, 2, 2, 4, and of 16 changes of sign 4 have 2 or less on one side; the nought changes nothing."""
    assert statistics.wilcoxon([1, 1, -1, 2]) == pytest.approx(8 / 16)
    assert statistics.wilcoxon([1, 0, 1, -1, 2]) == pytest.approx(8 / 16)
    # of Student's ten one gained nothing and two the same; all other nine gained
    assert statistics.wilcoxon(SLEEP) == pytest.approx(2 / 2**9)


class TestEqualDifferences:
    """A spread within rounding makes t infinite: Fisher's test, which needs none, decides."""

    def test_p_is_that_of_the_changes_of_sign(self):
        made = [(right + 1) / 60 - right / 60 for right in (6, 42, 50)]
        assert len(set(made)) == 3, "not equal to the last bit"
        assert statistics.paired_t(made) == pytest.approx(2 / 2**3)
        assert statistics.paired_t([-0.5] * 10) == pytest.approx(2 / 2**10)
        assert statistics.effect_size(made) is None

    def test_scores_of_float32_are_rounded_as_such(self):
        rounded = lambda right: float(np.float32(right / 597))
        made = [rounded(right + 1) - rounded(right) for right in (100, 300, 560)]
        assert not statistics.equal(made), "by themselves they are 1/597 with an error of 1e-5 of it"
        assert statistics.equal(made, largest=0.9)
        assert statistics.paired_t(made, 0.9) == pytest.approx(2 / 2**3)

    def test_a_small_spread_that_is_more_than_rounding_is_one(self):
        made = [0.01, 0.010002, 0.010004]
        assert not statistics.equal(made, largest=0.9)
        assert statistics.effect_size(made, 0.9) == pytest.approx(0.010002 / 2e-6)
        assert statistics.paired_t(made, 0.9) < 1e-6


def test_differences_of_nought_are_no_difference():
    assert statistics.paired_t([0.0] * 5) == 1.0
    assert statistics.wilcoxon([0.0] * 5) == 1.0
    assert statistics.paired_permutation([0.0] * 5) == 1.0
    assert statistics.effect_size([0.0] * 5) is None


def test_the_bca_interval_is_that_of_efron_and_tibshirani():
    low, high = statistics.bca_interval(SPATIAL, np.var, confidence=0.9)
    assert (low, high) == (pytest.approx(115.8, abs=2), pytest.approx(259.6, abs=4))
    assert statistics.bca_interval(SPATIAL, np.var, confidence=0.9) == (low, high), "made again, the same"


def test_the_bca_interval_of_a_mean_is_the_one_that_r_gives():
    """R's boot.ci with 1,000,000 resamples, as SciPy's own tests of its bootstrap have it: 32.31 to 91.43."""
    values = [10, 12, 12.5, 12.5, 13.9, 15, 21, 22, 23, 34, 50, 81, 89, 121, 134, 213]
    low, high = statistics.bca_interval(values)
    assert (low, high) == (pytest.approx(32.31, abs=1), pytest.approx(91.43, abs=1))
    assert high < 93 < np.mean(values) + 2 * (np.mean(values) - low), (
        "no symmetrical interval: it leans to the right"
    )


def test_the_bca_interval_of_equal_values_is_the_value():
    assert statistics.bca_interval([0.5] * 4) == (0.5, 0.5)


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
    assert statistics.interquartile_mean([1, 2, 3, 4, 5, 6, 7, 1000]) == 4.5
    assert statistics.interquartile_mean([0, 0, 3, 4, 5, 6, 7, 8, 100, 100]) == 5.5


def test_a_quarter_that_is_no_whole_number_of_values_takes_a_part_of_one():
    """Of 10, two and a half go at each end: (10 / 2 + 20 + 30 + 40 + 50 + 100 / 2) / 5; of 3, three quarters of one."""
    assert statistics.interquartile_mean([100, 0, 0, 10, 20, 30, 40, 50, 900, 900]) == pytest.approx(39)
    assert statistics.interquartile_mean([0, 1, 8]) == pytest.approx((0 / 4 + 1 + 8 / 4) / 1.5)
    assert statistics.interquartile_mean([1, 3, 5, 7, 9, 11, 13, 15, 17]) == pytest.approx(9)
    assert statistics.interquartile_mean([3]) == 3


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


@pytest.mark.parametrize(("effect", "needed"), [(3.26, 4), (3.27, 3), (6.98, 3), (20, 3), (-30, 3), (50, 3)])
def test_large_effects_need_three_seeds_and_no_fewer(effect, needed):
    """By the noncentral t; two are not tested at all, and statsmodels' power of nearly 1 may be nan."""
    assert statistics.seeds_needed(effect) == needed


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
    assert made.different


DIURETICS = {
    "A": [3.88, 5.64, 5.76, 4.25, 5.91, 4.33],
    "B": [30.58, 30.14, 16.92, 23.19, 26.74, 10.91],
    "C": [25.24, 33.52, 25.45, 18.85, 20.45, 26.67],
    "D": [4.44, 7.94, 4.04, 4.40, 4.23, 4.36],
    "E": [29.41, 30.72, 32.92, 28.23, 23.35, 12.00],
    "F": [38.87, 33.12, 39.15, 28.06, 38.23, 26.65],
}
"""Sachs 1997, page 675: what six people excreted after each of six diuretics; the example of R's package PMCMR."""


def test_nemenyis_p_is_the_one_that_r_prints_for_sachs_diuretics():
    made = statistics.ranks(DIURETICS)
    assert made.friedman == pytest.approx(0.0002915, abs=5e-8)
    printed = {
        "AB": 0.1880, "AC": 0.0917, "AD": 0.9996, "AE": 0.0395, "AF": 0.0016, "BC": 0.9996, "BD": 0.3388, "BE": 0.9898,
        "BF": 0.6363, "CD": 0.1880, "CE": 0.9996, "CF": 0.8200, "DE": 0.0917, "DF": 0.0052, "EF": 0.9400,
    }  # fmt: skip
    assert made.pairwise == pytest.approx({tuple(pair): p for pair, p in printed.items()}, abs=1e-4)
    # those that differ are those further apart than 4.030 / sqrt(2) * sqrt(6 * 7 / (6 * 6)) = 3.078
    assert made.critical == pytest.approx(3.078, abs=5e-4)
    apart = {(a, b) for a, b in made.pairwise if abs(made.average[a] - made.average[b]) > made.critical}
    assert apart == {("A", "E"), ("A", "F"), ("D", "F")}
    assert apart == {pair for pair, p in made.pairwise.items() if p < 0.05}


def test_ranks_need_three_methods_and_three_blocks():
    assert statistics.ranks({"a": [1, 2, 3], "b": [2, 3, 4]}) is None
    assert statistics.ranks({"a": [1, 2], "b": [2, 3], "c": [3, 4]}) is None
    equal = statistics.ranks({name: [0.5] * 4 for name in "abc"})
    assert (equal.friedman, set(equal.average.values())) == (1.0, {2.0})
    assert not equal.different


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(extra.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'stillhouse\[study\]'"):
        extra.check_installed(tuned=True)

    def absent(name, *rest):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(extra.importlib, "import_module", absent)
    with pytest.raises(MissingExtra, match="scipy"):
        statistics.mean_interval([1, 2, 3])
