"""One method at work on the toys, under conditions that a check chooses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.api import Batch, Conformance, Method, Stage
from stillhouse.config import Training
from stillhouse.contract.splits import Split, Splits
from stillhouse.plugin.catalog import Entry
from stillhouse.plugin.dispatch import Plugin
from stillhouse.plugin.load import settings_of
from stillhouse.softlabels import SoftLabels
from stillhouse.testing.toys import Plain, ToyStudent, ToyTeacher, toy_splits
from stillhouse.training.compatibility import OFFERED
from stillhouse.training.labels import keep
from stillhouse.training.loop import Loop, micro_batches
from stillhouse.training.step import DistillStep

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Subject:
    """What is checked: a plugin's class, and where it came from."""

    kind: type[Any]
    name: str
    distribution: str
    conformance: Conformance = field(default_factory=Conformance)
    entry: Entry | None = None
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What several checks look at and takes long to make."""

    def __str__(self) -> str:
        return f"plugin '{self.name}' ({self.distribution})"

    def settings(self) -> Any:
        """The validated settings that are checked."""
        return settings_of(self.kind.Config, self.conformance.settings, "conformance.settings")


@dataclass(frozen=True)
class Conditions:
    """Under what a method is run. The defaults offer everything."""

    steps: int = 6
    batch_size: int = 8
    micro_batch_size: int | None = None
    seed: int = 0
    precision: str = "fp32"
    learning_rate: float = 0.05
    data: Splits = field(default_factory=toy_splits)
    teacher: nn.Module | None = None
    student: nn.Module | None = None
    offers: frozenset[str] = OFFERED
    folder: Path | None = None


def toy_teacher(**given: Any) -> ToyTeacher:
    """The teacher of every check, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return ToyTeacher(**given)


def toy_student(**given: Any) -> ToyStudent:
    """The student of every check, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return ToyStudent(**given)


class Rig:
    """A method, the toys, and the reference loop. SGD without decay: what gets no gradient stays as it is."""

    def __init__(self, subject: Subject, conditions: Conditions, kind: type[Method] | None = None) -> None:
        self.subject, self.conditions = subject, conditions
        self.metrics: list[dict[str, float]] = []
        data, given = conditions.data, conditions
        if given.folder is not None:
            given.folder.mkdir(parents=True, exist_ok=True)
        student = given.student if given.student is not None else toy_student()
        self.teacher = copy.deepcopy(given.teacher)
        with torch.random.fork_rng():
            torch.manual_seed(given.seed)
            self.method = (kind or subject.kind)(subject.settings())
            self.step = DistillStep(
                self._plugins(),
                student=copy.deepcopy(student),
                teacher=self.teacher,
                probe=data.train.batch(torch.arange(4)),
                splits=replace(data, test=None),
                steps=given.steps,
                batch_size=given.batch_size,
                seed=given.seed,
                dir=given.folder,
                offers=given.offers if data.train.labelled else given.offers - {"labels"},
                build=lambda spec: toy_student(),
            )
        settings = Training.model_validate(
            {
                "steps": given.steps,
                "batch_size": given.batch_size,
                "micro_batch_size": given.micro_batch_size,
                "seed": given.seed,
                "precision": given.precision,
                "optimizer": {"name": "SGD", "lr": given.learning_rate, "weight_decay": 0.0},
            }
        )
        self.loop = Loop(self.step, data, settings, CPU, self)

    def _plugins(self) -> list[Plugin]:
        own = Plugin(self.subject.name, self.subject.distribution, self.method)
        if hasattr(type(self.method), "loss_terms"):
            return [own]
        return [own, Plugin("plain", "stillhouse.testing", Plain())]

    # The loop's watcher.

    def updated(self, loop: Loop, metrics: Mapping[str, Tensor]) -> None:
        self.metrics.append({name: float(value) for name, value in metrics.items()})

    def stage_ended(self, loop: Loop) -> None:
        loop.step.teachers.check(loop.step.plugins, whole=True)

    def keep(self, loop: Loop, split: Split) -> SoftLabels | None:
        return keep(loop, split, self.conditions.folder)

    # What checks look at.

    @property
    def final(self) -> nn.Module:
        """The model that the last stage trains."""
        return self.step.model(self.step.stages[-1])

    def weights(self) -> dict[str, Tensor]:
        """Every trained model's state, under ``model.entry``."""
        return {
            f"{name}.{entry}": tensor.detach().clone()
            for name, model in self.step.run.models.items()
            for entry, tensor in model.state_dict().items()
        }

    def unfinished(self) -> str:
        """The first number of the metrics or weights that is not finite, or an empty string."""
        for number, row in enumerate(self.metrics):
            for name, value in row.items():
                if not math.isfinite(value):
                    return f"{name} = {value} in update {number}"
        for name, tensor in self.weights().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return f"the weights of {name} hold NaN or infinity"
        return ""

    def updates(
        self, make: Callable[[Batch], Batch], seed: int = 0
    ) -> Iterator[tuple[Stage, dict[str, Tensor], Tensor]]:
        """For each stage that has a model: loss terms and gradients of one update on ``make(batch)``.

        make
            From the stage's first eight rows to the batch; the micro-batches follow the conditions.
        seed
            Of what the method draws during an update.

        Yields the stage, the summed metrics, and every gradient in one vector.
        """
        rows = torch.arange(8)
        for stage in self.step.stages:
            self.step.begin(stage)
            batch = make(self.conditions.data.stage(stage.data).batch(rows))
            if stage.model is not None:
                yield (stage, *self._update(batch, self.step.model(stage), seed))

    def _update(self, batch: Batch, model: nn.Module, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        parts = micro_batches(batch, self.conditions.micro_batch_size)
        parameters = [p for m in self.step.run.models.values() for p in m.parameters() if p.requires_grad]
        total: dict[str, Tensor] = {}
        for parameter in parameters:
            parameter.grad = None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.step.begin_update(parts)
            for part in parts:
                loss, terms = self.step(model, part)
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                total = {name: total.get(name, torch.zeros(())) + value for name, value in terms.items()}
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return total, torch.cat([gradient.reshape(-1) for gradient in gradients])


def conditions_for(needs: frozenset[str], **given: Any) -> Conditions:
    """Conditions that offer what ``needs`` names, and nothing else that can be withheld."""
    teacher = None
    if needs & {"logits", "hidden_states"}:
        teacher = toy_teacher(noise=0.0 if "deterministic_teacher" in needs else 0.01)
    data = toy_splits(labels="labels" in needs, unlabelled=24 if "unlabelled" in needs else 0)
    return Conditions(**{"data": data, "teacher": teacher, "offers": needs, **given})


def everything(subject: Subject, **given: Any) -> Conditions:
    """Conditions that offer all: labels, an unlabelled split, a deterministic teacher where one is asked for."""
    asked = subject.kind.requires & {"logits", "hidden_states"}
    loose = not hasattr(subject.kind, "loss_terms")
    return Conditions(**{"teacher": toy_teacher() if asked or loose else None, **given})
