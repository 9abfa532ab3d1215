"""The statistics of a study, by SciPy, statsmodels and scikit-posthocs.

Everything is two-sided, at 95 % or a level of 5 %. Differences are paired: the same seed, pair and budget on both sides.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from stillhouse.study.extra import library

LEVEL = 0.05
POWER = 0.8
FEWEST = 3
"""Seeds from which on intervals and tests are given; two values make an interval that says nothing."""
RESAMPLES = 9999
PERMUTATIONS = 2**16
"""Sign changes that are tried; up to 16 seeds these are all there are, and the test is exact."""
MOST_SEEDS = 100_000
ROUNDING = 2.0**-20
"""Of the largest score: scores are often float32, with 24 bits, so differences that are spread by less are equal ones."""


@dataclass(frozen=True)
class Interval:
    """A mean, half the width of its 95 % interval (None: fewer than 3 values), and how many values it is of."""

    mean: float
    half: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")

    def signed(self) -> str:
        """With a sign, for differences."""
        return f"{self.mean:+.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and Student's t interval: ``t(0.975, n - 1) s / sqrt(n)``."""
    n = len(values)
    if n < FEWEST:
        return Interval(fmean(values), None, n)
    quantile = float(library("scipy.stats").t.ppf(1 - LEVEL / 2, n - 1))
    return Interval(fmean(values), quantile * stdev(values) / math.sqrt(n), n)


def bca_interval(
    values: Sequence[float], statistic: Callable[..., Any] = np.mean, *, confidence: float = 1 - LEVEL
) -> tuple[float, float] | None:
    """The bias-corrected and accelerated bootstrap interval (Efron 1987); None for fewer than 3 values.

    Resamples come from a fixed seed, so that a report can be made again byte for byte.
    """
    if len(values) < FEWEST:
        return None
    if len(set(values)) == 1:
        return (float(statistic(np.asarray(values))),) * 2
    made = library("scipy.stats").bootstrap(
        (np.asarray(values, dtype=float),),
        statistic,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    low, high = made.confidence_interval
    return float(low), float(high)


def interquartile_mean(values: Sequence[float]) -> float:
    """The mean of the middle half. Where a quarter of the values is no whole number, the values at both ends of the half
    count in part: of 10 values 2 are left out at each end, and the next counts half.
    """
    ordered = sorted(values)
    cut = len(ordered) / 4
    weights = [
        max(0.0, min(place + 1, len(ordered) - cut) - max(place, cut)) for place in range(len(ordered))
    ]
    return float(np.average(ordered, weights=weights))


def equal(differences: Sequence[float], largest: float | None = None) -> bool:
    """Whether the differences are the same but for rounding: no spread, so neither t nor d_z says anything.

    largest
        The largest absolute score that they were taken of; None: of the differences themselves.
    """
    scale = max(map(abs, differences)) if largest is None else largest
    return max(differences) - min(differences) <= ROUNDING * scale


def paired_t(differences: Sequence[float], largest: float | None = None) -> float:
    """P of the paired t-test. Of equal differences (see ``equal``) it is Fisher's exact p, as t would be infinite."""
    if equal(differences, largest):
        return paired_permutation([fmean(differences)] * len(differences))
    return float(library("scipy.stats").ttest_1samp(differences, 0.0).pvalue)


def paired_permutation(differences: Sequence[float]) -> float:
    """P of Fisher's test: the mean's place among those of every change of signs, or of 65,536 at random."""
    made = library("scipy.stats").permutation_test(
        (np.asarray(differences, dtype=float), np.zeros(len(differences))),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        rng=np.random.default_rng(0),
    )
    return float(made.pvalue)


def wilcoxon(differences: Sequence[float]) -> float:
    """P of the signed-rank test (Wilcoxon 1945); differences of 0 are left out, and 1 where all are 0."""
    if not any(differences):
        return 1.0
    return float(library("scipy.stats").wilcoxon(differences).pvalue)


def effect_size(differences: Sequence[float], largest: float | None = None) -> float | None:
    """Cohen's d_z: the mean difference in standard deviations of the differences.

    None for fewer than 3, and where they are equal (see ``equal``).
    """
    if len(differences) < FEWEST or equal(differences, largest):
        return None
    return fmean(differences) / stdev(differences)


def probability_of_improvement(ours: Sequence[float], others: Sequence[float]) -> float:
    """The part of all pairs in which ours is higher, ties counted half: U / (n m) (Agarwal et al. 2021)."""
    u = library("scipy.stats").mannwhitneyu(ours, others, alternative="two-sided").statistic
    return float(u) / (len(ours) * len(others))


def seeds_needed(effect: float) -> int | None:
    """How many seeds show a paired difference of this d_z at 5 % with a power of 80 %; None beyond 100,000.

    3 at least: with fewer, nothing is tested.
    """
    power = library("statsmodels.stats.power").TTestPower().power
    low, high = FEWEST, MOST_SEEDS
    if power(abs(effect), high, LEVEL) < POWER:
        return None
    # The power grows with the number of seeds; nan, which statsmodels gives for one of nearly 1, counts as enough.
    while low < high:
        middle = (low + high) // 2
        if power(abs(effect), middle, LEVEL) < POWER:
            low = middle + 1
        else:
            high = middle
    return low


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are (Holm 1979): at 5 %, one false claim in twenty studies at most."""
    if not p_values:
        return []
    adjusted = library("statsmodels.stats.multitest").multipletests(p_values, alpha=LEVEL, method="holm")[1]
    return [float(p) for p in adjusted]


@dataclass(frozen=True)
class Ranks:
    """Average ranks over blocks (1 is best) with Friedman's test and Nemenyi's critical difference.

    friedman
        p of the hypothesis that all are equal, corrected for ties.
    critical
        Two average ranks that are further apart than this differ at 5 % (Demšar 2006), where Friedman's test says that not
        all are equal.
    pairwise
        Nemenyi's p for every two methods.
    """

    average: dict[str, float]
    blocks: int
    friedman: float
    critical: float
    pairwise: dict[tuple[str, str], float]

    @property
    def different(self) -> bool:
        """Whether Friedman's test lets Nemenyi's be looked at: it is made for what differs somewhere."""
        return self.friedman < LEVEL


def ranks(scores: Mapping[str, Sequence[float]]) -> Ranks | None:
    """Ranks of methods, higher scores being better; None for fewer than 3 methods or 3 blocks.

    scores
        For each method its score in each block, the blocks in one order. Blocks have to be independent of each other.
    """
    names = list(scores)
    table = np.array([scores[name] for name in names], dtype=float).T  # (blocks, methods)
    if len(names) < 3 or len(table) < FEWEST:
        return None
    stats = library("scipy.stats")
    placed = stats.rankdata(-table, axis=1)
    blocks, methods = table.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all equal in every block: nan
        friedman = float(stats.friedmanchisquare(*table.T).pvalue)
    quantile = float(stats.studentized_range.ppf(1 - LEVEL, methods, np.inf)) / math.sqrt(2)
    nemenyi = library("scikit_posthocs").posthoc_nemenyi_friedman(table).to_numpy()
    return Ranks(
        average={name: float(placed[:, column].mean()) for column, name in enumerate(names)},
        blocks=blocks,
        friedman=1.0 if math.isnan(friedman) else friedman,
        critical=quantile * math.sqrt(methods * (methods + 1) / (6 * blocks)),
        pairwise={
            (names[i], names[j]): float(nemenyi[i, j]) for i in range(methods) for j in range(i + 1, methods)
        },
    )
