"""Soft labels: a teacher's answers to the samples of a split, found by sample id, bound to what made them.

What a run keeps for itself is ``kept.HeldLabels``; a store that was made by labelling is ``store.StoredLabels``::

    labels = SoftLabels.open("labels/")
    logits = labels.lookup(ids)              # a tensor, a TopK, a Sampled or a TeacherHead
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stillhouse.kernels import Sampled, TeacherHead, TopK
from stillhouse.softlabels.forms import Form, Labels, multiplied

if TYPE_CHECKING:
    from stillhouse.softlabels.kept import HeldLabels
    from stillhouse.softlabels.store import StoredLabels


class SoftLabels(ABC):
    """A teacher's answers by sample id.

    form
        What is kept of each row.
    fingerprint
        What they were made from, by field.
    """

    form: Form
    fingerprint: dict[str, str]
    data: str = "all"
    """The rows that ids 0, 1, ... are, as ``Splits.stage`` names them."""

    @staticmethod
    def open(where: str | Path) -> StoredLabels:
        """The store in a directory or at a URI; CheckpointError where there is none, or a damaged one."""
        from stillhouse.softlabels.places import place
        from stillhouse.softlabels.store import StoredLabels

        return StoredLabels(place(where))

    @staticmethod
    def load(path: Path, expected: Mapping[str, str], device: torch.device) -> HeldLabels:
        """A file that a run kept, made from exactly ``expected``; CheckpointError otherwise. See ``HeldLabels.load``."""
        from stillhouse.softlabels.kept import HeldLabels

        return HeldLabels.load(path, expected, device)

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    def __str__(self) -> str:
        """Where they are, as messages name it."""
        return "in memory"

    @abstractmethod
    def count(self, first: int, stop: int) -> int:
        """How many of the samples ``first`` to ``stop - 1`` are there."""

    @abstractmethod
    def lookup(self, ids: Tensor, mask: Tensor | None = None) -> Labels:
        """The answers to these samples, in the order of ``ids`` ``(B,)``, on the device of ``ids``.

        mask
            Bool ``(B, ...)``: a sample's rows go to its True places, one after the other. Without it samples of
            differing length are padded at their end.

        Returns logits ``(B, ..., outputs)``, or a TopK, a Sampled or a TeacherHead with that leading shape. At places
        where the mask is False stands something that only a loss that masks them may see.

        Raises DataError for a sample that is not there, or has another number of rows than the mask; DamagedFile for a
        shard that was changed.
        """

    def targets(self, ids: Tensor, mask: Tensor | None = None) -> Tensor | TopK | Sampled:
        """What ``lookup`` gives, as a step's ``TeacherOut.logits`` takes it: hidden states are multiplied by the head."""
        found = self.lookup(ids, mask)
        return multiplied(found) if isinstance(found, TeacherHead) else found

    def features(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The kept features of these samples by name, as the teacher's ``features`` of a step; empty where none are."""
        return {}

    @abstractmethod
    def blocks(self, size: int = 4096) -> Iterator[tuple[Tensor, Labels]]:
        """Every sample in order of its id, in blocks: the ids, and their answers. Memory stays that of a block."""


class Shifted(SoftLabels):
    """The same labels for rows that begin to count ``by`` samples later: unlabelled ones, kept behind the labelled."""

    def __init__(self, labels: SoftLabels, by: int) -> None:
        self.form, self.fingerprint, self.data = labels.form, labels.fingerprint, labels.data
        self._labels, self._by = labels, by

    def __len__(self) -> int:
        return len(self._labels) - self._by

    def __str__(self) -> str:
        return str(self._labels)

    def count(self, first: int, stop: int) -> int:
        return self._labels.count(first + self._by, stop + self._by)

    def lookup(self, ids: Tensor, mask: Tensor | None = None) -> Labels:
        return self._labels.lookup(ids + self._by, mask)

    def features(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        return self._labels.features(ids + self._by, mask)

    def blocks(self, size: int = 4096) -> Iterator[tuple[Tensor, Labels]]:
        for ids, labels in self._labels.blocks(size):
            yield ids - self._by, labels
