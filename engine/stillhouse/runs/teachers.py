"""The teacher: read from a checkpoint, or trained once and kept by fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stillhouse.api import Task
from stillhouse.cache import Cache
from stillhouse.config import Training, explain
from stillhouse.contract.splits import Split, Splits, TensorSplit
from stillhouse.errors import ConfigError
from stillhouse.models.integrity import digest
from stillhouse.runs.weights import fill, load, plain_state, refuse_broken
from stillhouse.softlabels import SoftLabels
from stillhouse.training.loop import Loop
from stillhouse.training.step import DistillStep

__all__ = ["fingerprint", "load", "teacher_view", "trained", "training"]


def training(given: Mapping[str, Any], task: Task, path: str = "teacher.train") -> Training:
    """A teacher's training settings: the task's, overridden by the config's at ``path``."""
    try:
        return Training.model_validate({**task.teacher_training, **given})
    except ValidationError as error:
        raise ConfigError(explain(error, Training, path)) from None


def fingerprint(
    model: nn.Module, named: Mapping[str, Any], data: Split, settings: Training
) -> dict[str, str]:
    """What a trained teacher's weights depend on."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    architecture = hashlib.sha256(f"{model!r} {shapes}".encode()).hexdigest()[:16]
    chosen = settings.model_dump(mode="json", exclude={"device", "cache_teacher", "workers"})
    return {
        "data": data.fingerprint(),
        "builder": json.dumps(dict(named), sort_keys=True),
        "architecture": architecture,
        "training": json.dumps(chosen, sort_keys=True),
    }


def trained(
    build: Callable[[], nn.Module],
    named: Mapping[str, Any],
    splits: Splits,
    settings: Training,
    device: torch.device,
    say: Callable[[str], None],
    kind: str = "classification",
    path: str = "teacher",
) -> tuple[nn.Module, dict[str, str]]:
    """The teacher from the cache, else trained on the labelled split and kept there.

    kind
        What a batch means.
    path
        Where the config names it, for messages.

    Returns the model and its fingerprint, with ``key`` (that of the fingerprint), ``digest`` (that of the weights) and
    ``found`` (``kept`` or ``trained``).
    """
    torch.manual_seed(settings.seed)
    model = build().to(device)
    data = teacher_view(splits.train)
    made_from = fingerprint(model, named, data, settings)
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    cache = Cache("teachers", say)
    kept = cache.read(made_from)
    if kept is not None:
        fill(model, kept, f"weights {cache.path(made_from)}")
        say(f"{path} {named['name']}: kept from an earlier run ({key})")
        return model, {**made_from, "key": key, "digest": digest(model), "found": "kept"}
    say(f"{path} {named['name']}: training it once, {settings.steps} updates ({key})")
    step = DistillStep("hard_labels", student=model, probe=data.probe(2).to(device), task=kind)
    loop = Loop(step, Splits(data), settings, device, _Silent())
    loop.run()
    step.close()
    refuse_broken(
        model, f"{path} {named['name']}: after {settings.steps} updates", f"lower {path}.train.optimizer.lr"
    )
    cache.write(made_from, plain_state(model))
    return model, {**made_from, "key": key, "digest": digest(model), "found": "trained"}


def digest_given(teacher: nn.Module | Mapping[str, nn.Module] | None) -> str | None:
    """The digest of a teacher that was handed over as an object, or of several by name; None without one."""
    if not isinstance(teacher, Mapping):
        return None if teacher is None else digest(teacher)
    if len(teacher) == 1:
        return digest(next(iter(teacher.values())))
    return digest_of({name: {"digest": digest(model)} for name, model in teacher.items()})


def digest_of(each: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest of several teachers, each by its name and its own."""
    told = json.dumps({name: facts["digest"] for name, facts in each.items()})
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def teacher_view(split: Split) -> Split:
    """The split as the teacher sees it: its own inputs where there are some."""
    if isinstance(split, TensorSplit) and split.teacher_inputs is not None:
        return TensorSplit(split.teacher_inputs, split.labels, None, split.mask, split.extra, split.fixed)
    return split


class _Silent:
    """A watcher that keeps nothing."""

    def updated(self, loop: Loop, metrics: Mapping[str, Tensor]) -> None: ...

    def stage_ended(self, loop: Loop) -> None: ...

    def keep(self, loop: Loop, split: Split) -> SoftLabels | None:
        return None
