"""A loop of your own under Hugging Face Accelerate::

from stillhouse.adapters.accelerate import attached

with attached(distillation, accelerator, student, probe=batch, steps=1000) as step:
optimizer = torch.optim.AdamW(step.parameter_groups(), lr=1e-3)
student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
for batch in step.updates(loader):
with accelerator.accumulate(student):
accelerator.backward(step(student, batch).loss)
if accelerator.sync_gradients:
accelerator.clip_grad_norm_(step.trained_parameters(), 1.0)
optimizer.step()
optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from stillhouse.adapters import host, state
from stillhouse.errors import ConfigError, MissingExtra
from stillhouse.training.distillation import Distillation
from stillhouse.training.output import StepOutput
from stillhouse.training.step import DistillStep

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError:
    raise MissingExtra("stillhouse.adapters.accelerate", "accelerate", "accelerate") from None

_AVERAGED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def attached(
    distillation: Distillation,
    accelerator: Accelerator,
    student: nn.Module,
    *,
    probe: Any,
    steps: int | None = None,
    seed: int = 0,
) -> AcceleratedStep:
    """Bind a distillation to a student, before ``accelerator.prepare``.

    probe, steps
        As of Distillation.attach; ``seed`` draws the weights of what is trained beside the student.

    Raises ConfigError for a kind of parallelism whose gradients are no mean over ranks; else as Distillation.attach.
    """
    if accelerator.distributed_type not in _AVERAGED:
        raise ConfigError(
            f"accelerate runs as {accelerator.distributed_type.value}; expected one process, or several under "
            "DistributedDataParallel: other kinds scale losses, or shard what is trained beside the student"
        )
    step = host.attach(
        distillation,
        student,
        trainer="Accelerate",
        probe=probe,
        steps=steps,
        seed=seed,
        divided_by=accelerator.gradient_accumulation_steps,
        say=accelerator.print,
    ).to(accelerator.device)
    return AcceleratedStep(step, accelerator)


class AcceleratedStep:
    """A DistillStep in a loop with ``accelerator.accumulate`` and ``accelerator.backward``. Made by ``attached``.

    step
        The step itself, with all that it offers.
    """

    def __init__(self, step: DistillStep, accelerator: Accelerator) -> None:
        self.step, self._accelerator = step, accelerator
        self._looked = False

    def updates(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches, each update's announced before its first one: a loss is a mean over the whole update.

        loader
            As ``accelerator.prepare`` gives it: it says when an epoch ends, which ends an update.

        Raises ConfigError for another one, where updates have several batches.
        """
        gradients, count = self._accelerator.gradient_state, self._accelerator.gradient_accumulation_steps
        if count > 1 and not hasattr(loader, "end_of_dataloader"):
            raise ConfigError(
                f"updates() got a {type(loader).__name__} that accelerate does not know, and an update has {count} "
                "batches; expected the loader that accelerator.prepare gives"
            )
        batches, ended = iter(loader), False
        while not ended:
            parts: list[Any] = []
            while len(parts) < count and not ended:
                part = next(batches, None)
                if part is None:
                    break
                parts.append(part)
                ended = bool(gradients.end_of_dataloader)
            if not parts:
                return
            self.step.begin_update(parts)
            for number, part in enumerate(parts):
                if count > 1:  # accumulate() looks whether the epoch ends; it does with the last batch alone
                    loader.end_of_dataloader = ended and number == len(parts) - 1  # type: ignore[attr-defined]
                yield part
        next(batches, None)  # the loader takes its leave of accelerate

    def __call__(self, model: nn.Module, batch: Any) -> StepOutput:
        """The loss of one micro-batch, for ``accelerator.backward``; see DistillStep."""
        if not self._looked:
            host.refuse_unused(self.step, model)
            self._looked = True
        if (
            torch.is_grad_enabled()
            and not self.step.update.open
            and self._accelerator.gradient_accumulation_steps > 1
        ):
            raise ConfigError(
                "a batch came that no update was told of; expected the loop to go over step.updates(loader)"
            )
        with self._accelerator.autocast():
            output = self.step(model, batch)
        host.sum_when_differentiated(self.step, output.loss)
        return output

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For the optimizer: the student and what is trained beside it."""
        return self.step.parameter_groups()

    def trained_parameters(self) -> list[nn.Parameter]:
        """All that is trained, for ``accelerator.clip_grad_norm_``."""
        return [parameter for group in self.step.parameter_groups() for parameter in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """What accelerate does not hold: see DistillStep. With it ``accelerator.register_for_checkpointing(step)`` works."""
        return self.step.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; ``accelerator.load_state`` does so with a registered step, after the student's weights.

        Raises CheckpointError where it is of other methods or another number of steps.
        """
        self.step.load_state_dict(state)

    def save_state(self, folder: str | Path) -> None:
        """For a step that is not registered, beside ``accelerator.save_state(folder)``: written by the main process, no pickle."""
        if not self.step.update.open:
            self.step.end_update()
        if self._accelerator.is_main_process:
            state.save(self.step, Path(folder))

    def load_state(self, folder: str | Path) -> None:
        """After ``accelerator.load_state(folder)``."""
        state.load(self.step, Path(folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.step.__exit__(kind, error, trace)
