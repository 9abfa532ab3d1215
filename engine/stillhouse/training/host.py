"""What stands behind a RunContext: a plugin's wishes, and who had them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stillhouse.contract.batch import Batch
from stillhouse.contract.context import TEACHER
from stillhouse.contract.outputs import StudentOut, TeacherOut
from stillhouse.errors import ConfigError, nearest
from stillhouse.models.calling import call, evaluating
from stillhouse.training.teaching import together

if TYPE_CHECKING:
    from stillhouse.training.step import DistillStep


class StepHost:
    """Answers for a step what plugins ask of their run.

    captured
        Which plugin asked for features of which model.
    """

    def __init__(self, step: DistillStep, say: Callable[[str], None]) -> None:
        self._step, self._say = step, say
        self.captured: set[tuple[str, str]] = set()

    def look(self, role: str, batch: Batch) -> StudentOut:
        """A model's outputs and features, in eval mode and without a graph."""
        step = self._step
        models = {**step.run.models, **step.teachers.models}
        if role not in models:
            raise ConfigError(f"outputs of '{role}': no such model{nearest(role, models)}")
        if role == TEACHER and step.teachers.several:
            each = {name: self._called(name, batch) for name in step.teachers.several}
            found = {name: TeacherOut(out.logits, out.features) for name, out in each.items()}
            whole = together(found, classes=step.kind.labels == "classes")
            assert isinstance(whole.logits, Tensor)
            return StudentOut(whole.logits, whole.features)
        return self._called(role, batch)

    def _called(self, role: str, batch: Batch) -> StudentOut:
        step = self._step
        models = {**step.run.models, **step.teachers.models}
        inputs = batch.for_teacher if role in step.teachers.models else batch.inputs
        with torch.random.fork_rng(), evaluating(models[role]), step.captures.collecting(role):
            out = call(models[role], inputs, step.kind, step.captures.asks(role))
        return StudentOut(out.logits, step.captures.take(role, out))

    def capture(self, role: str, module: str) -> None:
        """Ask for a module's output; see RunContext."""
        several = self._step.teachers.several
        if role == TEACHER and several:
            raise ConfigError(
                f"features of teacher.{module}: there are several teachers; expected one of {', '.join(several)} in place of teacher"
            )
        self.captured.add((self._step.run.caller, role))
        self._step.captures.add(role, module)

    def say(self, message: str) -> None:
        """A line for people."""
        self._say(message)
