"""The teacher: read from a checkpoint, or trained once and kept by fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from stillhouse.api import Task
from stillhouse.cache import cache_dir
from stillhouse.config import Training, explain
from stillhouse.contract.splits import Split, Splits, TensorSplit
from stillhouse.errors import CheckpointError, ConfigError, Diverged
from stillhouse.files import write_bytes
from stillhouse.softlabels import SoftLabels
from stillhouse.training.loop import Loop
from stillhouse.training.step import DistillStep


def training(given: Mapping[str, Any], task: Task) -> Training:
    """A teacher's training settings: the task's, overridden by the config's ``teacher.train``."""
    try:
        return Training.model_validate({**task.teacher_training, **given})
    except ValidationError as error:
        raise ConfigError(explain(error, Training, "teacher.train")) from None


def load(model: nn.Module, path: Path) -> None:
    """Read weights from a safetensors file; CheckpointError where they are not this model's."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"weights {path} can't be read ({error}); expected a safetensors file"
        ) from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted({*expected, *weights}):
        got = tuple(weights[name].shape) if name in weights else "missing"
        if got != expected.get(name):
            raise CheckpointError(
                f"weights {path}: '{name}' is {got}, the model has {expected.get(name, 'no such entry')}; "
                "give the builder the arguments that these weights were made with"
            )
    model.load_state_dict(weights)
    _finite(model, f"weights {path}:", "expected finite ones")


def _finite(model: nn.Module, what: str, fix: str) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise Diverged(f"{what} '{name}' holds NaN or infinity; {fix}")


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
    before: Callable[[nn.Module], None] = lambda model: None,
    kind: str = "classification",
) -> tuple[nn.Module, dict[str, str]]:
    """The teacher from the cache, else trained on the labelled split and kept there.

    before
        Called with the untrained teacher where it has to be trained; may refuse it.
    kind
        What a batch means.

    Returns the model and its fingerprint with the key ``found`` (``kept`` or ``trained``).
    """
    torch.manual_seed(settings.seed)
    model = build().to(device)
    data = teacher_view(splits.train)
    made_from = fingerprint(model, named, data, settings)
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir() / "teachers" / f"{digest}.safetensors"
    if path.is_file() and _matches(path, made_from):
        load(model, path)
        say(f"teacher {named['name']}: kept from an earlier run ({digest})")
        return model, {**made_from, "digest": digest, "found": "kept"}
    before(model)
    say(f"teacher {named['name']}: training it once, {settings.steps} updates ({digest})")
    step = DistillStep("hard_labels", student=model, probe=data.probe(2).to(device), task=kind)
    loop = Loop(step, Splits(data), settings, device, _Silent())
    loop.run()
    step.close()
    _finite(
        model, f"teacher {named['name']}: after {settings.steps} updates", "lower teacher.train.optimizer.lr"
    )
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(path, save(weights, {"fingerprint": json.dumps(made_from, sort_keys=True)}))
    return model, {**made_from, "digest": digest, "found": "trained"}


def _matches(path: Path, made_from: Mapping[str, str]) -> bool:
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get("fingerprint", "{}"))
    except (OSError, SafetensorError):
        return False
    return bool(found == made_from)


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
