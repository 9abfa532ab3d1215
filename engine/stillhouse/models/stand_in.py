"""A model that stands still while its original trains on, and the student's own base as a teacher."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from stillhouse.contract.kinds import TaskKind
from stillhouse.errors import ConfigError
from stillhouse.models.calling import evaluating, forward, one_mode
from stillhouse.models.integrity import freeze


def stand_in(model: nn.Module, inputs: Any, kind: TaskKind, role: str) -> nn.Module:
    """A frozen copy of ``model`` that shares nothing with it, checked on ``inputs``.

    A trainer may have replaced ``forward`` on the instance by a function that holds the original (mixed precision,
    fused losses): in the copy the class's own ``forward`` takes its place.

    Raises ConfigError where the copy answers otherwise than the original, or still calls into it.
    """
    copied = freeze(copy.deepcopy(model))
    for part in copied.modules():
        part.__dict__.pop("forward", None)
    called: list[str] = []
    handles = [
        part.register_forward_pre_hook(lambda module, given, name=name: called.append(name or role))
        for name, part in model.named_modules()
    ]
    try:
        with torch.random.fork_rng(), torch.no_grad():
            answer = forward(copied, inputs, kind)
    finally:
        for handle in handles:
            handle.remove()
    shared = {id(parameter) for parameter in model.parameters()}
    if called or any(id(parameter) in shared for parameter in copied.parameters()):
        raise ConfigError(
            f"a copy of the {role} that stands still was asked for, and calling it calls the {role} itself "
            f"('{called[0] if called else 'its parameters'}'), which trains on; expected a model that can be copied: "
            "give a target model of its own, or take what patches its forward off"
        )
    with torch.random.fork_rng(), evaluating(model):
        original = forward(model, inputs, kind)
    if original.shape != answer.shape or not torch.allclose(original.float(), answer.float(), 1e-2, 1e-3):
        raise ConfigError(
            f"a copy of the {role} that stands still answers otherwise than the {role}; expected the same: its forward "
            "was replaced on the instance by one that computes something else"
        )
    return copied


class AdaptersOff(nn.Module):
    """The student's own base as a teacher: the same weights, called with the adapters switched off.

    For students of PEFT (LoRA): no second model in memory. The student is not one of its submodules.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        if not callable(getattr(student, "disable_adapter", None)):
            raise ConfigError(
                f"teacher='self' is the student's base with its adapters off, and {type(student).__name__} has no "
                "disable_adapter(); expected a model of PEFT: give another teacher"
            )
        self._student = (student,)
        self.config = getattr(student, "config", None)

    def forward(self, *given: Any, **named: Any) -> Any:
        student: Any = self._student[0]
        with one_mode(student), student.disable_adapter():
            student.eval()
            return student(*given, **named)

    def get_output_embeddings(self) -> Any:
        """The student's own, as a model of transformers answers it."""
        find = getattr(self._student[0], "get_output_embeddings", None)
        return find() if callable(find) else None
