"""The reference loop: stages, updates, micro-batches. Readable top to bottom; yours may replace it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from stillhouse.config import Training
from stillhouse.contract.batch import Batch
from stillhouse.contract.context import TEACHER, Stage
from stillhouse.contract.splits import Split, Splits
from stillhouse.errors import ConfigError
from stillhouse.softlabels import SoftLabels
from stillhouse.training import optim
from stillhouse.training.order import Order
from stillhouse.training.random_state import RandomState
from stillhouse.training.step import DistillStep


@dataclass
class Position:
    """Where a loop stands: the stage's number, the updates made in it, and in the whole run."""

    stage: int = 0
    stage_step: int = 0
    step: int = 0


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
        for stage in step.stages:
            if stage.top_per_class is not None and not self._keepable(stage):
                raise _nothing_kept(stage)
        self.lengths = stage_lengths(step.stages, settings.steps)
        self.at = Position()
        self.random = RandomState.seeded(settings.seed)
        self.optimizer: torch.optim.Optimizer | None = None
        self._trained: tuple[str, ...] = ()
        self._stand_in: Mapping[str, Tensor] | None = None
        self._ready = self._running = False

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
            while self.at.stage < len(self.lengths):
                if not self._ready:
                    self._enter()
                while self.at.stage_step < self.lengths[self.at.stage]:
                    if made == steps:
                        return False
                    self._update()
                    made += 1
                self._leave()
            return True
        finally:
            self.random, self._running = RandomState.capture(), False
            outside.restore()

    def _update(self) -> None:
        step, settings = self.step, self.settings
        index = self.order.batch(self.at.stage_step)
        batch = self.split.batch(index if self.rows is None else self.rows[index])
        if self.device.type != "cpu":
            batch = batch.to(self.device)
        parts = micro_batches(batch, settings.micro_batch_size)
        step.begin_update(parts)
        metrics: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            step.info.micro = number
            with self._autocast():
                loss, terms = step(self.model, part)
            self._use(loss)
            metrics = _add(metrics, terms)
        if self.scheduler is not None:
            self.scheduler.step()
        step.end_update(metrics)
        self.at.stage_step += 1
        self.at.step += 1
        self.watcher.updated(self, metrics)

    def _use(self, loss: Tensor) -> None:
        assert self.optimizer is not None
        if self.step.plugins.student_update(self.model, self.optimizer, loss, self.step.info):
            return
        if not loss.requires_grad:
            raise self.step.idle()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.step.info.last:
            if self.settings.clip is not None:
                clip_grad_norm_(self._parameters, self.settings.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()

    # Stages.

    def _enter(self) -> None:
        """Begin the stage, or take it up in its middle after a resume."""
        stage = self.step.stages[self.at.stage]
        self.split = self.splits.stage(stage.data)
        if self.at.stage_step == 0:
            self.step.plugins.notify("on_stage_start", run=self.step.run, stage=stage)
        kept = self.watcher.keep(self, self.split)
        self.rows = self.step.plugins.stage_rows(self.step.run, stage, self.split)
        if stage.top_per_class is not None:
            self.rows = most_confident(kept, stage, self.split)
        self.order = self._order(len(self.split) if self.rows is None else len(self.rows))
        self.step.begin(stage, self.lengths[self.at.stage], kept)
        if self._stand_in is not None and self.step.stand_in is not None:
            self.step.stand_in.load_state_dict(self._stand_in)
        self._stand_in = None
        self.step.info.index, self.step.info.stage_index = self.at.step, self.at.stage_step
        self.model = self.step.model(stage)
        self._optimize(stage)
        self._ready = True

    def _keepable(self, stage: Stage) -> bool:
        plugins, captures = self.step.plugins, self.step.captures
        if not self.splits.stage(stage.data).fixed or plugins.implements("batch_transform"):
            return False
        asked = captures.asked(TEACHER) or plugins.implements("teacher_forward")
        return stage.teacher != TEACHER or (self.settings.cache_teacher and not asked)

    def _order(self, rows: int) -> Order:
        return Order(rows, self.settings.batch_size, self.settings.seed, self.at.stage)

    def _leave(self) -> None:
        self.step.check_teacher()
        self.step.plugins.notify("on_stage_end", run=self.step.run, stage=self.step.info.stage)
        self.at.stage, self.at.stage_step, self._ready = self.at.stage + 1, 0, False
        self.watcher.stage_ended(self)

    def _optimize(self, stage: Stage) -> None:
        """A new optimizer and schedule where the trained modules change; else the ones there go on."""
        trained = self.step.trained(stage)
        if trained == self._trained and self.optimizer is not None:
            return
        groups = parameter_groups(self.step, trained)
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        if not self._parameters:
            raise ConfigError(
                f"stage '{stage.name}' trains {', '.join(trained) or 'nothing'}, and no parameter there can be "
                "trained; expected one at least with requires_grad=True: unfreeze some"
            )
        self.optimizer = optim.make_optimizer(groups, self.settings.optimizer)
        self.scheduler = optim.make_scheduler(self.optimizer, self.settings.scheduler, self._span(trained))
        self._trained = trained

    def _span(self, trained: tuple[str, ...]) -> int:
        """Updates of this stage and of those around it that train the same modules."""
        same = [self.step.trained(stage) == trained for stage in self.step.stages]
        first = last = self.at.stage
        while first > 0 and same[first - 1]:
            first -= 1
        while last + 1 < len(same) and same[last + 1]:
            last += 1
        return sum(self.lengths[first : last + 1])

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, and nothing of the teacher."""
        optimizing = self.optimizer is not None
        stand_in = self.step.stand_in if self.at.stage_step else None
        return {
            "position": asdict(self.at),
            "models": {name: model.state_dict() for name, model in self.step.run.models.items()},
            "plugins": self.step.plugins.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
            "scheduler": self.scheduler.state_dict() if optimizing and self.scheduler else None,
            "trained": list(self._trained),
            "random": (RandomState.capture() if self._running else self.random).state,
            "teacher_calls": self.step.teacher_calls,
            # A model that was copied when the stage began: it can't be made again from the model trained since.
            "stand_in": None if stand_in is None else stand_in.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken."""
        for name, model in self.step.run.models.items():
            model.load_state_dict(state["models"][name])
        self.step.plugins.load_state_dict(state["plugins"])
        self.at = Position(**state["position"])
        self.step.teacher_calls = state["teacher_calls"]
        self.random = RandomState(state["random"])
        self._stand_in = state["stand_in"]
        if state["optimizer"] is not None:
            self._restore_optimizer(state)

    def _restore_optimizer(self, state: Mapping[str, Any]) -> None:
        trained = tuple(state["trained"])
        stands = min(self.at.stage, len(self.lengths) - 1)
        # At a stage's end the optimizer is still the last stage's; it may go on into the next.
        owner = next(
            (
                number
                for number in (stands, stands - 1)
                if self.step.trained(self.step.stages[number]) == trained
            ),
            stands,
        )
        here, self.at.stage = self.at.stage, owner
        self._optimize(self.step.stages[owner])
        self.at.stage = here
        assert self.optimizer is not None
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def _add(total: dict[str, Tensor], terms: dict[str, Tensor]) -> dict[str, Tensor]:
    if not total:
        return terms
    return {name: total[name] + value if name in total else value for name, value in terms.items()}


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """The batch in parts of at most ``size`` samples."""
    if size is None or size >= len(batch):
        return [batch]
    return [batch.part(slice(start, start + size)) for start in range(0, len(batch), size)]


def most_confident(kept: SoftLabels | None, stage: Stage, split: Split) -> Tensor:
    """Ids of the ``stage.top_per_class`` rows of each class that the kept soft labels are surest of."""
    if kept is None:
        raise _nothing_kept(stage)
    found = [_surest(labels) for _, labels in kept.blocks()]
    confidence, predicted = (torch.cat(values) for values in zip(*found, strict=True))
    chosen = []
    for label in torch.unique(predicted):
        ids = (predicted == label).nonzero()[:, 0]
        chosen.append(ids[confidence[ids].argsort(descending=True, stable=True)[: stage.top_per_class]])
    return torch.cat(chosen).sort().values.cpu()


def _surest(labels: Any) -> tuple[Tensor, Tensor]:
    """The greatest probability of each row of a block, and its class."""
    if not isinstance(labels, Tensor):
        raise ConfigError("rows are chosen by the teacher's logits; expected kept soft labels of form dense")
    confidence, predicted = labels.softmax(-1).max(-1)
    return confidence, predicted


def _nothing_kept(stage: Stage) -> ConfigError:
    return ConfigError(
        f"stage '{stage.name}' chooses rows by kept soft labels, and none can be kept here: "
        "the split's rows must be fixed, and cache_teacher true"
    )


def parameter_groups(step: DistillStep, trained: Sequence[str]) -> list[dict[str, Any]]:
    """An optimizer group for each trained module; a parameter shared by two stands in the first."""
    seen: set[int] = set()
    groups = []
    for name in trained:
        own = [parameter for parameter in step.trainable[name] if id(parameter) not in seen]
        seen.update(id(parameter) for parameter in own)
        if own:
            groups.append({"params": own, **step.options(name)})
    return groups


def stage_lengths(stages: Sequence[Stage], steps: int) -> list[int]:
    """Updates of each stage: ``steps`` shared out, and stages with a length of their own on top."""
    total = sum(stage.share for stage in stages if stage.steps is None) or 1.0
    lengths, passed, given = [], 0.0, 0
    for stage in stages:
        if stage.steps is not None:
            lengths.append(stage.steps)
            continue
        passed += stage.share
        upto = round(steps * passed / total)
        lengths.append(upto - given)
        given = upto
    return lengths
