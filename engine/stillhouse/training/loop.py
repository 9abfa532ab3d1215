"""The reference loop: stages, updates, micro-batches. Readable top to bottom; yours may replace it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from stillhouse.config import Training
from stillhouse.contract.batch import Batch
from stillhouse.contract.context import STUDENT
from stillhouse.contract.reading import Reading
from stillhouse.contract.splits import Split, Splits
from stillhouse.errors import ConfigError
from stillhouse.softlabels import SoftLabels
from stillhouse.training import optim
from stillhouse.training.order import order_of, stage_seed
from stillhouse.training.random_state import RandomState
from stillhouse.training.stages import Position
from stillhouse.training.step import DistillStep


class Watcher(Protocol):
    """What the loop tells the run around it."""

    def updated(self, loop: Loop, metrics: Mapping[str, Tensor]) -> None: ...
    def stage_ended(self, loop: Loop) -> None: ...
    def keep(self, loop: Loop, split: Split) -> SoftLabels | None: ...


class Loop:
    """Trains what a DistillStep says, on the splits, as ``settings`` has it."""

    def __init__(
        self, step: DistillStep, splits: Splits, settings: Training, device: torch.device, watcher: Watcher
    ) -> None:
        self.step, self.splits, self.settings, self.device = step, splits, settings, device
        self.watcher = watcher
        self.schedule = step.progress.drive(settings.steps)
        self.random = RandomState.seeded(settings.seed)
        self.optimizer: torch.optim.Optimizer | None = None
        self._span = -1  # the stages that the optimizer was made for
        self._stand_in: Mapping[str, Tensor] | None = None
        self._batches: Iterator[Batch] | None = None
        self._running = False

    def run(self, steps: int | None = None) -> bool:
        """Make ``steps`` updates, or all that are left; True when the last stage has ended.

        The random generators are this loop's own while it runs: two loops taking turns in one process
        give what each gives alone.
        """
        outside = RandomState.capture()
        self.random.restore()
        self._running = True
        try:
            made = 0
            while not self.schedule.over:
                if self._batches is None:
                    self._enter()
                while not self.schedule.stage_done:
                    if made == steps:
                        return False
                    self._update()
                    made += 1
                self._leave()
        except BaseException:
            self._batches = None  # workers that read ahead end with it
            raise
        else:
            return True
        finally:
            self.random, self._running = RandomState.capture(), False
            outside.restore()

    def _update(self) -> None:
        step = self.step
        assert self._batches is not None
        parts = micro_batches(next(self._batches), self.settings.micro_batch_size)
        step.begin_update(parts)
        for part in parts:
            with self._autocast():
                loss, _ = step(self.model, part)
            self._use(loss)
        if self.scheduler is not None:
            self.scheduler.step()
        metrics = step.end_update()
        self.watcher.updated(self, metrics)

    def _use(self, loss: Tensor) -> None:
        assert self.optimizer is not None
        if self.step.plugins.student_update(self.model, self.optimizer, loss, self.step.info):
            return
        if not loss.requires_grad:
            raise self.step.idle()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.step.update.open == 0:
            if self.settings.clip is not None:
                clip_grad_norm_(self._parameters, self.settings.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()

    # Stages.

    def _enter(self) -> None:
        """Begin the stage, or take it up in its middle after a resume."""
        step, stage = self.step, self.schedule.stage
        self.split = self.splits.stage(stage.data)
        if self.at.stage_step == 0:
            step.progress.announce()
        kept = self.watcher.keep(self, self.split)
        rows = step.plugins.stage_rows(step.run, stage, self.split)
        step.progress.set_up(stage, kept)
        if self._stand_in is not None and step.answers.stand_in is not None:
            step.answers.stand_in.load_state_dict(self._stand_in)
        self._stand_in = None
        self.model = step.model(stage)
        if self._span != self.schedule.span:
            self._optimize(self.schedule.span)
        self._batches = self._read(rows)

    def _read(self, rows: Tensor | None) -> Iterator[Batch]:
        """The stage's batches from where the run stands; ``rows``: those that a method chose."""
        at, settings = self.at, self.settings
        if at.stage_step and not self.split.numbered:
            self.step.host.say(
                f"the data have no row numbers: {at.stage_step} batches are read once more and dropped, up to where the "
                "run was"
            )
        order = order_of(self.split, settings.batch_size, settings.seed, at.stage, rows)
        reading = Reading(
            workers=settings.workers,
            pin_memory=self.device.type == "cuda",
            seed=stage_seed(settings.seed, at.stage),
            start=at.stage_step,
        )
        return self.split.stream(order.rest(at.stage_step, self.schedule.length, rows), reading)

    def _leave(self) -> None:
        self.step.progress.leave()
        self._batches = None
        self.watcher.stage_ended(self)

    def _optimize(self, span: int) -> None:
        """A new optimizer and schedule, for stages one after the other that train the same modules."""
        trained, updates = self.schedule.spans[span].trained, self.schedule.spans[span].updates
        groups = self.step.parameter_groups(trained)
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        if not self._parameters:
            raise ConfigError(
                f"stage '{self.schedule.stage.name}' trains {', '.join(trained) or 'nothing'}, and no parameter there "
                "can be trained; expected one at least with requires_grad=True: unfreeze some"
            )
        self.optimizer = optim.make_optimizer(groups, self.settings.optimizer)
        self.scheduler = optim.make_scheduler(self.optimizer, self.settings.scheduler, updates)
        self._span = span

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    # Checkpoints.

    @property
    def at(self) -> Position:
        """Where the run stands."""
        return self.schedule.at

    @property
    def lengths(self) -> list[int]:
        """Updates of each stage."""
        return self.schedule.lengths

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, and nothing of the teacher."""
        step = self.step.state_dict()
        optimizing = self.optimizer is not None
        return {
            **step,
            "models": {**step["models"], STUDENT: self.step.run.student.state_dict()},
            "stand_in": step["stand_in"] if self.at.stage_step else None,
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
            "scheduler": self.scheduler.state_dict() if optimizing and self.scheduler else None,
            "span": self._span,
            "random": (RandomState.capture() if self._running else self.random).state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken."""
        for name, model in self.step.run.models.items():
            model.load_state_dict(state["models"][name])
        self.step.plugins.load_state_dict(state["plugins"])
        self.schedule.load_state_dict(state["position"])
        self.step.teacher_calls = state["teacher_calls"]
        self.random = RandomState(state["random"])
        self._stand_in, self._batches = state["stand_in"], None
        if state["optimizer"] is not None:
            self._optimize(state["span"])
            assert self.optimizer is not None
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """The batch in parts of at most ``size`` samples, as even as can be: none is left with a single sample."""
    if size is None or size >= len(batch):
        return [batch]
    count = -(-len(batch) // size)
    ends = [round(len(batch) * part / count) for part in range(count + 1)]
    return [batch.part(slice(start, end)) for start, end in pairwise(ends)]
