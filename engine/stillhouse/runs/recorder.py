"""What a run writes while it trains: metrics, validation scores, checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.config import RunConfig, dump
from stillhouse.contract.context import STUDENT
from stillhouse.contract.observers import Observer
from stillhouse.contract.splits import Split
from stillhouse.contract.task import Task
from stillhouse.errors import CheckpointError, DamagedFile, Diverged
from stillhouse.files import check_seal, read_bytes
from stillhouse.files.lock import Lock
from stillhouse.runs import checkpoint, directory
from stillhouse.runs.display import Display
from stillhouse.runs.evaluate import score
from stillhouse.runs.interrupts import Interrupted, Interrupts
from stillhouse.runs.metrics import Metrics
from stillhouse.softlabels import SoftLabels
from stillhouse.training.labels import keep
from stillhouse.training.loop import Loop

SOUND = 1000.0
"""A checkpoint is sound once a loss after it was within this many times the stage's first one (or 1): a run that diverges
leaves checkpoints that are finite, and lost."""


class Recorder:
    """Watches a loop and keeps what it does in the run directory (nothing where there is none)."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        validation: Split | None,
        device: torch.device,
        display: Display,
        folder: Path | None,
        observers: Sequence[Observer] = (),
        origin: Mapping[str, Any] | None = None,
        lock: Lock | None = None,
    ) -> None:
        self.config, self.task, self.validation, self.device = config, task, validation, device
        self.display, self.folder, self.observers = display, folder, observers
        self.origin, self._lock = origin or {}, lock
        self.metrics = Metrics(None if folder is None else folder / directory.METRICS)
        self.interrupts = Interrupts()
        self.seconds = 0.0
        self._since = time.perf_counter()
        self._first_loss: float | None = None
        self._sound: int | None = None  # the newest checkpoint that a loss within range came after
        self._untried: int | None = None  # one that no loss was looked at after
        self._stage_began: int | None = None  # what kept soft labels could be made again from
        self._every_update = device.type == "cpu"  # looking at a number on a GPU waits for it

    # The loop's watcher.

    def updated(self, loop: Loop, metrics: Mapping[str, Tensor]) -> None:
        step, config = loop.at.step, self.config
        logging = step % config.log_every == 0
        if self._every_update or logging:
            self._judge(loop, metrics)
        self.display.advance(step)
        if logging:
            self._log(loop, metrics)
        if step % config.validate_every == 0:
            self._validate(loop)
        if self.interrupts.asked is not None:
            self.checkpoint(loop)
            kept = "the checkpoint is written: go on with --resume (in Python: resume=True)"
            raise Interrupted(
                f"interrupted after update {step}; {kept if self.folder else 'nothing is kept without dir=DIR'}",
                self.interrupts.asked,
            )
        if step % config.checkpoint_every == 0:
            self.checkpoint(loop)

    def stage_ended(self, loop: Loop) -> None:
        self._stage_began = loop.at.step
        self._first_loss = None
        self.checkpoint(loop)

    def keep(self, loop: Loop, split: Split) -> SoftLabels | None:
        stage = loop.step.stages[loop.at.stage]
        kept = keep(loop, split, None if self.folder is None else self.folder / directory.SOFT_LABELS)
        self.display.stage(
            stage.name, loop.at.step, loop.at.step - loop.at.stage_step + loop.lengths[loop.at.stage]
        )
        return kept

    def _log(self, loop: Loop, metrics: Mapping[str, Tensor]) -> None:
        values = {name: value.item() for name, value in metrics.items()}
        assert loop.optimizer is not None
        row = {
            "step": loop.at.step,
            "stage": loop.step.info.stage.name,
            **values,
            "lr": loop.optimizer.param_groups[0]["lr"],
            "seconds": round(self.elapsed(), 3),
        }
        self._write(row)
        self.display.terms(values)

    def _validate(self, loop: Loop) -> None:
        if self.validation is None:
            return
        scores = score(self.task, loop.model, self.validation, self.device, config=self.config)
        stage = loop.step.info.stage
        row = {"step": loop.at.step, "stage": stage.name, "model": stage.model or STUDENT}
        self._write({**row, **{f"validation.{name}": value for name, value in scores.items()}})
        self.display.validated(loop.at.step, scores)

    def check_place(self) -> None:
        """Raise CheckpointError where the directory that the run holds was moved away from its path."""
        if self._lock is not None:
            self._lock.check()

    def _write(self, row: dict[str, Any]) -> None:
        self.check_place()
        self.metrics.add(row)
        for observer in self.observers:
            observer.on_metrics(row)

    def _judge(self, loop: Loop, metrics: Mapping[str, Tensor]) -> None:
        """Stop at a loss that is not finite; learn from one within range that the last checkpoint is good."""
        loss = metrics["loss"].item()
        if not math.isfinite(loss):
            raise self._diverged(loop, metrics)
        if self._first_loss is None:
            self._first_loss = loss
        if self._untried is not None and abs(loss) <= SOUND * max(abs(self._first_loss), 1.0):
            self._sound, self._untried = self._untried, None

    def _diverged(self, loop: Loop, metrics: Mapping[str, Tensor]) -> Diverged:
        step = loop.at.step
        bad = [name for name, value in metrics.items() if not math.isfinite(value.item()) and name != "loss"]
        last = self._last()
        what = (
            ", ".join(f"{name} = {metrics[name].item()}" for name in bad)
            or "the sum of finite terms overflowed"
        )
        named = {name.partition(".")[0] for name in bad}
        who = " and ".join(str(plugin) for plugin in loop.step.plugins.plugins if plugin.name in named)
        return Diverged(
            f"loss is not finite after update {step}: {what}{f' of {who}' if who else ''}{last}, or look at the inputs of "
            "that term"
        )

    # Time, checkpoints, resume.

    def elapsed(self) -> float:
        """Seconds of training, over every part of a resumed run."""
        return self.seconds + time.perf_counter() - self._since

    def checkpoint(self, loop: Loop) -> None:
        """Write one, unless nothing is kept."""
        if self.folder is None:
            return
        self.check_place()
        loop.step.teachers.check(loop.step.plugins, whole=True)
        self._refuse_broken(loop)
        step = loop.at.step
        self._untried = step
        content = {
            **loop.state_dict(),
            "seconds": self.elapsed(),
            "config": json.dumps(dump(self.config)),
            "origin": dict(self.origin),
            "metrics": self.metrics.state(),
            "first_loss": self._first_loss,
            "sound": self._sound,
            "stage_began": self._stage_began,
        }
        keep = {kept for kept in (self._sound, self._stage_began) if kept is not None}
        checkpoint.write(self.folder / directory.CHECKPOINTS, step, content, keep)

    def _refuse_broken(self, loop: Loop) -> None:
        """Stop where weights are not finite: the loss that told of it comes only with the next update."""
        for role, model in loop.step.run.models.items():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not parameter.isfinite().all():
                    raise Diverged(
                        f"'{name}' of {role} holds NaN or infinity after update {loop.at.step}{self._last()}"
                    )

    def _last(self) -> str:
        """What a run that diverged can go on from."""
        if self.folder is None:
            return ". Lower optimizer.lr, set clip"
        kept = "no checkpoint from before is good, --resume then starts over"
        if self._sound is not None:
            kept = f"the checkpoint of update {self._sound} is kept, --resume then goes on from it"
        return f"; {kept}. Lower optimizer.lr, set clip"

    def advised(self, error: Diverged) -> Diverged:
        """The error, with what the run can go on from."""
        return (
            error if "--resume" in str(error) or self.folder is None else Diverged(f"{error}{self._last()}")
        )

    def diverged(self, loop: Loop, error: Diverged) -> dict[str, Any]:
        """The entry of the manifest's history."""
        return {"event": "diverged", "at": loop.at.step, "sound": self._sound, "why": str(error)}

    def resume(self, loop: Loop, *, free: Sequence[str] = (), upto: float = math.inf) -> int | None:
        """Take up the newest checkpoint that is as it was written; its update, or None where there is none.

        Newer ones, which are not, are removed: they would stand in the way of those that the run writes next.

        free, upto
            For a run that diverged: config keys that may differ from the checkpoint's (the optimizer is brought in
            line), and the update of the last good checkpoint.

        Raises DamagedFile where there are some and none is good.
        """
        assert self.folder is not None
        folder = self.folder / directory.CHECKPOINTS
        checkpoint.tidy(folder)
        content, path = self._newest_good(upto)
        if content is None or path is None:
            self.metrics.resume(None)
            return None
        old = json.loads(content["config"])
        if differing := directory.differing(old, self.config, free):
            raise CheckpointError(
                f"checkpoint {path} is another run's ({differing}); remove it, or choose out=DIR"
            )
        directory.same_origin(self.folder, content["origin"], self.origin)
        try:
            loop.load_state_dict(content)
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"checkpoint {path} does not fit this run: {error}") from None
        if free:
            relearn(loop, RunConfig.model_validate(old))
        self.seconds, self._since = content["seconds"], time.perf_counter()
        self._first_loss, self._stage_began = content["first_loss"], content["stage_began"]
        self._sound, self._untried = content["sound"], loop.at.step
        if note := self.metrics.resume(content["metrics"]):
            self.display.say(note)
        return loop.at.step

    def _newest_good(self, upto: float) -> tuple[dict[str, Any] | None, Path | None]:
        assert self.folder is not None
        problems: list[str] = []
        passed: list[Path] = []
        found: tuple[dict[str, Any] | None, Path | None] = (None, None)
        for path in reversed(checkpoint.checkpoints(self.folder / directory.CHECKPOINTS)):
            if checkpoint.step_of(path) <= upto:
                try:
                    content = checkpoint.read(path)
                    self._check_soft_labels(content["position"])
                    found = content, path
                    break
                except DamagedFile as error:
                    problems.append(str(error))
            passed.append(path)
        if problems and found[1] is None:
            raise DamagedFile(
                f"{'; '.join(problems)}; no checkpoint before is left: --overwrite starts over (in Python: overwrite=True)"
            )
        for problem in problems:
            self.display.say(f"{problem}; it is removed, and the checkpoint before it is taken")
        for path in passed:
            path.unlink(missing_ok=True)
        return found

    def _check_soft_labels(self, position: Mapping[str, int]) -> None:
        """In the middle of a stage, what the stage's model answered at its beginning is needed, as it was written."""
        assert self.folder is not None
        if not position["stage_step"]:
            return
        for path in sorted((self.folder / directory.SOFT_LABELS).glob(f"{position['stage']}-*.safetensors")):
            if problem := check_seal(read_bytes(path, what="soft labels")):
                raise DamagedFile(f"soft labels {path} can't be read: {problem}")


def relearn(loop: Loop, before: RunConfig) -> None:
    """Bring a loaded optimizer and its schedule to this run's learning rate, from that of the config ``before``.

    A group that began at that rate keeps its place in the schedule: what it stands at is multiplied by the ratio. One with
    a rate of its own (a method's, or a schedule's that sets its own peak) is left.
    """
    optimizer, scheduler = loop.optimizer, loop.scheduler if loop.optimizer is not None else None
    old, new = before.optimizer.lr, loop.settings.optimizer.lr
    if optimizer is None or old == new:
        return
    for number, group in enumerate(optimizer.param_groups):
        if "max_lr" in group or group.get("initial_lr", group["lr"]) != old:
            continue
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] = group[name] * new / old
        if scheduler is not None:
            scheduler.base_lrs[number] = new
