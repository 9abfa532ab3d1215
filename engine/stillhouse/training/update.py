"""One update: which micro-batches make it up, how many rows they have together, what they gave."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillhouse.contract.batch import IGNORE, Batch, tensors_in
from stillhouse.contract.outputs import Targets
from stillhouse.errors import ConfigError, DataError

if TYPE_CHECKING:
    from stillhouse.training.step import DistillStep

Reduce = Callable[[Tensor], Tensor]
"""Sums a float64 tensor over the ranks that make one update together."""


class Update:
    """The update that is being made: announced, filled micro-batch by micro-batch, closed.

    open
        Micro-batches that are still to come.
    """

    def __init__(self, step: DistillStep, reduce: Reduce | None) -> None:
        self._step, self._reduce = step, reduce
        self._parts: deque[tuple[Any, Batch]] = deque()  # as it was given, and transformed
        self._metrics: dict[str, Tensor] = {}
        self.open, self._used = 0, False
        self._came = 0.0  # rows of the micro-batches so far, of an update that the trainer counted
        self.by_trainer = False  # whether the trainer has counted the rows of this update
        self._assumed = False  # and has not said how many of them have a label

    def announce(self, batches: Sequence[Any]) -> None:
        """Transform these micro-batches, and count the rows that come out, over all ranks."""
        step = self._step
        if not batches:
            raise ConfigError("begin_update() got no micro-batch; expected one at least")
        self._metrics = {}
        parts = [self._transformed(step.batches.complete(step.batches.read(batch))) for batch in batches]
        if len(parts) == 1 and self._reduce is None:
            rows, labelled = step.kind.rows(parts[0]), step.kind.labelled(parts[0])
        else:
            counts = [(step.kind.rows(part), step.kind.labelled(part)) for part in parts]
            total = torch.tensor(counts, dtype=torch.float64).sum(0)
            rows, labelled = (total if self._reduce is None else self._reduce(total)).tolist()
        self._parts = deque(zip(batches, parts, strict=True))
        self._await(rows, labelled, len(parts))
        self.by_trainer = self._assumed = False

    def expect(self, rows: float, labelled: float | None, micros: int) -> None:
        """So many rows in so many micro-batches are to come, as the trainer has counted them."""
        if not rows > 0 or micros < 1 or not 0 <= (rows if labelled is None else labelled) <= rows:
            raise ConfigError(
                f"begin_update got rows={rows}, labelled={labelled}, micros={micros}; expected rows above 0, labelled from 0 to "
                "rows, and one micro-batch at least"
            )
        self._await(rows, rows if labelled is None else labelled, micros)
        self.by_trainer, self._assumed = True, labelled is None

    def _await(self, rows: float, labelled: float, micros: int) -> None:
        info = self._step.info
        info.rows, info.labelled = max(rows, 1.0), labelled
        info.micro, info.micros, self.open, self._came = 0, micros, micros, 0.0

    def part(self, given: Any) -> Batch:
        """The micro-batch that was announced; else the given one, transformed."""
        step, info = self._step, self._step.info
        if self._parts:
            announced, part = self._parts.popleft()
            if announced is not given and part is not given:
                _same_batch(announced, given, contents=step.watching)
        else:
            batch = step.batches.complete(step.batches.read(given))
            part = self._transformed(batch)
            if part is not batch and step.kind.rows(part) != step.kind.rows(batch):
                raise ConfigError(
                    f"a batch transform made {step.kind.rows(part):.0f} rows of {step.kind.rows(batch):.0f}, and they "
                    "had been counted before it; expected begin_update(batches), which counts after it"
                )
        if self._assumed:
            self._all_labelled(part)
        self._came += step.kind.rows(part) if self.by_trainer else 0.0
        if self._came > info.rows:
            raise ConfigError(
                f"begin_update(rows=) said {info.rows:.0f} rows, and {self._came:.0f} came; expected as many as the update has, "
                "over all micro-batches and ranks"
            )
        part = self._with_labels(part)
        info.micro = info.micros - self.open
        whole = info.micros == 1 and self._reduce is None
        info.share = 1.0 if whole else step.kind.rows(part) / info.rows
        return part

    def _with_labels(self, part: Batch) -> Batch:
        """Of an update with labels, a micro-batch without any says so row by row: every part then gives the same terms."""
        step = self._step
        if part.has_labels or not step.info.labelled or step.kind.labels != "classes":
            return part
        first = tensors_in(part.inputs)[0][1]
        shape = (len(part),) if part.mask is None else part.mask.shape
        return replace(part, labels=torch.full(shape, IGNORE, device=first.device))

    def _all_labelled(self, part: Batch) -> None:
        """Every row has a label, or none of the update's has; else the labels' mean would have another divisor."""
        rows, labelled = self._step.kind.rows(part), self._step.kind.labelled(part)
        if self.open == self._step.info.micros and not labelled:
            self._step.info.labelled = 0.0
        if labelled != (rows if self._step.info.labelled else 0.0):
            raise ConfigError(
                f"begin_update(rows=) came without labelled=, and {labelled:.0f} of this micro-batch's {rows:.0f} rows have a "
                "label; expected labelled=, the update's rows with one: losses on labels are divided by it"
            )

    def refuse_more(self) -> None:
        """Raise where the trainer has counted an update's rows, and hands in more micro-batches than it said."""
        if self.by_trainer:
            raise ConfigError(
                f"begin_update(rows=) said that the update has {self._step.info.micros} micro-batches, and a further one "
                "came; expected begin_update before it, or micros= as many"
            )

    def recount(self, batch: Batch, targets: Targets) -> None:
        """Count labels that a label transform gave or took away; refused where other micro-batches were counted before."""
        step = self._step
        before = step.kind.labelled(batch)
        own = replace(batch, labels=targets.labels, probabilities=targets.probabilities)
        after = step.kind.labelled(own)
        if after == before:
            return
        if step.info.micros > 1 or self._reduce is not None:
            raise ConfigError(
                f"a label transform made {after:.0f} labelled rows of {before:.0f}, and the update's were counted before it; "
                "expected as many: give labels in batch_transform, which is counted after, or make updates of one micro-batch"
            )
        step.info.labelled = after

    def made(self, metrics: Mapping[str, Tensor]) -> None:
        """A micro-batch has given its loss."""
        self._add(metrics)
        self.open, self._used = self.open - 1, True

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The metrics of the micro-batches that were made so far, summed: the update's, once none is open."""
        return dict(self._metrics)

    def close(self) -> dict[str, Tensor]:
        """The metrics of the update, summed over its micro-batches; empty where none was made."""
        made, self._metrics, self._used = self._metrics if self._used else {}, {}, False
        self._parts.clear()
        self.open = 0
        return made

    def abandon(self) -> None:
        """After an error: the update is given up, and the next call begins another."""
        self.close()
        self.by_trainer = False

    def _add(self, metrics: Mapping[str, Tensor]) -> None:
        found = self._metrics
        added = {name: found[name] + value if name in found else value for name, value in metrics.items()}
        self._metrics = {**found, **added}

    def _transformed(self, batch: Batch) -> Batch:
        step = self._step
        step.info.logged = {}
        try:
            given = step.plugins.batch_transform(batch, step.info)
        except (ValueError, IndexError, RuntimeError):
            step.batches.refuse_labels(batch)
            raise
        if not len(given):
            what = "a batch transform left" if len(batch) else "a batch holds"
            raise DataError(f"{what} no sample; expected one at least")
        self._add(step.info.logged)
        return given if given is batch else step.batches.complete(given)


def _same_batch(announced: Any, given: Any, *, contents: bool) -> None:
    """Raise where another micro-batch comes than was announced.

    contents
        Look at the numbers too; else at shapes alone, which cost no pass over the data.
    """
    told, came = _inputs(announced), _inputs(given)
    for name in sorted(told.keys() & came.keys()):
        one, other = told[name], came[name]
        if one.shape != other.shape:
            what = f"with {name} of shape {tuple(one.shape)}, and one of {tuple(other.shape)} came"
        elif contents and one.dtype == other.dtype and not torch.equal(one.to(other.device), other):
            what = f"and one with other {name} came"
        else:
            continue
        raise ConfigError(
            f"begin_update was told of a micro-batch {what}; expected the micro-batches in the order in which they were "
            "announced"
        )
    if not told.keys() & came.keys():
        raise ConfigError(
            f"begin_update was told of a micro-batch with {', '.join(told)}, and one with {', '.join(came)} came; expected the "
            "micro-batches that were announced"
        )


def _inputs(given: Any) -> dict[str, Tensor]:
    """The tensors of a batch's inputs by path, whether it is a Batch or what a loader gives."""
    if isinstance(given, Batch):
        given = given.inputs
    elif isinstance(given, tuple | list) and given:
        given = given[0]
    return dict(tensors_in(given))
