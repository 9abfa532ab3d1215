"""Means with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from stillhouse.errors import MissingExtra


@dataclass(frozen=True)
class Interval:
    """A mean, half the width of its 95 % interval (None for one value), and how many values it is of."""

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
    if n < 2:
        return Interval(fmean(values), None, n)
    try:
        from scipy.stats import t
    except ImportError:
        raise MissingExtra("an interval", "scipy", "study") from None
    return Interval(fmean(values), float(t.ppf(0.975, n - 1)) * stdev(values) / n**0.5, n)
