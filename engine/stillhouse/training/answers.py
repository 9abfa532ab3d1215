"""Who answers in the teacher's place in a stage: a teacher, several, a model that stands still, or kept soft labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stillhouse.contract.batch import Batch
from stillhouse.contract.context import TEACHER, Stage
from stillhouse.contract.outputs import TeacherOut
from stillhouse.errors import ConfigError, DataError
from stillhouse.models.stand_in import stand_in
from stillhouse.softlabels import SoftLabels
from stillhouse.training.teaching import Teachers

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
        return (
            next(iter(found.values())) if len(found) == 1 else _together(found, step.kind.labels == "classes")
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


def _together(found: Mapping[str, TeacherOut], classes: bool) -> TeacherOut:
    """Several teachers as one: the mean of their log-probabilities, or of their outputs where these are none.

    The geometric mean of the distributions (Hinton et al. 2015, arXiv:1503.02531, section 3): it commutes with the
    temperature.
    """
    given: list[Tensor] = []
    for name, out in found.items():
        if not isinstance(out.logits, Tensor) or (given and out.logits.shape != given[0].shape):
            raise ConfigError(
                f"teacher '{name}' gives other outputs than the first; expected the same shape of each"
            )
        given.append(out.logits.float().log_softmax(-1) if classes else out.logits.float())
    features = {
        f"{name}.{module}": value for name, out in found.items() for module, value in out.features.items()
    }
    return TeacherOut(torch.stack(given).mean(0), features, dict(found))
