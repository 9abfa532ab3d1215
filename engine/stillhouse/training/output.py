"""What a step gives, and the sum that it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from stillhouse.contract.context import StepInfo
from stillhouse.contract.outputs import LossTerm, StudentOut
from stillhouse.errors import ConfigError, Diverged, StillhouseError


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one micro-batch gave; unpacks as ``loss, metrics``.

    loss
        A scalar with a graph. Summed over the update's micro-batches and ranks it is the mean over the update's rows.
    metrics
        The terms by ``plugin.term``, ``loss``, and what hooks logged; detached.
    outputs
        The student's outputs, or None in a stage whose losses run modules of their own.
    parts
        In an evaluation: what each term adds to the loss, its value times its weight.
    counts
        In an evaluation: the batch's rows that count, and those of them with a label.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    outputs: StudentOut | None
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    counts: tuple[float, float] | None = None

    def __iter__(self) -> Iterator[Any]:
        """``loss, metrics = step(student, batch)``."""
        return iter((self.loss, self.metrics))

    def __getitem__(self, place: int) -> Any:
        """0: the loss, 1: the metrics."""
        return (self.loss, self.metrics)[place]


def refuse_dead(name: str, out: StudentOut) -> None:
    """A feature of a trained model that has no graph teaches it nothing."""
    for module, feature in out.features.items():
        if isinstance(feature, Tensor) and feature.is_floating_point() and not feature.requires_grad:
            raise ConfigError(
                f"the feature {name}.{module} has no graph, so that nothing would be learned from it; expected one that "
                "the model's weights have a part in: with activation checkpointing say use_reentrant=False, and name "
                "no module that is frozen"
            )


def diverged(error: ValueError, student_out: StudentOut | None, info: StepInfo) -> None:
    """Raise Diverged in place of an error of a loss whose cause is that the model's outputs are not finite."""
    if isinstance(error, StillhouseError) or student_out is None or student_out.logits.isfinite().all():
        return
    where = "; ".join(getattr(error, "__notes__", [])) or "in a loss term"
    raise Diverged(
        f"the outputs of the {info.stage.model} are not finite in update {info.index}, found {where} ({error}). The "
        "last checkpoint is kept: lower optimizer.lr, or set clip"
    ) from error


def total_of(terms: Mapping[str, LossTerm]) -> Tensor:
    if not terms:
        raise ConfigError("no plugin gave a loss term for this step; expected at least one")
    total: Tensor | None = None
    for term in terms.values():
        # 1.0 * x is x: skip it, it costs a kernel and a node in the graph
        value = (
            term.value if isinstance(term.weight, float) and term.weight == 1.0 else term.weight * term.value
        )
        total = value if total is None else total + value
    assert total is not None
    return total
