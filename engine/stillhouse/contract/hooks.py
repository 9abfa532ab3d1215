"""The hook specifications: the contract between the engine and every method.

A plugin implements the hooks it needs and takes, by name, the arguments it needs. An argument never
changes its meaning; new ones may be added. Implementations run in the order of the config. ``first
result`` hooks stop at the first answer that is not None, and two plugins may not both claim one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from stillhouse.contract.batch import Batch
    from stillhouse.contract.context import Auxiliary, RunContext, Stage, StepInfo
    from stillhouse.contract.outputs import LossTerm, StudentOut, Targets, TeacherOut
    from stillhouse.contract.splits import Split

PROJECT = "stillhouse"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class StepHooks:
    """The four hook points, the change of inputs before them, and the student's own forward pass."""

    @hookspec
    def batch_transform(self, batch: Batch, info: StepInfo) -> Batch | None:
        """Change the batch before any model sees it (mixup, augmentation); None leaves it.

        Folded in config order. Rows are counted on what comes out, which may be more or fewer. A run with such
        a plugin calls the teacher on it, and never reads kept soft labels.
        """

    @hookspec(firstresult=True)
    def teacher_forward(self, teacher: nn.Module | None, batch: Batch, info: StepInfo) -> TeacherOut | None:
        """Give the teacher's outputs for the batch. Default: read kept soft labels, else call the teacher.

        Runs without a graph and with the teacher in eval mode.
        """

    @hookspec(firstresult=True)
    def student_forward(self, student: nn.Module, batch: Batch, info: StepInfo) -> StudentOut | None:
        """Give the student's outputs for the batch, with a graph. Default: call the student on ``batch.inputs``.

        ``student`` is what the trainer calls: the stage's model, or a wrapper of it.
        """

    @hookspec
    def label_transform(
        self, targets: Targets, batch: Batch, teacher_out: TeacherOut | None, info: StepInfo
    ) -> Targets | None:
        """Change what the losses compare with; None leaves it. Folded in config order."""

    @hookspec
    def loss_terms(
        self,
        student_out: StudentOut | None,
        teacher_out: TeacherOut | None,
        targets: Targets,
        batch: Batch,
        info: StepInfo,
    ) -> Mapping[str, LossTerm] | None:
        """Give named loss terms; the loss is the sum of ``weight * value`` over every plugin's terms."""

    @hookspec
    def combine_terms(self, terms: dict[str, LossTerm], info: StepInfo) -> Mapping[str, LossTerm] | None:
        """Re-weight or replace the terms of all plugins before they are summed. Folded in config order."""

    @hookspec(firstresult=True)
    def student_update(
        self, student: nn.Module, optimizer: Optimizer, loss: Tensor, info: StepInfo
    ) -> bool | None:
        """Use the loss of one micro-batch: backward, and at ``info.last`` clip and info. True when done.

        Needs the capability ``student_update``. Default: ``loss.backward()``; at the update's last
        micro-batch clip the gradients, step the optimizer, clear the gradients.
        """


class LifeHooks:
    """The life of a run."""

    @hookspec
    def on_run_start(self, run: RunContext) -> None:
        """Look at the models and the data, ask for features, make auxiliary modules. Before step 0."""

    @hookspec
    def auxiliary_modules(self, run: RunContext) -> Mapping[str, nn.Module | Auxiliary] | None:
        """Give the modules trained beside the student; they get optimizer groups and travel in checkpoints."""

    @hookspec(firstresult=True)
    def stages(self, run: RunContext) -> Sequence[Stage] | None:
        """Give the run's stages, or None to leave them to another method; one method may give some.

        Default: one, on the labelled data, against the teacher.
        """

    @hookspec(firstresult=True)
    def stage_rows(self, run: RunContext, stage: Stage, split: Split) -> Tensor | None:
        """Give the sample numbers ``(n,)`` of the split that the stage trains on. Default: each sample once.

        A row that stands twice is drawn twice as often. Asked when a stage begins and again on a resume,
        so the answer may depend on the arguments (and ``run.seed``) alone.
        """

    @hookspec
    def on_stage_start(self, run: RunContext, stage: Stage) -> None:
        """Called once, when a stage begins; not again on a resume: what lasts goes into ``state_dict``."""

    @hookspec
    def on_update_end(self, info: StepInfo, metrics: Mapping[str, Tensor]) -> None:
        """Called once after each student update, with its detached metrics: terms, ``loss``, and what was logged."""

    @hookspec
    def on_stage_end(self, run: RunContext, stage: Stage) -> None:
        """Called once, when a stage has made its updates, before its checkpoint is written."""

    @hookspec
    def on_run_end(self, run: RunContext) -> None:
        """Called once, after the last stage, before the final evaluation."""

    @hookspec
    def state_dict(self) -> dict[str, Any] | None:
        """Give what the plugin must find again after a resume: tensors, numbers, strings, lists, dicts."""

    @hookspec
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave; called with this plugin's own state only."""


SINCE: dict[str, int] = {}
"""Hooks that are younger than version 1, each with the api_version that brought it.

An older plugin may use such a name for a method of its own.
"""

FIRST_RESULT = ("teacher_forward", "student_forward", "student_update", "stages", "stage_rows")
"""Hooks of which one run may have one implementation."""
