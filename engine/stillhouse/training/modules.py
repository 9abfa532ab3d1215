"""The models that a run trains: which stage trains which, what stands still meanwhile, what an optimizer is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from stillhouse.contract.context import STUDENT, Auxiliary, Stage
from stillhouse.models.integrity import StillHeld


class TrainedModules:
    """The run's models by name: the student, the target, and every auxiliary module under ``plugin.module``.

    models
        The run's own mapping; auxiliary modules are put into it once the plugins have given theirs.
    stage
        The one that runs; what it does not train stands still.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self.models = models
        self.auxiliary: Mapping[str, Auxiliary] = {}
        self.stages: tuple[Stage, ...] = ()
        self.stage = Stage("train")
        self._held = StillHeld()

    def of(self, stage: Stage) -> tuple[str, ...]:
        """Names of the modules that a stage trains."""
        if stage.train is not None:
            return stage.train
        return (*((stage.model,) if stage.model else ()), *self.auxiliary)

    def hold(self, stage: Stage) -> None:
        """From now on this stage runs: what it does not train stands still."""
        self.stage = stage
        self._held.hold(self.models, self.of(stage))

    def hold_again(self) -> None:
        """After a trainer's ``model.train()``, which wakes a student that the stage holds still."""
        if STUDENT not in self.of(self.stage):
            self.hold(self.stage)

    def release(self) -> None:
        """What was held still can be trained again."""
        self._held.release()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Nothing is held still while a trainer looks for what can be trained (an optimizer, a wrapper over ranks)."""
        self.release()
        try:
            yield
        finally:
            self.hold(self.stage)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """A module's parameters that are trained, now or in another stage."""
        return [p for p in self.models[name].parameters() if p.requires_grad or self._held.holds(p)]

    def groups(self, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """An optimizer group for each trained module, with its own options; a shared parameter stands in the first.

        names
            Default: every module that some stage trains.
        """
        every = dict.fromkeys(name for stage in self.stages for name in self.of(stage))
        seen: set[int] = set()
        groups = []
        for name in every if names is None else names:
            own = [p for p in self.parameters(name) if id(p) not in seen]
            seen.update(map(id, own))
            if own:
                options = self.auxiliary[name].options if name in self.auxiliary else {}
                groups.append({"params": own, **options})
        return groups

    def zero_grad(self) -> None:
        """Clear the gradients of everything that is trained."""
        for model in self.models.values():
            model.zero_grad(set_to_none=True)
