"""Whether the surrounding trainer really trains the modules that a method trains beside the student.

Their gradients exist as soon as the loss is differentiated. A trainer that knows only of the student's parameters
neither clears them (they pile up) nor steps on them (the module never moves), and no figure tells of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from stillhouse.errors import ConfigError

if TYPE_CHECKING:
    from stillhouse.training.step import DistillStep

_FIX = "give step.parameter_groups() to the optimizer, and clear with step.zero_grad() or the optimizer's own"


class Wiring:
    """Looks at the first updates of a stage, when the loss is differentiated."""

    def __init__(self, step: DistillStep) -> None:
        self._step = step
        self._before: tuple[int, int] | None = None
        self._held: dict[int, tuple[int, int]] = {}  # gradients that were there before the loss was made

    def watch(self, loss: Tensor) -> None:
        """Look when the gradient of this loss is taken: then the update before has been used."""
        step = self._step
        if step.progress.driven or step.info.micro or not step.auxiliary:
            return
        self._held = {id(p): _mark(p.grad) for p in self._beside() if p.grad is not None}
        loss.register_hook(lambda gradient: self._look())  # type: ignore[no-untyped-call]

    def _beside(self) -> list[nn.Parameter]:
        step = self._step
        names = [name for name in step.modules.of(step.info.stage) if name in step.auxiliary]
        return [p for name in names for p in step.modules.parameters(name)]

    def _look(self) -> None:
        step = self._step
        beside = self._beside()
        own = [
            p
            for name in step.modules.of(step.info.stage)
            if name not in step.auxiliary
            for p in step.modules.parameters(name)
        ]
        if not beside or not own:
            return
        names = ", ".join(step.auxiliary)
        kept = [p for p in beside if p.grad is not None and self._held.get(id(p)) == _mark(p.grad)]
        if _graded(kept) and not _graded(own):
            raise ConfigError(
                f"the gradients of what is trained beside the student ({names}) were not cleared after the last update, "
                f"and the student's were; {_FIX}"
            )
        now = _writes(own), _writes(beside)
        if self._before is not None and now[0] > self._before[0] and now[1] == self._before[1]:
            raise ConfigError(
                f"the student was trained in the last update, and what is trained beside it ({names}) was not; {_FIX}"
            )
        self._before = now


def _mark(gradient: Tensor) -> tuple[int, int]:
    """Tells whether a gradient is another one since, or was written to."""
    return id(gradient), gradient._version  # noqa: SLF001


def _graded(parameters: list[nn.Parameter]) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in parameters)


def _writes(parameters: list[nn.Parameter]) -> int:
    return sum(p._version for p in parameters)  # noqa: SLF001
