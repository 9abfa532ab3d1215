"""Rows of one split, as models read them and losses count them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import DataError

IGNORE = -100
"""The label of a row that has none (the ``ignore_index`` of torch's cross-entropy)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one split. ``labels[i]`` and ``mask[i]`` belong to ``logits[i]``: nothing is shifted any more.

    A *row* is what the loss averages over: a sample, or a position (token, pixel) where the models' outputs have
    positions. Batches of other shapes (a transformers mapping, a pair) become this by ``TaskKind.read``.

    inputs
        What the student reads: a tensor ``(B, ...)``, a mapping (keyword arguments) or a tuple (arguments) of such.
    labels
        Class numbers of the rows' shape with ``-100`` where there is none; floats ``(B,)`` or ``(B, D)`` for
        regression; flags ``(B, C)`` for several labels at once; or None.
    ids
        Sample numbers in the split ``(B,)``; kept soft labels are found by them.
    teacher_inputs
        What the teacher reads when that is something else (another view, modality, tokenisation).
    mask
        Bool, of the rows' shape; False rows count nowhere. None: every sample counts.
    extra
        Whatever else the data carries, by name (for example ``task``).
    probabilities
        Class probabilities ``(..., C)`` in place of ``labels``, made by a batch transform; a row of zeros has none.

    Raises DataError for a mask that is not bool.
    """

    inputs: Any
    labels: Tensor | None = None
    ids: Tensor | None = None
    teacher_inputs: Any = None
    mask: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    probabilities: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and (not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool):
            got = getattr(self.mask, "dtype", type(self.mask).__name__)
            raise DataError(f"mask is {got}; expected torch.bool, True where a row counts: mask.bool()")

    def __len__(self) -> int:
        """Number of samples (not of tokens)."""
        return samples(self.inputs)

    @property
    def for_teacher(self) -> Any:
        """The teacher's inputs: its own where the batch holds them, else the student's."""
        return self.inputs if self.teacher_inputs is None else self.teacher_inputs

    @property
    def has_labels(self) -> bool:
        """Whether it carries labels in either form; single rows may still have none."""
        return self.labels is not None or self.probabilities is not None

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; itself where all of it is there."""
        held = [tensor for name in _FIELDS for _, tensor in tensors_in(getattr(self, name))]
        if all(tensor.device == device for tensor in held):
            return self
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def part(self, rows: slice | Tensor) -> Batch:
        """The samples in ``rows``, a slice or their numbers: a micro-batch."""
        return self._each(lambda tensor: tensor[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, **{name: mapped(getattr(self, name), change) for name in _FIELDS})


_FIELDS = ("inputs", "labels", "ids", "teacher_inputs", "mask", "extra", "probabilities")


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """``change`` of every tensor in nested mappings and tuples; everything else stays."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(item, change) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(mapped(item, change) for item in value)
    return value


def tensors_in(value: Any, where: str = "inputs") -> list[tuple[str, Tensor]]:
    """Every tensor in nested mappings and tuples, with its path."""
    if isinstance(value, Tensor):
        return [(where, value)]
    if isinstance(value, Mapping):
        return [found for name, item in value.items() for found in tensors_in(item, f"{where}.{name}")]
    if isinstance(value, tuple | list):
        return [found for number, item in enumerate(value) for found in tensors_in(item, f"{where}.{number}")]
    return []


def samples(inputs: Any) -> int:
    """Number of samples: the first axis of the first tensor."""
    if isinstance(inputs, Tensor) and inputs.dim():
        return inputs.shape[0]
    found = [tensor for _, tensor in tensors_in(inputs) if tensor.dim()]
    if not found:
        raise DataError(
            f"inputs are {type(inputs).__name__} without a tensor; expected a tensor (B, ...), or tensors by name"
        )
    return found[0].shape[0]
