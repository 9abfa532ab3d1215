"""Features at a smaller number of positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

_POOLS: dict[str, tuple[Callable[..., Any], ...]] = {
    "mean": (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    "max": (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
}


def pooled(features: Tensor, size: Sequence[int], how: Literal["mean", "max"] = "mean") -> Tensor:
    """``(B, C, positions...)`` at ``size``, one to three axes of positions, by means or maxima of neighbours."""
    made: Tensor = _POOLS[how][len(size) - 1](features, tuple(size))
    return made


def smaller(first: Tensor, second: Tensor) -> list[int]:
    """The smaller number of positions of two features ``(B, C, positions...)``, axis by axis."""
    return [min(sizes) for sizes in zip(first.shape[2:], second.shape[2:], strict=True)]
