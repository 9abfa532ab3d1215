"""What a loader gives, as a step reads it: by the task's kind, with what the student makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from stillhouse.contract.batch import Batch
from stillhouse.contract.kinds import TaskKind
from stillhouse.models.calling import unwrapped
from stillhouse.training.compatibility import refuse_labels, row_shape


class Batches:
    """Reads batches for one step.

    classes
        How many class numbers every model of the run has an output for.
    """

    def __init__(self, kind: TaskKind, student: nn.Module) -> None:
        self._kind, self._student = kind, student
        self._rows: Callable[[Batch], tuple[int, ...]] | None = None
        self.classes = 0

    def learn(self, probe: Batch) -> Batch:
        """See on the probe which positions the student gives outputs for; the probe, completed."""
        self._rows = row_shape(self._kind, self._student, probe)
        return self.complete(probe)

    def read(self, given: Any) -> Batch:
        """A Batch from what a loader gives, by the task's kind."""
        batch = self._kind.read(given)
        if self._kind.name == "seq2seq_lm" and isinstance(batch.inputs, Mapping):
            batch = _with_decoder_inputs(batch, unwrapped(self._student))
        return batch

    def complete(self, batch: Batch) -> Batch:
        """The batch with a mask wherever its rows are positions."""
        return self._kind.complete(batch, None if self._rows is None else self._rows(batch))

    def refuse_labels(self, batch: Batch) -> None:
        """DataError where class numbers of the batch have no output: asked when something failed."""
        if self._kind.labels == "classes":
            refuse_labels(batch.labels, self.classes)


def _with_decoder_inputs(batch: Batch, student: nn.Module) -> Batch:
    """The decoder's inputs, made from the labels as the model makes them, where the batch has none."""
    make = getattr(student, "prepare_decoder_input_ids_from_labels", None)
    if batch.labels is None or make is None:
        return batch
    teacher = batch.teacher_inputs  # ids of their own where the batch has some
    others = [inputs for inputs in (batch.inputs, teacher) if isinstance(inputs, Mapping)]
    if all("decoder_input_ids" in inputs for inputs in others):
        return batch
    made = {"decoder_input_ids": make(labels=batch.labels)}
    return replace(
        batch,
        inputs={**made, **batch.inputs},
        teacher_inputs={**made, **teacher} if isinstance(teacher, Mapping) else teacher,
    )
