"""Splits that are read rather than held: map-style datasets, and iterables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from stillhouse.contract.batch import Batch
from stillhouse.contract.kinds import KINDS, LABEL_NAMES, TaskKind
from stillhouse.contract.loader import LoaderBatches
from stillhouse.contract.reading import AS_IS, NO_LOADER, Loading, Reading, batch_seed, in_order, read, seeded
from stillhouse.contract.splits import TensorSplit
from stillhouse.errors import ConfigError, DataError, StillhouseError

SAMPLE = 64
"""Rows that are looked at for NaN, and that a fingerprint is made of."""


def collated(items: list[Any]) -> Any:
    """Items joined as torch's ``default_collate`` does; lists of numbers (a table's columns) become tensors first.

    Raises DataError for strings, and for items of different lengths.
    """
    try:
        return default_collate([_with_tensors(item) for item in items])
    except (RuntimeError, TypeError) as error:
        raise DataError(
            f"these items can't be joined to a batch ({str(error).splitlines()[0]}); expected numbers of one shape in "
            "each: where they have lengths of their own give DataLoader(..., collate_fn=...) with one that pads"
        ) from error


def _with_tensors(item: Any) -> Any:
    if not isinstance(item, Mapping):
        return item
    found = {}
    for name, value in item.items():
        if isinstance(value, str) and name not in LABEL_NAMES:
            raise DataError(
                f"an item's '{name}' is a string ({value!r:.40}); expected numbers: tokenise it first, or leave that "
                "column out"
            )
        found[name] = torch.tensor(value) if isinstance(value, list) and _numbers(value) else value
    return found


def _numbers(value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, int | float)


@dataclass
class DatasetSplit:
    """Anything with ``__len__`` and ``__getitem__`` whose items are ``(inputs, label)``, inputs alone, or a mapping.

    labelled
        Whether the items' labels are used.
    fixed
        Whether an item is the same at every reading (no random augmentation), so that outputs may be kept by id.
    collate
        Joins items, as a DataLoader's ``collate_fn`` does.
    kind
        What a batch means.
    rows
        The dataset's rows that make the split, long; None: all. Row numbers and ids count these.
    loading
        How a loader that was given reads.
    batches
        A given loader's own batches; None: rows come at random, each once an epoch.
    """

    dataset: Any
    labelled: bool = True
    fixed: bool = False
    collate: Callable[[list[Any]], Any] = collated
    kind: TaskKind = KINDS["classification"]
    rows: Tensor | None = None
    loading: Loading = NO_LOADER
    batches: LoaderBatches | None = None
    _digest: str | None = field(default=None, init=False, repr=False, compare=False)

    numbered, in_memory = True, False

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else len(self.rows)

    def batch(self, index: Tensor) -> Batch:
        numbers = (index if self.rows is None else self.rows[index]).tolist()
        batch = self.kind.read(self.collate(self.items(numbers)))
        if len(batch) != len(index):
            raise DataError(
                f"the collate_fn made {len(batch)} rows of {len(index)} items; expected a row for each item"
            )
        return replace(batch, labels=batch.labels if self.labelled else None, ids=index)

    def items(self, numbers: list[int]) -> list[Any]:
        """The dataset's items of these rows of its own. DataError where one can't be read."""
        together = getattr(self.dataset, "__getitems__", None)
        try:
            items: list[Any] = (
                [self.dataset[row] for row in numbers] if together is None else together(numbers)
            )
        except StillhouseError:
            raise
        except Exception as error:
            raise DataError(
                f"rows {', '.join(map(str, numbers[:4]))}{' ...' if len(numbers) > 4 else ''} of "
                f"{type(self.dataset).__name__} can't be read ({type(error).__name__}: {error}); expected an item for "
                f"each number from 0 to {len(self.dataset) - 1}, as it has {len(self.dataset)}"
            ) from error
        return items

    def stream(self, indices: Iterable[Tensor], reading: Reading = AS_IS) -> Iterator[Batch]:
        return read(self, indices, reading, self.loading)

    def every(self, batch_size: int, reading: Reading = AS_IS) -> Iterator[Batch]:
        return self.stream(in_order(len(self), batch_size), reading)

    def probe(self, rows: int) -> Batch:
        with seeded(0):
            return self.batch(torch.arange(min(rows, len(self))))

    def _sample(self) -> TensorSplit:
        with seeded(0):
            batch = self.batch(torch.linspace(0, len(self) - 1, min(len(self), SAMPLE)).long())
        return TensorSplit(batch.inputs, batch.labels, batch.teacher_inputs, batch.mask)

    def validate(self, name: str) -> None:
        if len(self) == 0:
            raise DataError(f"the {name} split is empty; expected at least one row")
        self._sample().validate(name)

    def fingerprint(self) -> str:
        """A digest of the length and of 64 rows spread over the split; of their shapes, where they are never the same."""
        if self._digest is None:
            first, second = self._sample(), self._sample()
            if first.fingerprint() == second.fingerprint():
                self._digest = f"{len(self)}-{first.fingerprint()}"
            else:
                shapes = (f"{name}{list(tensor.shape[1:])}" for name, tensor in first.named())
                self._digest = f"{len(self)}-random-{'-'.join(shapes)}"
        return self._digest

    def without_labels(self) -> DatasetSplit:
        """The same inputs with no labels."""
        return replace(self, labelled=False)


@dataclass
class IterableSplit:
    """A DataLoader of an IterableDataset: batches as they come, and again from its beginning when it ends.

    Its rows have no numbers: nothing is kept for them, and a resumed run reads and drops the batches it has had.
    """

    loader: DataLoader[Any]
    labelled: bool = True
    kind: TaskKind = KINDS["classification"]
    name: str = "train"
    _head: Batch | None = field(default=None, init=False, repr=False, compare=False)

    fixed, numbered, in_memory = False, False, False
    batches = None

    @property
    def loading(self) -> Loading:
        return Loading(self.loader.num_workers, batch_size=self.loader.batch_size)

    def __len__(self) -> int:
        raise DataError(
            f"the {self.name} split is an iterable, which has no length and no row numbers; what was asked for needs "
            "them (a stage over all data, rows chosen by a method): give a dataset with __len__ and __getitem__"
        )

    def batch(self, index: Tensor) -> Batch:
        return self.probe(len(index))

    def probe(self, rows: int) -> Batch:
        if self._head is None:
            first = next(self._epoch(0, 0), None)
            if first is None:
                raise DataError(f"the {self.name} split is empty; expected at least one batch")
            self._head = first
        return self._head.part(slice(0, rows))

    def stream(self, indices: Iterable[Tensor], reading: Reading = AS_IS) -> Iterator[Batch]:
        self._check(reading)
        batches = self._endless(reading.seed)
        for _ in range(reading.start):
            next(batches)
        for _ in indices:
            yield next(batches)

    def every(self, batch_size: int, reading: Reading = AS_IS) -> Iterator[Batch]:
        """One epoch, in the loader's batches."""
        self._check(reading)
        return self._epoch(reading.seed, 0)

    def _check(self, reading: Reading) -> None:
        if reading.workers not in (None, self.loader.num_workers):
            raise ConfigError(
                f"workers is {reading.workers}, and the {self.name} split's loader has {self.loader.num_workers}; of an "
                "iterable the workers are part of what it gives: set num_workers there, and leave workers out"
            )

    def _endless(self, seed: int) -> Iterator[Batch]:
        epoch = made = 0
        while True:
            before = made
            for batch in self._epoch(seed, epoch):
                made += 1
                yield batch
            if made == before:
                raise DataError(
                    f"the {self.name} split ended after {made} batches and gives none when it is read again; expected "
                    "as many as there are updates: set steps to that, or give an IterableDataset whose __iter__ begins anew"
                )
            epoch += 1

    def _epoch(self, seed: int, epoch: int) -> Iterator[Batch]:
        loader = copy.copy(self.loader)
        own = batch_seed(seed, epoch)
        loader.generator = torch.Generator().manual_seed(own)
        loader._iterator = None  # noqa: SLF001 - persistent workers would go on with the order of an earlier epoch
        with seeded(own):
            batches = iter(loader)
        number = 0
        while True:
            with seeded(batch_seed(own, number)):
                given = next(batches, None)
            if given is None:
                return
            batch = self.kind.read(given)
            yield replace(batch, labels=batch.labels if self.labelled else None, ids=None)
            number += 1

    def validate(self, name: str) -> None:
        batch = self.probe(SAMPLE)
        TensorSplit(batch.inputs, batch.labels, batch.teacher_inputs, batch.mask).validate(name)

    def fingerprint(self) -> str:
        """A digest of the first batch and of what else the batches depend on."""
        batch = self.probe(SAMPLE)
        shown = TensorSplit(batch.inputs, batch.labels, batch.teacher_inputs, batch.mask).fingerprint()
        return f"iterable-{self.loader.batch_size}-{self.loader.num_workers}-{shown}"

    def without_labels(self) -> IterableSplit:
        """The same inputs with no labels."""
        return replace(self, labelled=False)
