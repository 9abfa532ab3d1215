"""Divergences of a teacher and a student within tasks, between tasks, and over all classes: one value a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.kernels import softmax_kl
from stillhouse_tcmd.networks import columns, marginals

Tasks = Sequence[Sequence[int]]


def whole(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """``T^2 KL(p || q)`` over all classes; logits ``(B, C)`` to ``(B,)``."""
    return softmax_kl(student, teacher, temperature=temperature, mask=mask, reduction="none")


def restricted(
    student: Tensor, teacher: Tensor, own: Sequence[int], temperature: float, mask: Tensor | None = None
) -> Tensor:
    """``T^2 KL(p_k || q_k)`` of the softmaxes over the classes ``own`` alone (restricted and renormalised)."""
    return whole(columns(student, own), columns(teacher, own), temperature, mask)


def task_weights(teacher: Tensor, tasks: Tasks, temperature: float) -> Tensor:
    """The tasks' marginals ``(B, K)`` in the teacher's softmax at ``temperature``."""
    softened = (teacher.float() / temperature).log_softmax(-1)
    return marginals(softened, tasks).exp()


def routing(
    student: Tensor, teacher: Tensor, tasks: Tasks, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """``T^2 KL(pi || rho)`` of the task marginals at ``temperature``.

    With ``restricted`` weighted by ``task_weights`` and summed over the tasks it makes up ``whole``.
    """
    mine = temperature * marginals(student.float() / temperature, tasks)
    theirs = temperature * marginals(teacher.float() / temperature, tasks)
    return whole(mine, theirs, temperature, mask)


def by_task(
    student: Tensor,
    teacher: Tensor,
    tasks: Tasks,
    ids: Tensor,
    temperature: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Each row's ``restricted`` in its own task; a row of id -1 has the mean over every task ``(B,)``."""
    total = torch.zeros(student.shape[:-1], device=student.device)
    share = torch.where(ids < 0, 1 / len(tasks), 1.0)
    for number, own in enumerate(tasks):
        asked = (ids == number) | (ids < 0)
        if mask is not None:
            asked = asked & mask
        total = total + share * restricted(student, teacher, own, temperature, asked)
    return total
