"""What flows through a step: the batch, what the models give, the targets, the loss terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""The label of a row that has none (the ``ignore_index`` of torch's cross-entropy)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one split.

    inputs
        What the student reads: a tensor ``(B, ...)`` or a mapping of tensors (keyword arguments).
    labels
        Class indices ``(B,)`` or ``(B, L)`` with ``-100`` where there is none, float targets for
        regression, or None.
    ids
        Row numbers in the split ``(B,)``; soft labels on disk are found by them.
    teacher_inputs
        What the teacher reads when that is something else (another view, modality, tokenisation).
    mask
        Bool, the shape of the logits without their last axis; False rows count nowhere.
    extra
        Whatever else the data carries, by name (for example ``task``).
    """

    inputs: Any
    labels: Tensor | None = None
    ids: Tensor | None = None
    teacher_inputs: Any = None
    mask: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of samples (not of tokens)."""
        if isinstance(self.inputs, Tensor):
            return self.inputs.shape[0]
        first = next(iter(self.inputs.values())) if isinstance(self.inputs, Mapping) else self.inputs
        return len(first)

    @property
    def for_teacher(self) -> Any:
        """The teacher's inputs: its own where the batch holds them, else the student's."""
        return self.inputs if self.teacher_inputs is None else self.teacher_inputs

    @property
    def rows(self) -> float:
        """Number of valid rows: what a mean over rows divides by."""
        if self.mask is not None:
            return float(self.mask.sum())
        if self.labels is not None and not self.labels.is_floating_point():
            return float(self.labels.numel())
        return float(len(self))

    @property
    def labelled(self) -> float:
        """Number of valid rows that have a label."""
        if self.labels is None:
            return 0.0
        if self.labels.is_floating_point():
            return self.rows
        known = self.labels != IGNORE
        return float((known if self.mask is None else known & self.mask).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return replace(
            self,
            inputs=_to(self.inputs, device),
            labels=_to(self.labels, device),
            ids=_to(self.ids, device),
            teacher_inputs=_to(self.teacher_inputs, device),
            mask=_to(self.mask, device),
            extra=_to(self.extra, device),
        )

    def part(self, rows: slice) -> Batch:
        """The samples in ``rows``: a micro-batch."""
        return Batch(
            _part(self.inputs, rows),
            _part(self.labels, rows),
            _part(self.ids, rows),
            _part(self.teacher_inputs, rows),
            _part(self.mask, rows),
            _part(self.extra, rows),
        )


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: _to(item, device) for name, item in value.items()}
    return value


def _part(value: Any, rows: slice) -> Any:
    if isinstance(value, Mapping):
        return {name: _part(item, rows) for name, item in value.items()}
    return None if value is None else value[rows]
