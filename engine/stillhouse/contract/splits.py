"""The data of a task: train, validation, test and unlabelled splits, and those that are tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from stillhouse.contract.batch import Batch, mapped, tensors_in
from stillhouse.contract.joined import JoinedSplit
from stillhouse.contract.loader import LoaderBatches
from stillhouse.contract.reading import AS_IS, NO_LOADER, Loading, Reading, in_order
from stillhouse.errors import ConfigError, DataError


class Split(Protocol):
    """Rows with ids 0 to len - 1."""

    @property
    def numbered(self) -> bool:
        """Whether rows have numbers. An iterable's have none: no length, no ids, nothing kept."""

    @property
    def in_memory(self) -> bool:
        """Whether rows are there at once, so that no worker needs to read them."""

    @property
    def loading(self) -> Loading:
        """How a loader that was given reads."""

    @property
    def batches(self) -> LoaderBatches | None:
        """The batches of a loader that was given; None: rows come at random, each once an epoch."""

    @property
    def fixed(self) -> bool:
        """Whether a row is the same at every reading: then a teacher's outputs can be kept by id."""

    @property
    def labelled(self) -> bool:
        """Whether batches have labels."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> Batch:
        """The rows of ``index`` (long, 1-D), in that order, with ``ids`` set."""

    def stream(self, indices: Iterable[Tensor], reading: Reading = AS_IS) -> Iterator[Batch]:
        """The batches of these row numbers, one after the other; an iterable's next ones, as many as there are."""

    def every(self, batch_size: int, reading: Reading = AS_IS) -> Iterator[Batch]:
        """Every row once, in order, in batches of ``batch_size`` (an iterable's: as they come)."""

    def probe(self, rows: int) -> Batch:
        """The first rows, at most so many: to look at shapes. The random generators stay as they are."""

    def without_labels(self) -> Split:
        """The same inputs with no labels."""

    def validate(self, name: str) -> None:
        """Raise DataError if the split can't be trained on."""

    def fingerprint(self) -> str:
        """A digest that changes when the rows do."""


@dataclass
class TensorSplit:
    """A split held in memory; see Batch for the fields. The first axis of each tensor is the rows."""

    inputs: Any
    labels: Tensor | None = None
    teacher_inputs: Any = None
    mask: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    fixed: bool = True

    numbered, in_memory = True, True
    loading = NO_LOADER
    batches = None

    def __len__(self) -> int:
        return len(_tensors("inputs", self.inputs)[0][1])

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    def batch(self, index: Tensor) -> Batch:
        return Batch(
            _rows(self.inputs, index),
            _rows(self.labels, index),
            index,
            _rows(self.teacher_inputs, index),
            _rows(self.mask, index),
            _rows(self.extra, index),
        )

    def stream(self, indices: Iterable[Tensor], reading: Reading = AS_IS) -> Iterator[Batch]:
        return map(self.batch, indices)

    def every(self, batch_size: int, reading: Reading = AS_IS) -> Iterator[Batch]:
        return map(self.batch, in_order(len(self), batch_size))

    def probe(self, rows: int) -> Batch:
        return self.batch(torch.arange(min(rows, len(self))))

    def named(self) -> list[tuple[str, Tensor]]:
        """Every tensor of the split with its name."""
        found = []
        for name in ("inputs", "labels", "teacher_inputs", "mask", "extra"):
            found += _tensors(name, getattr(self, name))
        return found

    def validate(self, name: str) -> None:
        if len(self) == 0:
            raise DataError(f"the {name} split is empty; expected at least one row")
        for field_name, tensor in self.named():
            if len(tensor) != len(self):
                raise DataError(
                    f"{name}.{field_name} has {len(tensor)} rows, the inputs have {len(self)}; "
                    "expected the same number"
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                row = int((~torch.isfinite(tensor)).reshape(len(tensor), -1).any(-1).nonzero()[0])
                raise DataError(
                    f"{name}.{field_name} holds NaN or infinity, first in row {row}; "
                    "expected finite numbers: drop or mend those rows"
                )
        if (
            self.labels is not None
            and self.labels.dtype != torch.long
            and not self.labels.is_floating_point()
        ):
            raise DataError(
                f"{name}.labels are {self.labels.dtype}; expected torch.int64 (class numbers) or floats: labels.long()"
            )

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self.named():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def without_labels(self) -> TensorSplit:
        """The same inputs with no labels."""
        return TensorSplit(self.inputs, None, self.teacher_inputs, self.mask, self.extra, self.fixed)


def _refuse_unlike(name: str, split: TensorSplit, train: TensorSplit) -> None:
    """DataError where a split's rows can't be what the training split's are: told now, and not at the run's end."""
    own, trained = dict(split.named()), dict(train.named())
    for field_name in own.keys() & trained.keys():
        one, other = own[field_name], trained[field_name]
        row, expected = tuple(one.shape[1:]), tuple(other.shape[1:])
        # Texts, signals and images may be of another length in each split; a vector has the one width.
        vectors = len(expected) == 1 and other.is_floating_point()
        same = row == expected if vectors else len(row) == len(expected)
        if not same or one.is_floating_point() != other.is_floating_point():
            raise DataError(
                f"{name}.{field_name} are {one.dtype} with rows {row}, and train.{field_name} {other.dtype} with rows {expected}; "
                "expected the same of every split"
            )


def _tensors(name: str, value: Any) -> list[tuple[str, Tensor]]:
    return [] if value is None else tensors_in(value, name)


def _rows(value: Any, index: Tensor) -> Any:
    if value is None or isinstance(value, Tensor):  # as most are
        return None if value is None else value[index]
    return mapped(value, lambda tensor: tensor[index])


@dataclass
class Splits:
    """The data of a task. ``unlabelled`` holds inputs of the same kind without labels."""

    train: Split
    validation: Split | None = None
    test: Split | None = None
    unlabelled: Split | None = None

    def items(self) -> list[tuple[str, Split]]:
        """The splits that exist, by name."""
        names = ("train", "validation", "test", "unlabelled")
        return [(name, split) for name in names if (split := getattr(self, name)) is not None]

    def validate(self) -> None:
        """Raise DataError for an empty split, NaN, tensors of different lengths, or nothing to score with."""
        for name, split in self.items():
            split.validate(name)
            scored = name in ("validation", "test")
            if scored and split.probe(1).labels is None:
                raise DataError(
                    f"the {name} split has no labels; expected some, since it is there to be scored: give it labels, or "
                    "leave it out"
                )
            if name != "train" and isinstance(split, TensorSplit) and isinstance(self.train, TensorSplit):
                _refuse_unlike(name, split, self.train)

    def fingerprint(self) -> dict[str, str]:
        """Each split's digest, by name."""
        return {name: split.fingerprint() for name, split in self.items()}

    def stage(self, data: str) -> Split:
        """The split that a stage trains on: ``labelled``, ``unlabelled`` or ``all``."""
        if data == "labelled":
            return self.train
        if data == "unlabelled":
            if self.unlabelled is not None:
                return self.unlabelled
            return self.train.without_labels()
        if data == "all":
            if self.unlabelled is None:
                return self.train
            for split in (self.train, self.unlabelled):
                if not split.numbered:
                    len(split)  # says why there is none
            return JoinedSplit(self.train, self.unlabelled)
        raise ConfigError(f"stage data is '{data}'; expected labelled, unlabelled or all")
