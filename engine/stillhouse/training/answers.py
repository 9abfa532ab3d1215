"""Who answers in the teacher's place in a stage: a teacher, several, a model that stands still, or kept soft labels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from stillhouse.contract.batch import Batch
from stillhouse.contract.context import TEACHER, Stage
from stillhouse.contract.outputs import TeacherOut
from stillhouse.errors import DataError
from stillhouse.models.stand_in import stand_in
from stillhouse.softlabels import SoftLabels
from stillhouse.training.teaching import Teachers, named, together

if TYPE_CHECKING:
    from stillhouse.training.step import DistillStep


class Answers:
    """The teacher's outputs for a batch, as the stage has them.

    stored
        The teacher's outputs kept on disk; read wherever a stage names the teacher.
    """

    def __init__(self, step: DistillStep, teachers: Teachers, stored: SoftLabels | None) -> None:
        self._step, self._teachers, self.stored = step, teachers, stored
        self._kept: SoftLabels | None = None
        self._models: dict[str, nn.Module] = {}
        self._own = False

    def set_up(self, stage: Stage, kept: SoftLabels | None) -> None:
        """Who answers from now on.

        kept
            Soft labels of the stage's split, read in place of a call. Without them, a stage against a
            model's outputs keeps a frozen copy of that model.
        """
        self.hold(stage)
        self._kept = self.stored if kept is None and stage.teacher == TEACHER else kept
        run = self._step.run
        if self._own and kept is None:
            assert run.probe is not None
            name = str(stage.teacher)
            self._models = {name: stand_in(run.models[name], run.probe.inputs, self._step.kind, name)}

    def hold(self, stage: Stage) -> None:
        """The teachers that the stage names; a model of the run answers from ``set_up`` on."""
        self._own = stage.teacher in self._step.run.models
        self._kept = self.stored if stage.teacher == TEACHER else None
        named = names_of(stage)
        self._models = {name: self._teachers.models[name] for name in named if name in self._teachers.models}

    @property
    def stand_in(self) -> nn.Module | None:
        """The frozen copy of a model of the run; None where teachers answer, or kept labels."""
        return next(iter(self._models.values()), None) if self._own else None

    def give(self, batch: Batch) -> TeacherOut | None:
        """The outputs for this batch; None in a stage without a teacher. Called without a graph."""
        step, stage = self._step, self._step.info.stage
        if stage.teacher is None:
            return None
        if self._kept is not None:
            if batch.ids is None:
                raise DataError(
                    "kept soft labels are found by sample id, and this batch has none; expected 'sample_id' (B,) in it. Rows "
                    "to evaluate on have ids behind the training rows', and are labelled with them"
                )
            kept = self._kept
            return TeacherOut(kept.targets(batch.ids, batch.mask), kept.features(batch.ids, batch.mask))
        first = next(iter(self._models.values()), None)
        given = step.plugins.teacher_forward(first, batch, step.info)
        if given is not None or first is None:
            return given
        # A model of this run reads what the student reads.
        inputs = batch.inputs if self._own else batch.for_teacher
        found = {name: self._called(name, model, inputs) for name, model in self._models.items()}
        if len(found) > 1:
            return together(found, classes=step.kind.labels == "classes")
        (name, out), *_ = found.items()
        # One of several by name: its features are found as they are where all of them answer.
        return (
            out
            if name == TEACHER or self._own
            else replace(out, features={**out.features, **named(name, out)})
        )

    def _called(self, name: str, model: nn.Module, inputs: object) -> TeacherOut:
        captures = self._step.captures
        with captures.collecting(name):
            out = self._step.heads.call(name, model, inputs, self._step.kind, captures.asks(name))
        return TeacherOut(out.logits, captures.take(name, out))


def names_of(stage: Stage) -> tuple[str, ...]:
    """The names of those who answer in a stage."""
    if stage.teacher is None:
        return ()
    return (stage.teacher,) if isinstance(stage.teacher, str) else stage.teacher
