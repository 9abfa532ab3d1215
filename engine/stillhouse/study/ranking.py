"""Average ranks of a study's methods: over pairs where there are enough of them, else over the seeds of each pair.

Seeds of one pair are independent of each other, and so are pairs; seeds of several pairs together are neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from stillhouse.study import statistics
from stillhouse.study.statistics import FEWEST, Ranks

FEW_TASKS = 5
"""Pairs from which on ranks are taken over pairs."""


@dataclass(frozen=True)
class Scored:
    """A method's scores by seed on a pair; ``higher``: whether more is better; ``why``: what it lacks them for."""

    scores: Mapping[int, float]
    higher: bool
    why: str | None = None


@dataclass(frozen=True)
class Ranking:
    """Ranks over independent blocks.

    pair
        Whose seeds the blocks are; None: the blocks are the study's pairs, each with the mean over its seeds.
    left_out
        Methods without a score in every block, each with the reason.
    """

    pair: str | None
    ranks: Ranks
    left_out: dict[str, str]


def rankings(scored: Mapping[str, Mapping[str, Scored]], seeds: Sequence[int]) -> list[Ranking]:
    """The rankings that the scores allow.

    scored
        By pair, then by method: every method on every pair.
    """
    if len(seeds) < FEWEST:
        return []
    if len(scored) >= FEW_TASKS:
        found = [_ranking(None, scored, seeds)]
    else:
        found = [_ranking(pair, {pair: of_pair}, seeds) for pair, of_pair in scored.items()]
    return [one for one in found if one is not None]


def _ranking(
    pair: str | None, scored: Mapping[str, Mapping[str, Scored]], seeds: Sequence[int]
) -> Ranking | None:
    table: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}
    for method in next(iter(scored.values())):
        blocks: list[float] = []
        for name, of_pair in scored.items():
            one = of_pair[method]
            missing = [str(seed) for seed in seeds if seed not in one.scores]
            if missing:
                what = one.why or f"no score of seed{'s' * (len(missing) > 1)} {', '.join(missing)}"
                left_out[method] = what if pair else f"{what} on {name}"
                break
            signed = [one.scores[seed] * (1 if one.higher else -1) for seed in seeds]
            blocks += signed if pair else [fmean(signed)]
        else:
            table[method] = blocks
    made = statistics.ranks(table)
    return None if made is None else Ranking(pair, made, left_out)
