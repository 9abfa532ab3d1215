"""The order in which rows are seen: a pure function of seed, stage and update.

Nothing about it has to be saved: a resumed run computes the same order again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Order:
    """An endless sequence of shuffled epochs over ``rows`` rows, cut into batches.

    Every row comes once an epoch; a batch may span two epochs, so each has ``batch_size`` rows.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, stage: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        self._key = seed * 1009 + stage
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
