"""Small models, data and methods that tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.api import LossTerm, Method, Splits, Task, TensorSplit, hookimpl
from stillhouse.config import Training
from stillhouse.runs.evaluate import computed
from stillhouse.training.compatibility import OFFERED
from stillhouse.training.loop import Loop
from stillhouse.training.step import DistillStep

FEATURES, CLASSES = 6, 4


def net(hidden: int = 8, *, seed: int = 0, dropout: float = 0.0, outputs: int = CLASSES) -> nn.Sequential:
    """Features to classes, with weights from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs)
        )


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator)
    return inputs, torch.randint(CLASSES, (count,), generator=generator)


def splits(train: int = 48, unlabelled: int = 64, *, labels: bool = True) -> Splits:
    """Every split of a small task."""
    x, y = rows(train, 1)
    return Splits(
        train=TensorSplit(x, y if labels else None),
        validation=TensorSplit(*rows(16, 2)),
        test=TensorSplit(*rows(16, 3)),
        unlabelled=TensorSplit(rows(unlabelled, 4)[0]) if unlabelled else None,
    )


def scores(task: Task, outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """What a task's metrics make of these rows."""
    metrics = task.metrics()
    for metric in metrics.values():
        metric.update(outputs, labels)
    return computed(task, metrics)


class Silent:
    """A watcher that keeps what it is told."""

    def __init__(self, keep: Callable[..., Any] | None = None) -> None:
        self.metrics: list[dict[str, float]] = []
        self.ended: list[int] = []
        self._keep = keep

    def updated(self, loop: Loop, metrics: Any) -> None:
        self.metrics.append({name: float(value) for name, value in metrics.items()})

    def stage_ended(self, loop: Loop) -> None:
        self.ended.append(loop.at.step)

    def keep(self, loop: Loop, split: Any) -> Any:
        return self._keep(loop, split, None) if self._keep else None


def loop(
    method: Any = "kd",
    *,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    target: nn.Module | None = None,
    data: Splits | None = None,
    keep: Callable[..., Any] | None = None,
    **training: Any,
) -> Loop:
    """A loop over a step over toys."""
    settings = Training.model_validate({"steps": 12, "batch_size": 8, "device": "cpu", **training})
    data = data or splits()
    student = student if student is not None else net(8, seed=1)
    if teacher is None and method != "hard_labels":
        teacher = net(16, seed=2)
    step = DistillStep(
        method,
        student=student,
        teacher=teacher,
        target=target,
        probe=data.train.batch(torch.arange(4)),
        splits=data,
        steps=settings.steps,
        batch_size=settings.batch_size,
        seed=settings.seed,
        offers=OFFERED,
    )
    return Loop(step, data, settings, torch.device("cpu"), Silent(keep))


def watch_ids(loop: Loop, seen: Callable[[str, list[int]], None]) -> None:
    """Call ``seen(stage, sample numbers)`` at each micro-batch of the loop."""
    terms = loop.step.plugins.loss_terms

    def watched(student_out: Any, teacher_out: Any, targets: Any, batch: Any, info: Any) -> Any:
        seen(info.stage.name, batch.ids.tolist())
        return terms(student_out, teacher_out, targets, batch, info)

    loop.step.plugins.loss_terms = watched  # type: ignore[method-assign]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(a: Any, b: Any) -> bool:
    """Whether two models or states are equal bit for bit."""
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Squares(Method):
    """A method that needs nothing: the mean square of the student's logits."""

    api_version = 1
    requires = frozenset()

    @hookimpl
    def loss_terms(self, student_out, batch, info):
        return {"square": LossTerm(info.mean(student_out.logits.square().mean(-1), batch.mask))}


class Alike(Squares):
    """A method for a teacher and a student of as many outputs."""

    requires = frozenset({"logits"})
