"""A task: data with train, validation, test and unlabelled splits, models by name, and a metric."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from stillhouse.contract.batch import IGNORE, Batch, mapped, tensors_in
from stillhouse.contract.kinds import KINDS, TaskKind
from stillhouse.errors import ConfigError, DataError


class Split(Protocol):
    """Rows with ids 0 to len - 1."""

    @property
    def fixed(self) -> bool:
        """Whether a row is the same at every reading: then a teacher's outputs can be kept by id."""

    @property
    def labelled(self) -> bool:
        """Whether batches have labels."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> Batch:
        """The rows of ``index`` (long, 1-D), in that order, with ``ids`` set."""

    def stream(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """The batches of these row numbers, one after the other."""

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

    def stream(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        return map(self.batch, indices)

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


def _tensors(name: str, value: Any) -> list[tuple[str, Tensor]]:
    return [] if value is None else tensors_in(value, name)


def _rows(value: Any, index: Tensor) -> Any:
    if value is None or isinstance(value, Tensor):  # as most are
        return None if value is None else value[index]
    return mapped(value, lambda tensor: tensor[index])


@dataclass
class DatasetSplit:
    """A map-style torch Dataset whose items are ``(inputs, label)``, ``(inputs,)`` or inputs alone.

    ``fixed`` says that an item is the same at every reading (no random augmentation), so that a
    teacher's outputs may be kept. ``collate`` joins items as a DataLoader's ``collate_fn`` does.
    """

    dataset: Dataset[Any]
    labelled: bool = True
    fixed: bool = False
    collate: Callable[[list[Any]], Any] = default_collate
    kind: TaskKind = KINDS["classification"]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def batch(self, index: Tensor) -> Batch:
        joined = self.collate([self.dataset[int(row)] for row in index])
        batch = self.kind.read(joined)
        return replace(batch, labels=batch.labels if self.labelled else None, ids=index)

    def stream(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        return map(self.batch, indices)

    def _sample(self, rows: int) -> Tensor:
        return torch.linspace(0, len(self) - 1, min(len(self), rows)).long()

    def validate(self, name: str) -> None:
        if len(self) == 0:
            raise DataError(f"the {name} split is empty; expected at least one row")
        sample = self.batch(self._sample(64))
        TensorSplit(sample.inputs, sample.labels, mask=sample.mask).validate(name)

    def fingerprint(self) -> str:
        """A digest of the length and of 64 rows spread over the split; of their shapes, where items are random."""
        first, second = (self._of(self.batch(self._sample(64))) for _ in range(2))
        if first.fingerprint() == second.fingerprint():
            return f"{len(self)}-{first.fingerprint()}"
        shapes = [f"{name}{list(tensor.shape[1:])}" for name, tensor in first.named()]
        return f"{len(self)}-random-{'-'.join(shapes)}"

    @staticmethod
    def _of(sample: Batch) -> TensorSplit:
        return TensorSplit(sample.inputs, sample.labels, mask=sample.mask)

    def without_labels(self) -> DatasetSplit:
        """The same inputs with no labels."""
        return replace(self, labelled=False)


class JoinedSplit:
    """A labelled split followed by an unlabelled one; labels of the second are ``-100``."""

    labelled = True

    def __init__(self, first: Split, second: Split) -> None:
        self.first, self.second = first, second
        self.fixed = first.fixed and second.fixed

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def batch(self, index: Tensor) -> Batch:
        late = index >= len(self.first)
        # A Dataset can't collate no rows at all: where a split has none here, its row 0 is read and left out.
        early, rest = index[~late], index[late] - len(self.first)
        parts = [
            self.first.batch(early if len(early) else index.new_zeros(1)),
            self.second.batch(rest if len(rest) else index.new_zeros(1)),
        ]
        order = torch.where(late, len(parts[0]) + late.cumsum(0), (~late).cumsum(0)) - 1
        labels = [_or_ignored(part, parts[0]) for part in parts]
        return Batch(
            _join([part.inputs for part in parts], order),
            None if labels[0] is None else torch.cat(labels)[order],  # type: ignore[arg-type]
            index,
            _join(_views(parts), order),
            _join(_masks(parts), order),
            _join([part.extra for part in parts], order),
        )

    def stream(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        return map(self.batch, indices)

    def without_labels(self) -> JoinedSplit:
        """The same inputs with no labels."""
        return JoinedSplit(self.first.without_labels(), self.second)

    def validate(self, name: str) -> None:
        self.first.validate(name)
        self.second.validate(name)

    def fingerprint(self) -> str:
        return f"{self.first.fingerprint()}+{self.second.fingerprint()}"


def _or_ignored(part: Batch, like: Batch) -> Tensor | None:
    if part.labels is not None or like.labels is None:
        return part.labels
    if like.labels.is_floating_point():
        raise ConfigError(
            "a stage on all data needs class labels, got float ones (regression); use labelled or unlabelled"
        )
    return like.labels.new_full((len(part), *like.labels.shape[1:]), IGNORE)


def _views(parts: list[Batch]) -> list[Any]:
    own = any(part.teacher_inputs is not None for part in parts)
    return [part.for_teacher if own else None for part in parts]


def _masks(parts: list[Batch]) -> list[Tensor | None]:
    like = next((part.mask for part in parts if part.mask is not None), None)
    if like is None:
        return [None, None]
    return [like.new_ones((len(part), *like.shape[1:])) if part.mask is None else part.mask for part in parts]


def _join(parts: list[Any], order: Tensor) -> Any:
    if isinstance(parts[0], Mapping):
        return {
            name: torch.cat([part[name] for part in parts])[order] for name in parts[0] if name in parts[1]
        }
    return None if parts[0] is None or parts[1] is None else torch.cat(parts)[order]


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
            if scored and split.batch(torch.zeros(1, dtype=torch.long)).labels is None:
                raise DataError(
                    f"the {name} split has no labels; expected some, since it is there to be scored: give it labels, or "
                    "leave it out"
                )

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
            return self.train if self.unlabelled is None else JoinedSplit(self.train, self.unlabelled)
        raise ConfigError(f"stage data is '{data}'; expected labelled, unlabelled or all")
