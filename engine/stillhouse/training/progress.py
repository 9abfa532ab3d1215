"""Takes a step through its stages: each is begun, set up and ended once, and the plugins are told.

A loop of ours asks for it stage by stage (``drive``); in somebody else's loop the updates that were made say where it stands.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from stillhouse.contract.context import Stage
from stillhouse.errors import ConfigError, StillhouseWarning
from stillhouse.softlabels import SoftLabels
from stillhouse.training.stages import StageSchedule

if TYPE_CHECKING:
    from stillhouse.training.step import DistillStep


class Progress:
    """Where a step stands.

    schedule
        The stages, their lengths, and the position.
    driven
        Whether a loop of ours enters and leaves the stages.
    started
        Whether the first stage has begun.
    """

    def __init__(self, step: DistillStep, stages: tuple[Stage, ...], steps: int | None) -> None:
        self._step, self.stages = step, stages
        self.schedule = StageSchedule(stages, steps, step.modules.of)
        self.driven = self.started = self._finished = self._told = False

    def drive(self, steps: int) -> StageSchedule:
        """From now on a loop enters and leaves the stages, which share ``steps``; the schedule that it follows."""
        self.driven = True
        self.schedule = StageSchedule(self.stages, steps, self._step.modules.of)
        return self.schedule

    def next(self) -> None:
        """Before an update in somebody else's loop: begin the stage that it belongs to, where it has not begun."""
        if self.driven:
            return
        schedule = self.schedule
        if not self.started:
            if not schedule.known and len(self.stages) > 1:
                names = ", ".join(stage.name for stage in self.stages)
                raise ConfigError(
                    f"the method has the stages {names}; expected steps=, the updates that they share"
                )
            self.begin(schedule.stage)
        while schedule.stage_done and schedule.at.stage + 1 < len(self.stages):
            self.leave()
            self.begin(schedule.stage)
        if schedule.stage_done and not self._told:
            self._told = True
            _warn(
                f"update {schedule.at.step + 1} begins, of {sum(schedule.lengths)} that the stages have: the last one goes on beyond "
                "its end"
            )

    def begin(self, stage: Stage, kept: SoftLabels | None = None) -> None:
        """Enter a stage at its beginning: the plugins are told, and it is set up."""
        if self.schedule.stage is not stage:
            self.schedule.jump(stage)
        self.announce()
        self.set_up(stage, kept)

    def announce(self) -> None:
        """Tell the plugins that the stage begins."""
        step = self._step
        step.plugins.notify("on_stage_start", run=step.run, stage=self.schedule.stage)

    def set_up(self, stage: Stage, kept: SoftLabels | None = None) -> None:
        """What is trained, what is held still, and who answers in the teacher's place.

        kept
            Soft labels of the stage's split, read in place of a call. Without them, a stage against a
            model's outputs keeps a frozen copy of that model.
        """
        step, at = self._step, self.schedule.at
        step.info.stage_steps = self.schedule.lengths[self.stages.index(stage)]
        step.info.index, step.info.stage_index = at.step, at.stage_step
        self.started = True
        step.watch_anew()
        self.hold(stage)
        step.answers.set_up(stage, kept)

    def hold(self, stage: Stage) -> None:
        """What the stage does not train stands still; nobody is told."""
        step = self._step
        step.info.stage = stage
        step.modules.hold(stage)
        step.answers.hold(stage)

    def advance(self) -> None:
        """An update was made."""
        info, at = self._step.info, self.schedule.at
        self.schedule.advance()
        info.index, info.stage_index = at.step, at.stage_step

    def leave(self) -> None:
        """End the stage: the teacher is looked at, and the plugins are told."""
        step = self._step
        step.teachers.check(step.plugins, whole=True)
        step.plugins.notify("on_stage_end", run=step.run, stage=self.schedule.stage)
        self.schedule.leave()

    def finish(self) -> None:
        """End the last stage and the run, of somebody else's loop."""
        if self._finished or self.driven or not self.started:
            return
        self._finished = True
        self._tell_short()
        self.leave()
        self._step.plugins.notify("on_run_end", run=self._step.run)

    def _tell_short(self) -> None:
        """Warn of a loop that ends before its steps do: stages that were never begun taught nothing."""
        schedule, expected = self.schedule, sum(self.schedule.lengths)
        if not schedule.known or schedule.at.step >= expected:
            return
        left = ", ".join(stage.name for stage in self.stages[schedule.at.stage + 1 :])
        unseen = f", and the stages {left} never began" if left else ""
        _warn(f"the loop ended after {schedule.at.step} updates, of {expected} that the stages have{unseen}")


def _warn(what: str) -> None:
    warnings.warn(
        f"{what}; expected steps= as many as the loop makes: methods share them out between stages and schedules",
        StillhouseWarning,
        stacklevel=2,
    )
