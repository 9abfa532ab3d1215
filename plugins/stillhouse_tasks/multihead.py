"""A shared trunk with one linear head for each task; its outputs stand side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stillhouse.api import DataError

ABSENT = -1e4
"""The logit of a class of another task: its probability is 0 at any sensible temperature, and never NaN."""


class MultiHead(nn.Module):
    """``trunk`` gives features ``(B, width)``; head k gives the logits of task k.

    The outputs ``(B, C)`` are the heads' logits one after the other. A row whose ``task`` is k keeps head k's
    and has ``ABSENT`` elsewhere; a row whose task is -1, or a call without ``task``, keeps every head's.

    ``tasks`` lists each task's columns.
    """

    members: Tensor

    def __init__(self, trunk: nn.Module, width: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in classes)
        self.tasks = columns(classes)
        members = torch.zeros(len(classes) + 1, sum(classes), dtype=torch.bool)
        for number, own in enumerate(self.tasks):
            members[number, own] = True
        members[-1] = True  # the row that task -1 finds
        self.register_buffer("members", members, persistent=False)

    def forward(self, inputs: Tensor, task: Tensor | None = None) -> Tensor:
        """Inputs as the trunk takes them; task ``(B,)`` long, from -1 to the number of tasks less one.

        Raises DataError for a task id outside of that (looked at on the CPU only).
        """
        features = self.trunk(inputs)
        logits = torch.cat([head(features) for head in self.heads], dim=-1)
        if task is None:
            return logits
        if task.device.type == "cpu" and task.numel():
            low, high = int(task.min()), int(task.max())
            if low < -1 or high >= len(self.tasks):
                got = low if low < -1 else high
                raise DataError(
                    f"got task id {got}; expected -1 (every task) to {len(self.tasks) - 1}: mend the data"
                )
        return logits.where(self.members[task], logits.new_full((), ABSENT))


def columns(classes: Sequence[int]) -> list[list[int]]:
    """Each task's output columns where heads of so many classes stand side by side."""
    ends = [sum(classes[: number + 1]) for number in range(len(classes))]
    return [list(range(end - count, end)) for end, count in zip(ends, classes, strict=True)]
