"""The stages of a run as a schedule: how long each is, where the run stands, and which share an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stillhouse.contract.context import Stage


@dataclass
class Position:
    """Where a run stands: the stage's number, the updates made in it, and in the whole run."""

    stage: int = 0
    stage_step: int = 0
    step: int = 0


@dataclass(frozen=True)
class Span:
    """Stages one after the other that train the same modules: one optimizer and one schedule of learning rates."""

    trained: tuple[str, ...]
    updates: int


class StageSchedule:
    """The stages in order.

    lengths
        Updates of each stage; 0 for all where the run's length is not known.
    at
        Where the run stands.
    """

    def __init__(
        self, stages: Sequence[Stage], steps: int | None, trained: Callable[[Stage], tuple[str, ...]]
    ) -> None:
        self.stages = tuple(stages)
        self.known = steps is not None
        self.lengths = stage_lengths(self.stages, steps or 0)
        self.at = Position()
        self._span_of: list[int] = []
        spans: list[Span] = []
        for stage, length in zip(self.stages, self.lengths, strict=True):
            names = trained(stage)
            if spans and spans[-1].trained == names:
                spans[-1] = Span(names, spans[-1].updates + length)
            else:
                spans.append(Span(names, length))
            self._span_of.append(len(spans) - 1)
        self.spans = tuple(spans)

    @property
    def over(self) -> bool:
        """Whether the last stage has ended."""
        return self.at.stage >= len(self.stages)

    @property
    def stage(self) -> Stage:
        """The stage that runs; the last one when all have ended."""
        return self.stages[min(self.at.stage, len(self.stages) - 1)]

    @property
    def length(self) -> int:
        """Updates of the stage that runs."""
        return self.lengths[min(self.at.stage, len(self.stages) - 1)]

    @property
    def stage_done(self) -> bool:
        """Whether the stage has made its updates."""
        return self.known and self.at.stage_step >= self.length

    @property
    def span(self) -> int:
        """Number of the span that the stage belongs to."""
        return self._span_of[min(self.at.stage, len(self.stages) - 1)]

    def advance(self) -> None:
        """One more update was made."""
        self.at.stage_step += 1
        self.at.step += 1

    def leave(self) -> None:
        """The stage has ended; the next one begins."""
        self.at.stage += 1
        self.at.stage_step = 0

    def jump(self, stage: Stage) -> None:
        """Go to the beginning of a stage."""
        self.at.stage, self.at.stage_step = self.stages.index(stage), 0

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return asdict(self.at)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the position up."""
        self.at = Position(**state)


def stage_lengths(stages: Sequence[Stage], steps: int) -> list[int]:
    """Updates of each stage: ``steps`` shared out, and stages with a length of their own on top."""
    total = sum(stage.share for stage in stages if stage.steps is None) or 1.0
    lengths, passed, given = [], 0.0, 0
    for stage in stages:
        if stage.steps is not None:
            lengths.append(stage.steps)
            continue
        passed += stage.share
        upto = round(steps * passed / total)
        lengths.append(upto - given)
        given = upto
    return lengths
