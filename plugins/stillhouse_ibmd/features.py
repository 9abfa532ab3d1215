"""Features as rows of numbers: one for each row of the models' outputs."""

from __future__ import annotations

import math

from torch import Tensor

from stillhouse.api import Batch, ConfigError, Feature, FeaturePair, TaskKind, kept


def both(pair: FeaturePair) -> tuple[Feature, Feature]:
    """The teacher's and the student's."""
    return pair.teacher, pair.student


def rows_of(logits: Tensor, kind: TaskKind) -> tuple[int, ...]:
    """The shape of the rows of a model's outputs ``(*rows, C)``; of numbers ``(B,)`` it is ``(B,)``."""
    numbers = kind.labels == "numbers" and logits.dim() == 1
    return tuple(logits.shape if numbers else logits.shape[:-1])


def check_rows(side: Feature, rows: tuple[int, ...]) -> None:
    """Raise ConfigError where the feature has no vector for each row of the outputs."""
    if side.shape[0] == rows[0] and (len(rows) == 1 or _positions(side) == rows[1:]):
        return
    raise ConfigError(
        f"{side.role}.{side.name} gives shape {side.shape}, which can't be projected; expected {(*rows, '...')}, a row "
        f"for each of the outputs' rows {rows}: name another module under layers"
    )


def width_of(side: Feature, rows: tuple[int, ...]) -> int:
    """Numbers a row: those of a token or position; where a row is a sample, all that it has."""
    return side.width if side.tokens or len(rows) > 1 else math.prod(side.shape[1:])


def as_rows(value: Tensor, side: Feature, rows: tuple[int, ...], batch: Batch) -> Tensor:
    """The feature as ``(*rows, width)``; zeros in the rows that don't count."""
    if len(rows) == 1:
        flat = side.pooled(value, batch)
    else:
        flat = kept(value if side.tokens else value.movedim(1, -1), batch.mask)
    if flat.shape[:-1] != rows or flat.shape[-1] != width_of(side, rows):
        raise ConfigError(
            f"{side.role}.{side.name} gave {tuple(value.shape)} for the rows {rows}, and {side.shape} before; expected a "
            "fixed width, and a row for each of the outputs': name a module behind the pooling over positions"
        )
    return flat


def _positions(side: Feature) -> tuple[int, ...]:
    return side.shape[1:-1] if side.tokens else side.shape[2:]
