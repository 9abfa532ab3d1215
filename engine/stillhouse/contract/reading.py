"""How rows are read: by torch's DataLoader, with workers, a batch's random numbers its own."""

from __future__ import annotations

import hashlib
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from stillhouse.contract.batch import Batch
from stillhouse.errors import DataError, StillhouseError


@dataclass(frozen=True)
class Reading:
    """How the batches of one stage, or of one evaluation, are read. Nothing of it but ``seed`` changes what is read.

    workers
        Processes that read ahead. None: those of the loader that was given, else none.
    pin_memory
        Whether batches are put where a GPU copies them from without waiting; a given loader says it for itself.
    seed
        Of the random numbers that items draw; every batch has its own, by its number.
    start
        The number of the first batch: after a resume those before it are not read.
    """

    workers: int | None = None
    pin_memory: bool = False
    seed: int = 0
    start: int = 0


@dataclass(frozen=True)
class Loading:
    """What a user's DataLoader says about reading; the default is that there is none."""

    workers: int = 0
    pin_memory: bool | None = None
    batch_size: int | None = None
    prefetch: int | None = None
    timeout: float = 0
    init: Callable[[int], None] | None = None
    context: Any = None

    def settled(self, reading: Reading) -> Loading:
        """The loader's own settings, but for what a run states."""
        workers = self.workers if reading.workers is None else reading.workers
        pin = reading.pin_memory if self.pin_memory is None else self.pin_memory
        return replace(self, workers=workers, pin_memory=pin and torch.cuda.is_available())


AS_IS = Reading()
"""Reading where nothing is stated."""
NO_LOADER = Loading()
"""What there is to say of loading where no loader was given."""


class Rows(Protocol):
    """Whatever gives the batch of some row numbers."""

    def batch(self, index: Tensor) -> Batch: ...


def read(
    rows: Rows, indices: Iterable[Tensor], reading: Reading, given: Loading = NO_LOADER
) -> Iterator[Batch]:
    """The batches of these row numbers, read ahead by worker processes where there are some.

    The random generators of this process stay as they are. A batch has the same bits whoever reads it.

    Raises DataError for rows that can't be read, when their turn comes.
    """
    loading = given.settled(reading)
    asked = (
        (batch_seed(reading.seed, number), index.tolist())
        for number, index in enumerate(indices, reading.start)
    )
    working = loading.workers > 0
    loader: DataLoader[Batch | _Failed] = DataLoader(
        _Asked(rows),
        batch_size=None,
        sampler=asked,  # type: ignore[arg-type]  # any iterable of what __getitem__ takes
        collate_fn=_as_it_is,
        num_workers=loading.workers,
        prefetch_factor=loading.prefetch if working else None,
        pin_memory=bool(loading.pin_memory),
        timeout=loading.timeout if working else 0,
        worker_init_fn=_Initialised(loading.init) if working else None,
        multiprocessing_context=loading.context if working else None,
        generator=torch.Generator(),  # else it draws from the process's
    )
    for found in loader:
        if isinstance(found, _Failed):
            raise DataError(found.why)
        yield found


def in_order(rows: int, batch_size: int) -> tuple[Tensor, ...]:
    """Row numbers 0 to ``rows`` - 1 in batches."""
    return torch.split(torch.arange(rows), batch_size)


def batch_seed(seed: int, number: int) -> int:
    """The seed of one batch's random numbers, 0 to 2^32 - 1."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest(), "little")


def seed_generators(seed: int) -> None:
    """Seed torch's CPU generator, numpy's and python's. A GPU's draws nothing while data are read."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's random generators begin at ``seed``, and are put back."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed_generators(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


@dataclass(frozen=True)
class _Failed:
    """What a worker hands over in place of a batch that can't be read; an error itself may not survive the way."""

    why: str


class _Asked(Dataset["Batch | _Failed"]):
    """A DataLoader's item is a batch here: (seed, row numbers) gives it."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, asked: tuple[int, list[int]]) -> Batch | _Failed:
        seed, index = asked
        if get_worker_info() is None:
            with seeded(seed):
                return self.rows.batch(torch.tensor(index, dtype=torch.long))
        seed_generators(seed)
        try:
            return self.rows.batch(torch.tensor(index, dtype=torch.long))
        except StillhouseError as error:
            return _Failed(str(error))


class _Initialised:
    """What a worker does first: Ctrl-C is the main process's, which ends its update before it stops."""

    def __init__(self, own: Callable[[int], None] | None) -> None:
        self.own = own

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.own is not None:
            self.own(worker)


def _as_it_is(value: Any) -> Any:
    return value
