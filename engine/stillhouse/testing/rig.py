"""One method at work on the toys, under conditions that a check chooses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from stillhouse.testing.alike import DrawnAlike
from stillhouse.testing.toys import TOKENS, VECTORS, Plain, Toys
from stillhouse.training.compatibility import OFFERED
from stillhouse.training.labels import keep
from stillhouse.training.loop import Loop
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

    @property
    def toys(self) -> Toys:
        """Models and data of the kind of task that it is checked on."""
        return TOKENS if self.conformance.task == TOKENS.task else VECTORS

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
    toys: Toys = VECTORS
    data: Splits | None = None
    teacher: nn.Module | None = None
    student: nn.Module | None = None
    offers: frozenset[str] = OFFERED
    folder: Path | None = None


def toy_teacher(**given: Any) -> nn.Module:
    """The teacher of the checks on vectors, always with the same weights."""
    return VECTORS.teacher(**given)


def toy_student(**given: Any) -> nn.Module:
    """The student of the checks on vectors, always with the same weights."""
    return VECTORS.student(**given)


class Rig:
    """A method, the toys, and the reference loop. SGD without decay: what gets no gradient stays as it is.

    data
        What is trained on.
    """

    def __init__(self, subject: Subject, conditions: Conditions, kind: type[Method] | None = None) -> None:
        self.subject, self.conditions = subject, conditions
        self.metrics: list[dict[str, float]] = []
        given = conditions
        self.data = data = given.toys.splits() if given.data is None else given.data
        if given.folder is not None:
            given.folder.mkdir(parents=True, exist_ok=True)
        student = given.student if given.student is not None else given.toys.student()
        self.teacher = copy.deepcopy(given.teacher)
        with torch.random.fork_rng():
            torch.manual_seed(given.seed)
            self.method = (kind or subject.kind)(subject.settings())
            self.step = DistillStep(
                plugins_of(self.subject, self.method),
                task=given.toys.task,
                student=copy.deepcopy(student),
                teacher=self.teacher,
                probe=data.train.batch(torch.arange(4)),
                splits=replace(data, test=None),
                steps=given.steps,
                batch_size=given.batch_size,
                seed=given.seed,
                dir=given.folder,
                offers=given.offers if data.train.labelled else given.offers - {"labels"},
                build=lambda spec: given.toys.student(),
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
        self, make: Callable[[Batch], Batch | Sequence[Batch]]
    ) -> Iterator[tuple[Stage, dict[str, Tensor], Tensor]]:
        """For each stage that has a model: loss terms and gradients of one update.

        make
            From the stage's first eight samples to the batch, or to the update's micro-batches. What the method draws is
            the same for every row: it does not depend on how the rows are split.

        Yields the stage, the summed metrics, and every gradient in one vector.
        """
        rows = torch.arange(8)
        for stage in self.step.stages:
            self.step.begin(stage)
            made = make(self.data.stage(stage.data).batch(rows))
            parts = [made] if isinstance(made, Batch) else list(made)
            if stage.model is not None:
                yield (stage, *self._update(parts, self.step.model(stage)))

    def _update(self, parts: Sequence[Batch], model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        step = self.step
        parameters = [p for m in step.run.models.values() for p in m.parameters() if p.requires_grad]
        total: dict[str, Tensor] = {}
        for parameter in parameters:
            parameter.grad = None
        parts = [step.batches.complete(part) for part in parts]
        rows, labelled = (sum(map(count, parts)) for count in (step.kind.rows, step.kind.labelled))
        step.begin_update(rows=rows, labelled=labelled, micros=len(parts))
        for part in parts:
            with DrawnAlike():
                loss, terms = step(model, part)
                if loss.requires_grad:
                    loss.backward()
            total = {name: total.get(name, torch.zeros(())) + value for name, value in terms.items()}
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return total, torch.cat([gradient.reshape(-1) for gradient in gradients])


def plugins_of(subject: Subject, method: Method) -> list[Plugin]:
    """The method, with a plain loss beside it where it has none of its own."""
    own = Plugin(subject.name, subject.distribution, method)
    if hasattr(type(method), "loss_terms"):
        return [own]
    return [own, Plugin("plain", "stillhouse.testing", Plain())]


def conditions_for(subject: Subject, needs: frozenset[str], **given: Any) -> Conditions:
    """Conditions that offer what ``needs`` names, and nothing else that can be withheld."""
    toys, teacher = subject.toys, None
    if needs & {"logits", "hidden_states"}:
        teacher = toys.teacher(noise=0.0 if "deterministic_teacher" in needs else 0.01)
    data = toys.splits(labels="labels" in needs, unlabelled=24 if "unlabelled" in needs else 0)
    return Conditions(**{"toys": toys, "data": data, "teacher": teacher, "offers": needs, **given})


def everything(subject: Subject, *, toys: Toys | None = None, **given: Any) -> Conditions:
    """Conditions that offer all: labels, an unlabelled split, a deterministic teacher where one is asked for."""
    asked = subject.kind.requires & {"logits", "hidden_states"}
    loose, toys = not hasattr(subject.kind, "loss_terms"), toys or subject.toys
    return Conditions(**{"toys": toys, "teacher": toys.teacher() if asked or loose else None, **given})
