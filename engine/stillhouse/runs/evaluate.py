"""A model's outputs and scores on a whole split."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.contract.kinds import KINDS, TaskKind
from stillhouse.contract.splits import Split
from stillhouse.contract.task import Task
from stillhouse.errors import DataError
from stillhouse.models.calling import DEFAULT, evaluating, forward


def outputs(
    model: nn.Module,
    split: Split,
    device: torch.device,
    *,
    teacher: bool = False,
    batch_size: int = 1024,
    kind: TaskKind = DEFAULT,
) -> tuple[Tensor, Tensor | None]:
    """Outputs ``(N, C)`` and labels ``(N,)`` of the split, in row order, on the CPU."""
    given, labels = [], []
    with torch.random.fork_rng(), evaluating(model):
        for start in range(0, len(split), batch_size):
            batch = split.batch(torch.arange(start, min(start + batch_size, len(split)))).to(device)
            given.append(forward(model, batch.for_teacher if teacher else batch.inputs, kind).cpu())
            if batch.labels is not None:
                labels.append(batch.labels.cpu())
    return torch.cat(given), torch.cat(labels) if labels else None


def score(
    task: Task, model: nn.Module, split: Split, device: torch.device, *, teacher: bool = False
) -> dict[str, float]:
    """The task's metrics of a model on a split."""
    given, labels = outputs(model, split, device, teacher=teacher, kind=KINDS[task.kind])
    if labels is None:
        raise DataError("a split without labels can't be scored")
    return task.score(given, labels)


class Sealed:
    """The test split, which opens once: whoever asks again has looked at it before."""

    def __init__(self, split: Split | None) -> None:
        self._split = split
        self.opened = 0

    def open(self) -> Split | None:
        """The split, the first time; RuntimeError after that."""
        if self.opened:
            raise RuntimeError("the test split was opened before in this run; it opens once, at the end")
        self.opened += 1
        return self._split
