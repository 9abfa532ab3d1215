"""Who answers for the teacher in a run: one that is read or trained once, several by name, or kept labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from stillhouse.config import TeacherConfig
from stillhouse.contract.metrics import higher_is_better, metric_behind
from stillhouse.contract.splits import Splits
from stillhouse.contract.task import Task
from stillhouse.models.integrity import digest
from stillhouse.runs import stored, teachers, weights
from stillhouse.runs.evaluate import score
from stillhouse.runs.resolve import Parts, by_name, comes_trained


def teacher_of(
    parts: Parts, data: Splits, device: torch.device, say: Callable[[str], None]
) -> tuple[nn.Module | dict[str, nn.Module] | None, dict[str, Any]]:
    """The run's teacher, or several by name, and what the manifest says of it."""
    if (labels := stored.labels_of(parts, data, device, say)) is not None:
        return None, stored.facts(labels)
    found: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    if isinstance(parts.teacher, Mapping):
        for name, given in parts.teacher.items():
            found[f"teachers.{name}"] = given.to(device), {"found": "given", "digest": digest(given)}
    elif parts.teacher is not None:
        facts: dict[str, Any] = {"found": "given", "digest": digest(parts.teacher)}
        found["teacher"] = parts.teacher.to(device), facts
    else:
        for path, spec in parts.config.named_teachers.items():
            if path in parts.builders:
                found[path] = _made(parts, path, spec, data, device, say)
    if data.validation is not None and data.validation.labelled:
        for model, facts in found.values():
            facts["validation"] = score(
                parts.task, model, data.validation, device, teacher=True, config=parts.config
            )
    return by_name({path: model for path, (model, _) in found.items()}), _together(
        {path: facts for path, (_, facts) in found.items()}, parts.task
    )


def _made(
    parts: Parts,
    path: str,
    spec: TeacherConfig,
    data: Splits,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[nn.Module, dict[str, Any]]:
    """The teacher at a path of the config: read, as its builder gives it, or trained once."""
    build = parts.builders[path]
    if spec.checkpoint is not None:
        model = build().to(device)
        weights.load(model, spec.checkpoint)
        return model, {"found": str(spec.checkpoint), "digest": digest(model)}
    if comes_trained(parts, spec):
        model = build().to(device)
        return model, {"found": f"as {spec.name} gives it", "digest": digest(model)}
    settings = teachers.training(spec.train, parts.task, f"{path}.train").model_copy(
        update={"device": parts.config.device}
    )
    named = {"name": spec.name, **spec.settings}
    model, made = teachers.trained(build, named, data, settings, device, say, parts.task.kind, path)
    return model, dict(made)


def _together(facts: Mapping[str, dict[str, Any]], task: Task) -> dict[str, Any]:
    """What is said of the teacher; of several one digest, the best one's scores, and each in full by name."""
    if len(facts) < 2:
        return next(iter(facts.values()), {})
    each = {path.partition(".")[2]: own for path, own in facts.items()}
    said = {"found": f"{len(each)} teachers", "digest": teachers.digest_of(each), "each": each}
    scored = {name: own["validation"] for name, own in each.items() if "validation" in own}
    if scored:
        higher = higher_is_better(task.metric, metric_behind(task.metric, task.metrics()))
        best = (max if higher else min)(scored, key=lambda name: scored[name][task.metric])
        said["validation"] = scored[best]
    return said
