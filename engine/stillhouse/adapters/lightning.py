"""Lightning: a LightningModule to use, or to mix into one of your own::

    from stillhouse.adapters.lightning import DistilledModule, UpdateLoader

    module = DistilledModule(student, distillation, optimizer=lambda groups: AdamW(groups, lr=1e-3))
    L.Trainer(max_steps=1000).fit(module, UpdateLoader(dataset, batch_size=32))

A module of one's own adds ``Distilling`` to its bases, calls ``self.distil(student, distillation)`` in its constructor,
returns ``self.distilled(batch)`` from ``training_step``, and gives ``self.step.parameter_groups()`` to its optimizer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stillhouse.adapters import host
from stillhouse.errors import ConfigError, MissingExtra
from stillhouse.training.distillation import Distillation
from stillhouse.training.random_state import RandomState
from stillhouse.training.step import DistillStep

try:
    import lightning
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ImportError:
    raise MissingExtra("stillhouse.adapters.lightning", "lightning", "lightning") from None

_STATE = "stillhouse"


class UpdateLoader(DataLoader[Any]):
    """A DataLoader that reads as far ahead as one update reaches: a loss is a mean over the whole update.

    accumulate_grad_batches
        The trainer's. With 1, any DataLoader will do.
    """

    def __init__(self, *args: Any, accumulate_grad_batches: int = 1, **named: Any) -> None:
        super().__init__(*args, **named)
        self.accumulate_grad_batches = accumulate_grad_batches
        self.limit: int | None = None
        self.updates: deque[list[Any]] = deque()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches; ``updates`` holds the lists that they are handed out in."""
        self.updates.clear()
        batches = islice(super().__iter__(), self.limit)
        while update := list(islice(batches, self.accumulate_grad_batches)):
            self.updates.append(update)
            yield from update


class Distilling:
    """What a LightningModule mixes in, before ``LightningModule``: a loss, its terms in the log, a state that resumes."""

    trainer: Any

    def distil(self, student: nn.Module, distillation: Distillation, *, seed: int = 0) -> None:
        """Say what is distilled, in the constructor. ``seed`` draws what is trained beside the student."""
        self._asked = (student, distillation, seed)
        self._step: DistillStep | None = None
        self._state: dict[str, Any] | None = None

    @property
    def step(self) -> DistillStep:
        """The step, attached with the trainer's own data when it is asked for first, as ``configure_optimizers`` does."""
        if self._step is None:
            self._step = self._attach()
        return self._step

    def _attach(self) -> DistillStep:
        student, distillation, seed = self._asked
        trainer = self.trainer
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ConfigError(
                f"Lightning runs with {type(trainer.strategy).__name__}; expected one device, or DDPStrategy: other "
                "strategies scale losses, or shard what is trained beside the student"
            )
        steps = trainer.estimated_stepping_batches  # makes the loaders too
        loader = trainer.train_dataloader
        if trainer.accumulate_grad_batches > 1:
            self._check_loader(loader)
        outside = RandomState.capture()
        try:
            rows = getattr(loader, "dataset", None)
            known = hasattr(rows, "__getitem__") and hasattr(rows, "__len__")
            probe = (
                loader.collate_fn([rows[i] for i in range(min(4, len(rows)))])  # type: ignore[index,arg-type]
                if known
                else next(iter(loader))
            )
        finally:
            outside.restore()
        step = host.attach(
            distillation,
            student,
            trainer="Lightning",
            probe=probe,
            steps=None if steps == float("inf") else int(steps),
            seed=seed,
            divided_by=trainer.accumulate_grad_batches,
            say=print if trainer.is_global_zero else lambda message: None,
        )
        host.refuse_unused(step, trainer.strategy.model)
        if self._state is not None:
            step.load_state_dict(self._state)
            self._state = None
        return step

    def _check_loader(self, loader: Any) -> None:
        count, batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        own = getattr(loader, "accumulate_grad_batches", None)
        if own != count or batches == float("inf"):
            what = f"{type(loader).__name__}" + (f" of {own}" if own else "")
            raise ConfigError(
                f"an update has {count} batches, and the training loader is a {what}; expected one that reads so far "
                f"ahead, over data of known length: UpdateLoader(..., accumulate_grad_batches={count}), from stillhouse.adapters.lightning"
            )
        loader.limit = int(batches)

    def distilled(self, batch: Any) -> Tensor:
        """The loss of a batch, to return from ``training_step`` or to log from ``validation_step``."""
        step, loader = self.step, self.trainer.train_dataloader
        training = torch.is_grad_enabled()
        if training and not step.update.open:
            if isinstance(loader, UpdateLoader) and loader.updates:
                step.begin_update(loader.updates.popleft())
            else:
                step.begin_update([batch])
        output = step(step.run.student, batch)
        host.sum_when_differentiated(step, output.loss)
        if not training:
            return output.loss
        if not step.update.open:  # the update is whole: its terms are the sums over its micro-batches
            # Lightning shows the mean over ranks, of which each has its part of the sum.
            named = {name: value * host.ranks() for name, value in step.update.metrics.items()}
            self.log_dict(named, sync_dist=host.ranks() > 1, batch_size=1)  # type: ignore[attr-defined]
        return output.loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Auxiliary modules, stages and the plugins' own state; no teacher."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        if self._step is not None:
            if not self._step.update.open:
                self._step.end_update()
            checkpoint[_STATE] = self._step.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Kept until the step is attached."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        self._state = checkpoint.get(_STATE)
        if self._step is not None and self._state is not None:
            self._step.load_state_dict(self._state)
            self._state = None

    def on_train_end(self) -> None:
        """The last update, stage and run have ended."""
        super().on_train_end()  # type: ignore[misc]
        self.step.finish()


class DistilledModule(Distilling, lightning.LightningModule):  # type: ignore[misc]
    """A student and its distillation.

    optimizer
        From parameter groups to an optimizer, or to what ``configure_optimizers`` may return.
    """

    def __init__(
        self,
        student: nn.Module,
        distillation: Distillation,
        *,
        optimizer: Callable[[list[dict[str, Any]]], Any],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student, self._optimizer = student, optimizer
        self.distil(student, distillation, seed=seed)

    def configure_optimizers(self) -> Any:
        """For the student and what is trained beside it."""
        return self._optimizer(self.step.parameter_groups())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The distillation's loss."""
        return self.distilled(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the loss as ``val_loss``: a mean over batches, each weighted by its rows that count."""
        output = self.step.evaluate(self.student, batch)
        rows, _ = output.counts or (0.0, 0.0)
        self.log("val_loss", output.loss, sync_dist=True, on_epoch=True, batch_size=int(rows))
