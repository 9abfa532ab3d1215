"""A method less the baseline, paired by seed: what the difference is, and whether the study may claim it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stillhouse.study import statistics
from stillhouse.study.statistics import FEWEST, LEVEL, Interval


@dataclass
class Difference:
    """A method less the baseline on one pair, by the seeds that both have.

    higher
        Whether more is better.
    p, p_holm
        Of the paired t-test (equal differences: of Fisher's exact test); adjusted for every comparison of the study.
    equal
        Whether the differences are one and the same but for rounding: then there is neither interval nor effect size.
    verdict
        ``better`` or ``worse`` at 5 % after the adjustment, else ``open``; None with fewer than 3 seeds, and until every
        cell of the study has run.
    """

    interval: Interval
    higher: bool = True
    p: float | None = None
    p_permutation: float | None = None
    p_wilcoxon: float | None = None
    effect: float | None = None
    improvement: float | None = None
    needed: int | None = None
    equal: bool = False
    p_holm: float | None = None
    verdict: str | None = None


def difference(higher: bool, ours: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """The mean difference, its interval and its p, of finite scores by seed; None where no seed is in both."""
    values, largest = _paired(ours, base)
    if not values:
        return None
    made = Difference(statistics.mean_interval(values), higher)
    if len(values) >= FEWEST:
        made.equal = statistics.equal(values, largest)
        if made.equal:  # nought wide, while the permutations may well say that so few show nothing
            made.interval = Interval(made.interval.mean, None, len(values))
        made.p = statistics.paired_t(values, largest)
    return made


def describe(made: Difference, ours: Mapping[int, float], base: Mapping[int, float]) -> None:
    """Add what stands beside the test and decides nothing: further tests, effect, seeds needed."""
    values, largest = _paired(ours, base)
    if len(values) < FEWEST:
        return
    both = [seed for seed in ours if seed in base]
    mine, its = [ours[seed] for seed in both], [base[seed] for seed in both]
    made.p_permutation = statistics.paired_permutation(values)
    made.p_wilcoxon = statistics.wilcoxon(values)
    made.effect = statistics.effect_size(values, largest)
    made.improvement = statistics.probability_of_improvement(*((mine, its) if made.higher else (its, mine)))
    made.needed = None if made.effect is None else statistics.seeds_needed(made.effect)


def judge(differences: Sequence[Difference]) -> None:
    """Give each its adjusted p and its verdict. These have to be all the comparisons of a study that is complete: p-values
    that are looked at before the last has come would be adjusted for too few.
    """
    tested = [(one, one.p) for one in differences if one.p is not None]
    for (one, _), adjusted in zip(tested, statistics.holm([p for _, p in tested]), strict=True):
        one.p_holm = adjusted
        if adjusted >= LEVEL:
            one.verdict = "open"
        else:
            one.verdict = "better" if (one.interval.mean > 0) == one.higher else "worse"


def _paired(ours: Mapping[int, float], base: Mapping[int, float]) -> tuple[list[float], float]:
    """The differences by seed, and the largest absolute score of those seeds."""
    both = [seed for seed in ours if seed in base]
    return [ours[seed] - base[seed] for seed in both], max(
        (abs(scores[seed]) for scores in (ours, base) for seed in both), default=0.0
    )
