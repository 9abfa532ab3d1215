"""The networks of TCMD: plain modules that save, load and run without a training loop.

Networks are called without a task id and give logits of all classes, or of their own task's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.api import ConfigError, DataError

ABSENT = -1e4
"""The logit of a class that can't be: its probability is 0 at any sensible temperature, and never NaN."""


def columns(logits: Tensor, own: Sequence[int]) -> Tensor:
    """The columns ``own`` of ``(B, C)``; a view where they stand side by side."""
    if list(own) == list(range(own[0], own[0] + len(own))):
        return logits[..., own[0] : own[0] + len(own)]
    return logits[..., list(own)]


def marginals(logits: Tensor, tasks: Sequence[Sequence[int]]) -> Tensor:
    """Logits ``(B, K)`` of the tasks from those of the classes ``(B, C)``: each task's log-sum-exp."""
    return torch.stack([columns(logits, own).logsumexp(-1) for own in tasks], dim=-1)


def membership(tasks: Sequence[Sequence[int]], outputs: int) -> Tensor:
    """Bool ``(K + 1, C)``: the classes of each task, and all of them in the last row, which id -1 finds."""
    members = torch.zeros(len(tasks) + 1, outputs, dtype=torch.bool)
    for number, own in enumerate(tasks):
        members[number, list(own)] = True
    members[-1] = True
    return members


def check_ids(ids: Tensor, tasks: int, where: str = "the batch") -> None:
    """Raise DataError for a task id that is not from -1 (no task in particular) to ``tasks - 1``."""
    outside = (ids < -1) | (ids >= tasks)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise DataError(
            f"{where}: task id {int(ids[row])} in row {row}; expected 0 to {tasks - 1}, or -1 for a row that "
            "belongs to none: mend the data or the list of tasks"
        )


def logits_of(network: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """A network's logits; an output object's ``.logits`` is taken. One named input is handed over by place."""
    if not inputs and len(named) == 1:
        inputs, named = tuple(named.values()), {}
    out = network(*inputs, **named)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


class Specialist(nn.Module):
    """A network that knows one task: ``(B, C)`` logits, ``ABSENT`` outside of the task's classes ``own``.

    ``network`` gives logits of all ``outputs`` classes, or of the task's own.
    """

    def __init__(self, network: nn.Module, own: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.network, self.own, self.outputs = network, list(own), outputs

    def own_logits(self, *inputs: Any, **named: Any) -> Tensor:
        """Logits of the task's own classes ``(B, len(own))``."""
        logits = logits_of(self.network, inputs, named)
        if logits.shape[-1] == len(self.own):
            return logits
        if logits.shape[-1] != self.outputs:
            raise ConfigError(
                f"a task's network gave {logits.shape[-1]} outputs; expected {self.outputs} (every class) or "
                f"{len(self.own)} (the task's own)"
            )
        return columns(logits, self.own)

    def forward(self, *inputs: Any, task: Tensor | None = None, **named: Any) -> Tensor:
        """The inputs as ``network`` takes them; ``task`` is not looked at: the task is its own."""
        logits = self.own_logits(*inputs, **named)
        made = logits.new_full((*logits.shape[:-1], self.outputs), ABSENT)
        made[..., self.own] = logits
        return made


class Router(nn.Module):
    """Which task an input belongs to: log pi ``(B, K)``, the task marginals of ``network``'s softmax over classes."""

    def __init__(self, network: nn.Module, tasks: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.network, self.tasks = network, [list(own) for own in tasks]

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return marginals(logits_of(self.network, inputs, named), self.tasks).log_softmax(-1)


class CombinedNetwork(nn.Module):
    """One network for several tasks: ``p(y|x) = sum_k pi_k(x) p_k(y|x)``, or ``p_k(y|x)`` where the task k is given.

    parts
        One network for all tasks (a shared trunk), or a Specialist for each, side by side.
    tasks
        The classes of each task.
    outputs
        Number of classes.
    exclusive
        Whether an input belongs to one task alone, as with a partition of the classes. If not (heads for
        different questions), each task keeps a softmax of its own, and without a task every one is answered.
    router
        Gives log pi for specialists side by side.
    merge
        In place of a router, for specialists whose class sets overlap: scales ``a_k`` and logits ``u`` are found
        that solve ``u_y - a_k = log p_k(y)`` in the least-squares sense (Vongkulbhisal, Vinayavekhin &
        Visentini-Scarzanella, UHC, CVPR 2019, arXiv:1904.06062).
    """

    members: Tensor
    merging: Tensor | None

    def __init__(
        self,
        parts: Sequence[nn.Module],
        tasks: Sequence[Sequence[int]],
        outputs: int,
        *,
        exclusive: bool = True,
        router: nn.Module | None = None,
        merge: bool = False,
    ) -> None:
        super().__init__()
        if len(parts) not in (1, len(tasks)):
            raise ConfigError(
                f"got {len(parts)} networks for {len(tasks)} tasks; expected one, or one for each"
            )
        self.parts, self.router = nn.ModuleList(parts), router
        self.tasks, self.outputs, self.exclusive = [list(own) for own in tasks], outputs, exclusive
        self.register_buffer("members", membership(tasks, outputs), persistent=False)
        self.register_buffer("merging", merging(tasks, outputs) if merge else None, persistent=False)

    def forward(self, *inputs: Any, task: Tensor | None = None, **named: Any) -> Tensor:
        """Logits ``(B, C)``.

        The inputs are as the parts take them. ``task`` ``(B,)``: a row's task, or -1 for a row that is to be
        routed; its other classes are ``ABSENT``. Raises DataError for an id out of range (looked at on the
        CPU only), ConfigError where a row is to be routed and nothing is there to do it.
        """
        logits = self.joint(inputs, named, task)
        if task is None:
            return logits
        if task.device.type == "cpu":
            check_ids(task, len(self.tasks))
        return logits.where(self.members[task], logits.new_full((), ABSENT))

    def joint(self, inputs: tuple[Any, ...], named: dict[str, Any], task: Tensor | None = None) -> Tensor:
        """Logits of all classes ``(B, C)``."""
        if not isinstance(self.parts[0], Specialist):
            return logits_of(self.parts[0], inputs, named)
        own: list[Tensor] = [part.own_logits(*inputs, **named).log_softmax(-1) for part in self.parts]  # type: ignore[operator]
        if self.merging is not None:
            return torch.cat(own, dim=-1) @ self.merging.T
        if self.router is not None:
            weights = self.router(*inputs, **named)  # log pi (B, K)
            own = [logits + weights[..., k : k + 1] for k, logits in enumerate(own)]
        elif self.exclusive and len(own) > 1 and (task is None or bool((task < 0).any())):
            raise ConfigError("got no task for some rows, and no router; give task ids, or a router")
        made = own[0].new_full((*own[0].shape[:-1], self.outputs), ABSENT)
        for classes, logits in zip(self.tasks, own, strict=True):
            made[..., classes] = logits
        return made


class SeveralTeachers(nn.Module):
    """One teacher for each task as a single module: their logits side by side, in the order given.

    Where classes are shared between teachers, take ``CombinedNetwork(..., merge=True)`` instead.
    """

    members: Tensor

    def __init__(self, teachers: Sequence[nn.Module], classes: Sequence[int]) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        ends = [sum(classes[: number + 1]) for number in range(len(classes))]
        self.tasks = [list(range(end - count, end)) for end, count in zip(ends, classes, strict=True)]
        self.register_buffer("members", membership(self.tasks, sum(classes)), persistent=False)

    def forward(self, *inputs: Any, task: Tensor | None = None, **named: Any) -> Tensor:
        """Logits ``(B, C)``; a row with a task keeps that teacher's alone."""
        logits = torch.cat([logits_of(teacher, inputs, named) for teacher in self.teachers], dim=-1)
        if task is None:
            return logits
        check_ids(task, len(self.tasks))
        return logits.where(self.members[task], logits.new_full((), ABSENT))


def merging(tasks: Sequence[Sequence[int]], outputs: int) -> Tensor:
    """The matrix ``(C, sum of task sizes)`` from the tasks' log-probabilities to joint logits.

    Raises ConfigError where the tasks don't hang together by shared classes, so that no scale is known between them.
    """
    pairs = [(k, label) for k, own in enumerate(tasks) for label in own]
    system = torch.zeros(len(pairs), outputs + len(tasks), dtype=torch.float64)
    for row, (k, label) in enumerate(pairs):
        system[row, label], system[row, outputs + k] = 1.0, -1.0
    if int(torch.linalg.matrix_rank(system)) < outputs + len(tasks) - 1:
        raise ConfigError(
            "gate merge: got tasks that do not overlap, so nothing says how likely one is against another; "
            "expected tasks linked by shared classes: use gate: router"
        )
    solution: Tensor = torch.linalg.pinv(system)
    return solution[:outputs].float()
