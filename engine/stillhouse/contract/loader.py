"""What a user's DataLoader says about order: its sampler's rows, its batches, epoch after epoch."""

from __future__ import annotations

import copy
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from stillhouse.contract.reading import Loading, batch_seed, seeded
from stillhouse.errors import ConfigError, DataError


class LoaderBatches:
    """The batches of a loader's sampler, each epoch drawn under a seed of its own: a pure function of the two.

    A sampler's generator is replaced by a seeded one in a copy; ``set_epoch`` is called where there is one.

    Raises DataError for a sampler without a length, with another number of batches than it says, or one that gives
    another order under the same seed.
    """

    def __init__(self, sampler: Any, name: str, rows: int) -> None:
        self.sampler, self.name = sampler, name
        self._number = torch.arange(rows)
        try:
            self._length = len(sampler)
        except (TypeError, NotImplementedError):
            inner = getattr(sampler, "sampler", sampler)
            raise DataError(
                f"the {name} split's loader has a sampler without a length ({type(inner).__name__}); expected one with "
                "__len__, which says how long an epoch is: without it a run can't be resumed"
            ) from None
        first, again = self.epoch(0, 0), self.epoch(0, 0)
        if [index.tolist() for index in first] != [index.tolist() for index in again]:
            raise DataError(
                f"the {name} split's sampler gave two orders under one seed; expected one that draws from torch's, "
                "numpy's or python's random numbers, or from its own 'generator': a resumed run makes the order again"
            )

    def epoch(self, seed: int, epoch: int) -> list[Tensor]:
        """The row numbers of each batch of one epoch."""
        own = batch_seed(seed, epoch)
        with seeded(own):
            drawn = list(islice(_fresh(self.sampler, own, epoch), self._length + 1))
        if len(drawn) != self._length:
            more = "more" if len(drawn) > self._length else f"{len(drawn)}"
            raise DataError(
                f"the {self.name} split's loader says that an epoch has {self._length} batches, and gave {more} in epoch "
                f"{epoch}; expected what it says, and at least one: mend the sampler's __len__"
            )
        if not drawn:
            raise DataError(f"the {self.name} split's loader gives no batch; expected at least one")
        return [self._numbered(torch.as_tensor(batch, dtype=torch.long), epoch) for batch in drawn]

    def _numbered(self, rows: Tensor, epoch: int) -> Tensor:
        known = (rows >= 0) & (rows < len(self._number))
        numbers = self._number[rows.where(known, 0)].where(known, -1)
        if not len(rows) or (numbers < 0).any():
            got = f"row {int(rows[numbers < 0][0])}" if len(rows) else "an empty batch"
            raise DataError(
                f"the {self.name} split's sampler gave {got} in epoch {epoch}; expected rows of 0 to "
                f"{len(self._number) - 1}, of those that the sampler gave before"
            )
        return numbers

    def restrict(self, rows: Tensor) -> None:
        """Count these rows alone: numbers are places among them."""
        self._number = torch.full_like(self._number, -1).scatter_(0, rows, torch.arange(len(rows)))


def _fresh(sampler: Any, seed: int, epoch: int) -> Any:
    """An iterator over a copy of the sampler, at its beginning."""
    sampler = copy.copy(sampler)
    inner = getattr(sampler, "sampler", None)
    if inner is not None:
        sampler.sampler = inner = copy.copy(inner)
    for part in (sampler,) if inner is None else (sampler, inner):
        if isinstance(getattr(part, "generator", None), torch.Generator):
            part.generator = torch.Generator().manual_seed(seed)
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    return iter(sampler)


def loading_of(loader: DataLoader[Any]) -> Loading:
    """How the loader reads."""
    if not getattr(loader, "in_order", True):
        raise ConfigError(
            "the DataLoader has in_order=False, so that its order depends on the machine; expected in_order=True"
        )
    return Loading(
        workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        batch_size=loader.batch_size,
        prefetch=loader.prefetch_factor,
        timeout=loader.timeout,
        init=loader.worker_init_fn,
        context=loader.multiprocessing_context,
    )


def order_of(
    loader: DataLoader[Any], name: str, batch_size: int | None
) -> tuple[Tensor | None, LoaderBatches | None]:
    """The dataset's rows that the loader reads (None: all), and its batches (None: at random, each row once an epoch).

    name
        The split's: of one that is scored, the rows are those of the loader's first epoch.
    batch_size
        What the run states in place of the loader's own.

    Raises ConfigError where the loader's batches can't have that size.
    """
    count, sampler = len(loader.dataset), loader.batch_sampler  # type: ignore[arg-type]
    if sampler is None:
        raise ConfigError(
            f"the {name} split's DataLoader has batch_size=None, so that it makes no batches; expected a batch_size"
        )
    plain = type(sampler) is BatchSampler
    scored = name in ("validation", "test")
    if batch_size is not None and not scored and batch_size != loader.batch_size:
        if not plain:
            raise ConfigError(
                f"batch_size is {batch_size}, and the {name} split's loader has a batch_sampler of its own; expected one "
                "of the two: leave batch_size out"
            )
        sampler = BatchSampler(loader.sampler, batch_size, loader.drop_last)
    if plain and _shuffles(loader.sampler, count) and not (scored and loader.drop_last):
        return None, None
    batches = LoaderBatches(sampler, name, count)
    rows = _rows(loader.sampler if plain else None, batches, count, scored=scored)
    if rows is not None:
        batches.restrict(rows)
    return rows, batches


def _shuffles(sampler: Any, count: int) -> bool:
    """Whether it gives every row once an epoch, at random."""
    return type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == count


def _rows(sampler: Any, batches: LoaderBatches, count: int, *, scored: bool) -> Tensor | None:
    """The rows that the sampler gives; None where that is all of them, or not known beforehand."""
    if type(sampler) is SubsetRandomSampler:
        found = torch.unique(torch.as_tensor(sampler.indices, dtype=torch.long))
    elif type(sampler) is WeightedRandomSampler:
        found = sampler.weights.nonzero()[:, 0]
    elif type(sampler) in (SequentialSampler, RandomSampler) and not scored:
        return None
    else:
        epochs = [torch.unique(torch.cat(batches.epoch(0, epoch))) for epoch in (0, 1)]
        if not scored and not torch.equal(*epochs):
            return None
        found = epochs[0]
    return found if len(found) < count else None
