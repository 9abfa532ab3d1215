"""A check of a method as a step in a loop that isn't ours: no data, no models by name, the host's optimizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import ConfigError
from stillhouse.testing.checks import CheckFunction, NotApplicable, expect
from stillhouse.testing.rig import Subject, everything, plugins_of
from stillhouse.testing.state_checks import saved
from stillhouse.training.compatibility import EMBEDDED
from stillhouse.training.step import DistillStep

UPDATES, SIZES = 8, (5, 3)


class Guest:
    """A trainer of somebody else's: its own batches, optimizer and checkpoints, and one step."""

    def __init__(self, subject: Subject) -> None:
        given = everything(subject)
        torch.manual_seed(0)
        self.data = given.toys.splits().train
        self.student = given.toys.student()
        self.step = DistillStep(
            plugins_of(subject, subject.kind(subject.settings())),
            student=self.student,
            teacher=copy.deepcopy(given.teacher),
            probe=self.data.batch(torch.arange(4)),
            task=given.toys.task,
            steps=UPDATES,
            offers=EMBEDDED,
        )
        self.optimizer = torch.optim.SGD(self.step.parameter_groups(), lr=0.05)
        self.made = 0

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return sum(self.step.schedule.lengths)

    def train(self, updates: int) -> None:
        """Make so many updates of two uneven micro-batches; each begins with a seed of its own."""
        for _ in range(updates):
            torch.manual_seed(1000 + self.made)
            rows = (torch.arange(sum(SIZES)) + sum(SIZES) * self.made) % len(self.data)
            parts = [self.data.batch(part) for part in rows.split(SIZES)]
            self.step.begin_update(parts)
            for part in parts:
                self.step(self.student, part).loss.backward()
            self.optimizer.step()
            self.step.zero_grad()
            self.made += 1

    def state(self) -> dict[str, Any]:
        """A checkpoint as a trainer writes it: its own model and optimizer, and the step's state."""
        return {
            "made": self.made,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.made = state["made"]
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step.load_state_dict(state["step"])

    def weights(self) -> dict[str, Tensor]:
        """Of every model that is trained."""
        return {
            f"{name}.{entry}": tensor.detach().clone()
            for name, model in self.step.run.models.items()
            for entry, tensor in model.state_dict().items()
        }


def works_in_another_loop(subject: Subject, folder: Path) -> None:
    """Embedded in a loop that isn't ours it trains what it brings, and goes on from a checkpoint with the same bits."""
    if "student_update" in subject.kind.requires:
        raise NotApplicable("makes the update itself, which a loop that isn't ours does")
    with torch.random.fork_rng():
        try:
            whole = Guest(subject)
        except ConfigError as error:
            raise NotApplicable(f"refuses to be embedded: {error}") from None
        with whole.step:
            whole.train(whole.updates)
        after = whole.weights()
        for stop in sorted({1, whole.updates // 2, whole.updates - 1}):
            _resumes(subject, stop, whole.updates, after)


def _resumes(subject: Subject, stop: int, updates: int, expected: Mapping[str, Tensor]) -> None:
    first, second = Guest(subject), Guest(subject)
    first.train(stop)
    second.load(saved(subject, first.state()))
    with second.step:
        second.train(updates - stop)
    for name, tensor in second.weights().items():
        expect(
            torch.equal(tensor, expected[name]),
            subject,
            f"embedded, saved after update {stop} and taken up again, it ends with other weights in {name}; expected the "
            "same bits: give what lasts from one update to the next in state_dict and take it in load_state_dict",
        )
    first.step.close()


CHECKS: tuple[CheckFunction, ...] = (works_in_another_loop,)
