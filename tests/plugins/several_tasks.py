"""Models and data of several tasks, and TCMD's variants, for its tests."""

from __future__ import annotations

import torch
from torch import nn
from toys import loop, rows

from stillhouse.api import Splits, TensorSplit
from stillhouse_tasks.multihead import MultiHead

HALVES = [[0, 2], [1, 3]]
SIDE = {"name": "tcmd", "tasks": HALVES, "network": "side_by_side"}
MERGE = {"name": "tcmd", "tasks": [[0, 1, 2], [2, 3]], "network": "side_by_side", "gate": "merge"}
VARIANTS = {
    "shared": {"name": "tcmd", "tasks": HALVES},
    "found": {"name": "tcmd", "tasks": 2},
    "side by side, routed": SIDE,
    "side by side, merged": MERGE,
}


def heads(seed: int = 0, hidden: int = 8) -> MultiHead:
    """A trunk with two heads, of 3 and 2 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MultiHead(nn.Sequential(nn.Linear(6, hidden), nn.ReLU()), hidden, [3, 2])


def multitask_splits(ids=None, *, unlabelled: bool = True) -> Splits:
    """Rows of two tasks, 36 and 12, with labels of their own, and rows of none."""
    x, y = rows(48, 1)
    task = torch.tensor([0] * 36 + [1] * 12) if ids is None else ids
    labels = torch.where(task == 1, 3 + y % 2, y % 3)
    other, nothing = rows(32, 4)[0], torch.full((32,), -1)
    return Splits(
        train=TensorSplit({"inputs": x, "task": task}, labels, extra={"task": task}),
        validation=TensorSplit({"inputs": x, "task": task}, labels, extra={"task": task}),
        unlabelled=TensorSplit({"inputs": other, "task": nothing}, extra={"task": nothing})
        if unlabelled
        else None,
    )


def several(method="tcmd", **more):
    """A loop on two true tasks."""
    more = {"data": multitask_splits(), "student": heads(1, 5), "teacher": heads(2, 12)} | more
    return loop(method, **more)
