"""Labelled rows followed by unlabelled ones, in batches that hold both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.contract.batch import IGNORE, Batch, tensors_in
from stillhouse.contract.reading import AS_IS, Reading, in_order, read
from stillhouse.errors import ConfigError, DataError

if TYPE_CHECKING:
    from stillhouse.contract.splits import Split


class JoinedSplit:
    """A labelled split followed by an unlabelled one; labels of the second are ``-100``.

    Where the two are padded to lengths of their own, the shorter is padded to the longer: mask False, label -100,
    attention 0.
    """

    labelled, numbered = True, True
    batches = None
    """A loader's own batches hold rows of one of the two; rows of both come at random."""

    def __init__(self, first: Split, second: Split) -> None:
        self.first, self.second = first, second
        self.fixed = first.fixed and second.fixed
        self.in_memory = first.in_memory and second.in_memory
        loadings = (first.loading, second.loading)
        self.loading = max(loadings, key=lambda loading: loading.workers)

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
        masks = _masks(parts)
        if _differ(parts) and masks[0] is None and _attention(parts[0].inputs) is None:
            raise DataError(
                f"a labelled batch is {_shape(parts[0])}, an unlabelled one {_shape(parts[1])}, and nothing says which "
                "positions are real; expected an attention_mask among the inputs, or a mask"
            )
        return Batch(
            _join([part.inputs for part in parts], order),
            _join([_or_ignored(part, parts[0]) for part in parts], order, IGNORE),
            index,
            _join(_views(parts), order),
            _join(masks, order, fill=False),
            _join([part.extra for part in parts], order),
        )

    def stream(self, indices: Iterable[Tensor], reading: Reading = AS_IS) -> Iterator[Batch]:
        if self.in_memory:
            return map(self.batch, indices)
        return read(self, indices, reading, self.loading)

    def every(self, batch_size: int, reading: Reading = AS_IS) -> Iterator[Batch]:
        return self.stream(in_order(len(self), batch_size), reading)

    def probe(self, rows: int) -> Batch:
        return self.batch(torch.arange(min(rows, len(self))))

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
    return like.labels.new_full(_rows_like(part, like, like.labels), IGNORE)


def _views(parts: list[Batch]) -> list[Any]:
    own = any(part.teacher_inputs is not None for part in parts)
    return [part.for_teacher if own else None for part in parts]


def _masks(parts: list[Batch]) -> list[Tensor | None]:
    """Which rows count, where the parts say it or rows are positions: -100 then means no row in the labelled part alone."""
    labels = parts[0].labels
    if all(part.mask is None for part in parts) and labels is not None and labels.dim() > 1:
        if labels.is_floating_point():
            return [None, None]
        every = torch.ones(_rows_like(parts[1], parts[0], labels), dtype=torch.bool, device=labels.device)
        real = _attention(parts[1].inputs)
        fits = isinstance(real, Tensor) and real.shape == every.shape
        return [labels != IGNORE, real.bool() if fits else every]
    like = next((part for part in parts if part.mask is not None), None)
    if like is None or like.mask is None:
        return [None, None]
    return [
        like.mask.new_ones(_rows_like(part, like, like.mask)) if part.mask is None else part.mask
        for part in parts
    ]


def _rows_like(part: Batch, like: Batch, rows: Tensor) -> tuple[int, ...]:
    """The shape of ``part``'s rows: its inputs' positions where those of ``like``'s rows are its inputs', else as there."""
    positions = rows.shape[1:]
    theirs, own = (tensors_in(batch.inputs)[0][1].shape[1 : rows.dim()] for batch in (like, part))
    return (len(part), *(own if theirs == positions else positions))


def _attention(inputs: Any) -> Any:
    return inputs.get("attention_mask") if isinstance(inputs, Mapping) else None


def _shape(part: Batch) -> tuple[int, ...]:
    return tuple(tensors_in(part.inputs)[0][1].shape)


def _differ(parts: list[Batch]) -> bool:
    return _shape(parts[0])[1:] != _shape(parts[1])[1:]


def _join(parts: list[Any], order: Tensor, fill: float = 0) -> Any:
    """The rows of both in ``order``; names that one of the two lacks are left out."""
    first, second = parts
    if first is None or second is None:
        return None
    if isinstance(first, Mapping):
        return {name: _join([first[name], second[name]], order, fill) for name in first if name in second}
    if isinstance(first, tuple | list):
        return tuple(_join([one, other], order, fill) for one, other in zip(first, second, strict=True))
    if not isinstance(first, Tensor):
        return first
    return torch.cat(padded(parts, fill))[order]


def padded(parts: list[Tensor], fill: float = 0) -> list[Tensor]:
    """Tensors ``(B_i, ...)`` filled up at the end of every axis but the first to the longest of them.

    Raises DataError for tensors with different numbers of axes.
    """
    shapes = [part.shape[1:] for part in parts]
    if len(set(shapes)) == 1:
        return parts
    if len({len(shape) for shape in shapes}) > 1:
        raise DataError(
            f"labelled and unlabelled batches hold tensors of shape {tuple(parts[0].shape)} and "
            f"{tuple(parts[1].shape)}; expected as many axes in both"
        )
    longest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    found = []
    for part in parts:
        missing = [end - size for end, size in zip(longest, part.shape[1:], strict=True)]
        # F.pad counts axes from the last one, with what goes before and what goes behind.
        found.append(F.pad(part, [side for size in reversed(missing) for side in (0, size)], value=fill))
    return found
