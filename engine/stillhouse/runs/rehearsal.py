"""One update of every stage with models that are thrown away, before a teacher is trained and anything is written.

What would end a run after hours (an optimizer that can't take these gradients, a method that doesn't fit this target, a
batch that no memory holds) is told in seconds.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing

import torch
from torch import Tensor, nn

from stillhouse.config import Named, RunConfig, Training
from stillhouse.contract.context import STUDENT, TARGET
from stillhouse.contract.splits import Split, Splits
from stillhouse.errors import ConfigError, Diverged, StillhouseError, StillhouseWarning
from stillhouse.runs import stored, teachers
from stillhouse.runs.resolve import Parts, builder_of, by_name, comes_trained
from stillhouse.softlabels import SoftLabels
from stillhouse.training import labels
from stillhouse.training.compatibility import OFFERED
from stillhouse.training.loop import Loop
from stillhouse.training.random_state import RandomState
from stillhouse.training.step import DistillStep


def rehearse(parts: Parts, data: Splits, device: torch.device) -> None:
    """Make one update of each stage, and of the teacher's training, with models and plugins of their own.

    The random generators are as they were afterwards. Data without row numbers, whose first rows come only once, are not
    read, and nothing is rehearsed on them. Raises what the run would raise; a failure of torch's as ConfigError.
    """
    if not all(split.numbered for _, split in data.items()):
        return
    outside = RandomState.capture()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StillhouseWarning)  # the run itself will tell
        try:
            refuse_too_large(parts.config, "batch_size", data.stage("all"))
            specs = {} if stored.labels_of(parts, data, device) else parts.config.named_teachers
            asked = {path: parts.builders[path]().to(device) for path in specs if path in parts.builders}
            _students(parts, data, device, by_name(asked))
            for path, spec in specs.items():
                if path in asked and spec.checkpoint is None and not comes_trained(parts, spec):
                    settings = teachers.training(spec.train, parts.task, f"{path}.train")
                    _teachers(parts, data, device, path, settings)
        finally:
            outside.restore()


def _students(
    parts: Parts, data: Splits, device: torch.device, teacher: nn.Module | Mapping[str, nn.Module] | None
) -> None:
    config = parts.config
    torch.manual_seed(config.seed)
    models = {role: parts.builders[role]().to(device) for role in (STUDENT, TARGET) if role in parts.builders}

    def build(spec: Mapping[str, object]) -> nn.Module:
        return builder_of(Named.model_validate(dict(spec)), parts.task.students, "network")[0]().to(device)

    step = DistillStep(
        copy.deepcopy(parts.methods),
        student=models[STUDENT],
        target=models.get(TARGET),
        teacher=teacher,
        probe=data.train.probe(4).to(device),
        task=parts.task.kind,
        splits=data,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seed,
        offers=offers(data),
        soft_labels=parts.soft_labels,
        build=build,
    )
    with closing(step):
        stored.check_stages(step, data)
        _Rehearsal(step, data, config, device, _Watcher()).run()


def _teachers(parts: Parts, data: Splits, device: torch.device, path: str, settings: Training) -> None:
    torch.manual_seed(settings.seed)
    model = parts.builders[path]().to(device)
    seen = teachers.teacher_view(data.train)
    refuse_too_large(settings, f"{path}.train.batch_size", seen)
    probe = seen.probe(2).to(device)
    with closing(DistillStep("hard_labels", student=model, probe=probe, task=parts.task.kind)) as step:
        _Rehearsal(step, Splits(seen), settings, device, _Watcher(), who=f"{path}.train: ").run()


def offers(data: Splits) -> frozenset[str]:
    """What the reference loop offers on these data."""
    return OFFERED if data.train.labelled else OFFERED - {"labels"}


class _Rehearsal(Loop):
    """Enters each stage as the run does, makes its first update, and leaves it."""

    def __init__(
        self,
        step: DistillStep,
        splits: Splits,
        settings: Training,
        device: torch.device,
        watcher: _Watcher,
        who: str = "",
    ) -> None:
        super().__init__(step, splits, settings.model_copy(update={"workers": 0}), device, watcher)
        self._who = who

    def run(self, steps: int | None = None) -> bool:
        self.random.restore()
        for stage, length in zip(self.step.stages, self.lengths, strict=True):
            self._told(stage.name, self._enter)
            if length:
                self._told(stage.name, self._update)
            self._told(stage.name, self._leave)
        return True

    def _told(self, stage: str, act: Callable[[], None]) -> None:
        try:
            act()
        except (StillhouseError, MemoryError) as error:
            if isinstance(error, StillhouseError):
                raise
            raise self._refused(stage, error) from error
        except Exception as error:
            if getattr(error, "__notes__", None):  # a plugin's failure, told with the plugin's name
                raise
            raise self._refused(stage, error) from error

    def _refused(self, stage: str, error: BaseException) -> ConfigError:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        return ConfigError(
            f"{self._who}the first update of stage '{stage}' fails, and nothing was trained or written: "
            f"{type(error).__name__}: {first}; look at the optimizer's, the methods' and the models' settings"
        )


class _Watcher:
    """Keeps nothing, and stops at a loss that is not finite."""

    def updated(self, loop: Loop, metrics: Mapping[str, Tensor]) -> None:
        if math.isfinite(metrics["loss"].item()):
            return
        bad = [
            f"{name} = {value.item()}" for name, value in metrics.items() if not math.isfinite(value.item())
        ]
        raise Diverged(
            f"loss is not finite after update {loop.at.step} of a rehearsal with an untrained teacher ({', '.join(bad)}); "
            "nothing was trained or written: lower optimizer.lr, set clip, or look at the settings of that term"
        )

    def stage_ended(self, loop: Loop) -> None: ...

    def keep(self, loop: Loop, split: Split) -> SoftLabels | None:
        return labels.stored(loop)


def refuse_too_large(settings: Training | RunConfig, path: str, split: Split) -> None:
    """ConfigError where one batch's inputs alone are larger than half of this machine's memory."""
    row = split.probe(1)
    tensors = row.inputs.values() if isinstance(row.inputs, Mapping) else [row.inputs]
    bytes_a_row = 8 + sum(item.numel() * item.element_size() for item in tensors if isinstance(item, Tensor))
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return
    if settings.batch_size * bytes_a_row > memory // 2:
        raise ConfigError(
            f"{path} is {settings.batch_size:,}: one batch's inputs take {settings.batch_size * bytes_a_row:,} bytes, and "
            f"this machine has {memory:,}; expected fewer samples in one update"
        )
