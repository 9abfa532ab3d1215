"""What TCMD finds out before the first update: the tasks, each row's task, networks to start from."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.api import ConfigError, RunContext, Split
from stillhouse_tcmd import partition

ROWS = 4096
"""How many training rows the teacher's confusion is counted on."""
CHUNK = 1024


def tasks_of(
    run: RunContext, given: int | tuple[tuple[int, ...], ...] | None, outputs: int, *, merge: bool
) -> partition.Tasks:
    """The tasks: given, the teacher's own, or found by clustering its confusion.

    Raises ConfigError for tasks that are no partition of the classes, or that nothing tells.
    """
    assert run.probe is not None
    if isinstance(given, tuple):
        return partition.check(given, outputs, overlap=merge)
    if "task" in run.probe.extra:
        own = getattr(run.teacher, "tasks", None)
        if own is None or given is not None:
            raise ConfigError(
                f"{run.caller}.tasks is {given}, the data carry task ids, and the classes of each task are not known; "
                "expected a list of classes for each task, or a teacher with an attribute 'tasks' that has them"
            )
        found = partition.check(own, outputs)
        run.chose("tasks", found, "the teacher's")
        return found
    if merge:
        raise ConfigError(
            f"{run.caller}.gate is merge, and no tasks are given; expected tasks: lists that share classes"
        )
    count = given if given is not None else max(2, math.isqrt(outputs))
    found = partition.cluster(_confusion(run), count)
    run.chose("tasks", found, "classes grouped by what the teacher confuses")
    return found


def _confusion(run: RunContext) -> Tensor:
    if run.splits is None:
        raise ConfigError(
            f"{run.caller}.tasks: finding tasks needs the training split, and there is none; list them"
        )
    split = run.splits.train
    rows = torch.linspace(0, len(split) - 1, min(ROWS, len(split))).long()
    device = next(run.student.parameters()).device
    probabilities, labels = [], []
    for part in torch.split(rows, CHUNK):
        batch = split.batch(part).to(device)
        probabilities.append(run.outputs("teacher", batch).logits.float().softmax(-1).cpu())
        if batch.labels is not None:
            labels.append(batch.labels.cpu())
    return partition.confusion(torch.cat(probabilities), torch.cat(labels) if labels else None)


def task_ids(split: Split) -> Tensor | None:
    """Each row's task id ``(N,)``, read from ``extra["task"]``; None where the split carries none."""
    found = []
    for start in range(0, len(split), CHUNK):
        ids = split.batch(torch.arange(start, min(start + CHUNK, len(split)))).extra.get("task")
        if ids is None:
            return None
        found.append(ids)
    return torch.cat(found)


def built(run: RunContext, named: dict[str, Any]) -> nn.Module:
    """A further model by name; ConfigError where the surrounding trainer knows none by name."""
    if run.build is None:
        raise ConfigError(
            f"{run.caller}.specialist is {named}, and this trainer builds no model by name; expected none: the "
            "specialists are then like the student"
        )
    return run.build(named)


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the model with weights drawn anew by each layer's ``reset_parameters``.

    Parameters of a layer without one keep the model's values.
    """
    made = copy.deepcopy(model)
    for module in made.modules():  # hooks of the original watch the original
        module._forward_hooks.clear()  # noqa: SLF001
        module._forward_pre_hooks.clear()  # noqa: SLF001
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in made.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return made
