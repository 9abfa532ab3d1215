"""A shared trunk with one linear head for each task; its outputs stand side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stillhouse.api import KINDS, DataError, TensorSplit, metrics_named

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


def labelled(inputs: Sequence[Tensor], classes: Sequence[Tensor], sizes: Sequence[int]) -> TensorSplit:
    """One part for each task, joined: inputs ``(n_k, ...)`` with classes ``(n_k,)`` of task k; a label is a column."""
    starts = [own[0] for own in columns(sizes)]
    labels = torch.cat([given + start for given, start in zip(classes, starts, strict=True)])
    ids = torch.cat([torch.full((len(part),), number) for number, part in enumerate(inputs)])
    return TensorSplit({"inputs": torch.cat(list(inputs)), "task": ids}, labels, extra={"task": ids})


def unlabelled(inputs: Tensor) -> TensorSplit:
    """Inputs ``(n, ...)`` of which every task is asked."""
    nothing = torch.full((len(inputs),), -1)
    return TensorSplit({"inputs": inputs, "task": nothing}, extra={"task": nothing})


class EachTask:
    """Mean ``accuracy`` and ``nll`` over the tasks, then each task's accuracy among its own classes.

    tasks
        How many classes each has, by name, in the order of their columns.
    """

    def __init__(self, tasks: Mapping[str, int]) -> None:
        self._columns = dict(zip(tasks, columns(list(tasks.values())), strict=True))
        self._metrics = {name: metrics_named(("accuracy", "nll"), KINDS["classification"]) for name in tasks}
        self._seen: set[str] = set()

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Rows of any task: outputs ``(n, C)`` of all heads, labels ``(n,)`` columns of these."""
        for name, own in self._columns.items():
            rows = (labels >= own[0]) & (labels <= own[-1])
            if rows.any():
                self._seen.add(name)
                for metric in self._metrics[name].values():
                    metric.update(outputs[rows][:, own], labels[rows] - own[0])

    def compute(self) -> dict[str, float]:
        """The numbers by name, over the tasks that there were rows of."""
        found = {
            name: {key: metric.compute() for key, metric in self._metrics[name].items()}
            for name in self._columns
            if name in self._seen
        }
        means = {
            key: sum(scores[key] for scores in found.values()) / max(1, len(found))
            for key in ("accuracy", "nll")
        }
        return {**means, **{f"accuracy.{name}": scores["accuracy"] for name, scores in found.items()}}
