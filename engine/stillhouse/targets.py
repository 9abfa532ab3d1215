"""What flows through a step: the batch, what the models give, the targets, the loss terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillhouse.errors import ConfigError

if TYPE_CHECKING:
    from stillhouse.kernels import Sampled, TopK

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


@dataclass(frozen=True, slots=True)
class StudentOut:
    """What the student gives: logits ``(B, C)`` or ``(B, L, V)`` and the features asked for, by module name."""

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TeacherOut:
    """What the teacher gives, without a graph.

    ``logits`` is a dense tensor, a ``TopK`` or a ``Sampled`` (whatever ``softmax_kl`` takes as its
    target); ``features`` holds the named modules' outputs where the teacher was called.
    """

    logits: Tensor | TopK | Sampled
    features: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Targets:
    """What the losses read, after every label transform.

    labels
        Class indices with ``-100`` where there is none, class probabilities ``(B, C)``, float
        targets for regression, or None.
    soft
        The teacher's logits (dense, ``TopK`` or ``Sampled``), or None where no teacher is called.
    """

    labels: Tensor | None = None
    soft: Any = None

    @property
    def dense(self) -> Tensor:
        """The teacher's logits as a dense tensor; ConfigError where they are not."""
        if not isinstance(self.soft, Tensor):
            raise ConfigError(
                f"got {type(self.soft).__name__} for the teacher's logits; expected a dense tensor: use a "
                "method that takes what this teacher gives"
            )
        return self.soft


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One named loss: a scalar already divided by the update's rows (``step.mean`` does that).

    The engine adds ``weight * value`` to the loss and logs ``value``.
    """

    value: Tensor
    weight: float | Tensor = 1.0
