"""What a run writes while it trains: metrics, validation scores, checkpoints."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.config import RunConfig, dump
from stillhouse.contract.observers import Observer
from stillhouse.contract.splits import Split
from stillhouse.contract.task import Task
from stillhouse.errors import CheckpointError, Diverged, StillhouseError
from stillhouse.files import write_text
from stillhouse.runs import checkpoint, directory
from stillhouse.runs.display import Display
from stillhouse.runs.evaluate import score
from stillhouse.softlabels import SoftLabels
from stillhouse.training.labels import keep
from stillhouse.training.loop import Loop


class Interrupted(StillhouseError):
    """Ctrl-C: the update was finished, and a checkpoint written where there is a run directory."""


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
    ) -> None:
        self.config, self.task, self.validation, self.device = config, task, validation, device
        self.display, self.folder, self.observers = display, folder, observers
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._since = time.perf_counter()
        self._stop = False
        self._every_update = device.type == "cpu"  # looking at a number on a GPU waits for it

    # The loop's watcher.

    def updated(self, loop: Loop, metrics: Mapping[str, Tensor]) -> None:
        step, config = loop.at.step, self.config
        logging = step % config.log_every == 0
        if (self._every_update or logging) and not math.isfinite(metrics["loss"].item()):
            raise self._diverged(loop, metrics)
        self.display.advance(step)
        if logging:
            self._log(loop, metrics)
        if step % config.validate_every == 0:
            self._validate(loop)
        if self._stop:
            self.checkpoint(loop)
            kept = "the checkpoint is written: go on with --resume (in Python: resume=True)"
            raise Interrupted(
                f"interrupted after update {step}; {kept if self.folder else 'nothing is kept without dir=DIR'}"
            )
        if step % config.checkpoint_every == 0:
            self.checkpoint(loop)

    def stage_ended(self, loop: Loop) -> None:
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
        row = {"step": loop.at.step, "stage": loop.step.info.stage.name}
        self._write({**row, **{f"validation.{name}": value for name, value in scores.items()}})
        self.display.validated(loop.at.step, scores)

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.folder is not None:
            with (self.folder / directory.METRICS).open("a") as file:
                file.write(json.dumps(row) + "\n")
        for observer in self.observers:
            observer.on_metrics(row)

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
            f"loss is not finite after update {step}: {what}{f' of {who}' if who else ''}{last}. Lower optimizer.lr, set clip, or look at the "
            "inputs of that term"
        )

    # Time, checkpoints, resume.

    def elapsed(self) -> float:
        """Seconds of training, over every part of a resumed run."""
        return self.seconds + time.perf_counter() - self._since

    def checkpoint(self, loop: Loop) -> None:
        """Write one, unless nothing is kept."""
        if self.folder is None:
            return
        loop.step.teachers.check(loop.step.plugins, whole=True)
        self._refuse_broken(loop)
        content = {**loop.state_dict(), "seconds": self.elapsed(), "config": json.dumps(dump(self.config))}
        checkpoint.write(self.folder / directory.CHECKPOINTS, loop.at.step, content)

    def _refuse_broken(self, loop: Loop) -> None:
        """Stop where weights are not finite: the loss that told of it comes only with the next update."""
        for role, model in loop.step.run.models.items():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not parameter.isfinite().all():
                    raise Diverged(
                        f"'{name}' of {role} holds NaN or infinity after update {loop.at.step}{self._last()}. Lower "
                        "optimizer.lr, or set clip"
                    )

    def _last(self) -> str:
        kept = None if self.folder is None else checkpoint.newest(self.folder / directory.CHECKPOINTS)
        return f"; the checkpoint of update {checkpoint.step_of(kept)} is kept" if kept else ""

    def resume(self, loop: Loop) -> int | None:
        """Take up the newest checkpoint; its update, or None where there is none."""
        assert self.folder is not None
        checkpoint.tidy(self.folder / directory.CHECKPOINTS)
        path = checkpoint.newest(self.folder / directory.CHECKPOINTS)
        if path is None:
            self._truncate(0)
            return None
        content = checkpoint.read(path)
        if differing := directory.differing(json.loads(content["config"]), self.config):
            raise CheckpointError(
                f"checkpoint {path} is another run's ({differing}); remove it, or choose out=DIR"
            )
        try:
            loop.load_state_dict(content)
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"checkpoint {path} does not fit this run: {error}") from None
        self.seconds, self._since = content["seconds"], time.perf_counter()
        self._truncate(loop.at.step)
        return loop.at.step

    def _truncate(self, step: int) -> None:
        """Drop rows of updates that will be made again, and a last line cut short by a kill."""
        assert self.folder is not None
        path = self.folder / directory.METRICS
        if not path.is_file():
            return
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] <= step:
                self.rows.append(row)
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C finish the update and write a checkpoint; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
