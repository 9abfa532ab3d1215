"""The order in which rows are seen: a pure function of seed, stage and update.

Nothing about it has to be saved: a resumed run computes the same order again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from stillhouse.contract.loader import LoaderBatches
from stillhouse.contract.splits import Split


class Ordered(Protocol):
    """What says the row numbers of each update."""

    def rest(self, start: int, end: int, rows: Tensor | None = None) -> Iterator[Tensor]:
        """Row numbers of the updates from ``start`` to before ``end``; out of ``rows`` where these were chosen."""


def order_of(split: Split, batch_size: int, seed: int, stage: int, rows: Tensor | None = None) -> Ordered:
    """The order of a stage over ``split``, or over its chosen ``rows``: a loader's own batches, else all at random."""
    if not split.numbered:
        if rows is not None:
            len(split)  # says why there are no numbers
        return AsTheyCome()
    if split.batches is not None and rows is None:
        return LoaderOrder(split.batches, seed, stage)
    return Order(len(split) if rows is None else len(rows), batch_size, seed, stage)


class AsTheyCome:
    """An iterable's batches: none has row numbers."""

    def rest(self, start: int, end: int, rows: Tensor | None = None) -> Iterator[Tensor]:
        for _ in range(start, end):
            yield torch.empty(0, dtype=torch.long)


class LoaderOrder:
    """The batches of a loader's sampler, epoch after epoch. A resume draws the numbers of those before it, no row."""

    def __init__(self, batches: LoaderBatches, seed: int, stage: int) -> None:
        self._batches, self._key = batches, stage_seed(seed, stage)

    def rest(self, start: int, end: int, rows: Tensor | None = None) -> Iterator[Tensor]:
        update = epoch = 0
        while update < end:
            drawn = self._batches.epoch(self._key, epoch)
            yield from drawn[max(start - update, 0) : max(end - update, 0)]
            update += len(drawn)
            epoch += 1


def stage_seed(seed: int, stage: int) -> int:
    """One number for a run's seed and a stage's place."""
    return seed * 1009 + stage


class Order:
    """An endless sequence of shuffled epochs over ``rows`` rows, cut into batches.

    Every row comes once an epoch; a batch may span two epochs, so each has ``batch_size`` rows.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, stage: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        self._key = stage_seed(seed, stage)
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.long)

    def batch(self, update: int) -> Tensor:
        """Row numbers of one update ``(batch_size,)``."""
        start = update * self.batch_size
        found = []
        missing = self.batch_size
        while missing:
            epoch, offset = divmod(start, self.rows)
            taken = self._shuffled(epoch)[offset : offset + missing]
            found.append(taken)
            missing -= len(taken)
            start += len(taken)
        return found[0] if len(found) == 1 else torch.cat(found)

    def rest(self, start: int, end: int, rows: Tensor | None = None) -> Iterator[Tensor]:
        """Row numbers of the updates from ``start`` to before ``end``; out of ``rows`` where these were chosen."""
        for update in range(start, end):
            index = self.batch(update)
            yield index if rows is None else rows[index]

    def _shuffled(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self._key * 1_000_003 + epoch) % 2**63)
            self._permutation = torch.randperm(self.rows, generator=generator)
            self._epoch = epoch
        return self._permutation
