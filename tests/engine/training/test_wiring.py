"""Whether a trainer trains and clears what a method trains beside the student: told in the first updates."""

from __future__ import annotations

import pytest
import torch
import toys
from torch import nn

from stillhouse.api import LossTerm, hookimpl
from stillhouse.errors import ConfigError
from stillhouse.training.step import DistillStep


class Headed(toys.Squares):
    """A head on the student's outputs."""

    @hookimpl
    def auxiliary_modules(self, run):
        self.head = nn.Linear(toys.CLASSES, 2)
        return {"head": self.head}

    @hookimpl
    def loss_terms(self, student_out, info):
        return {"square": LossTerm(info.mean(self.head(student_out.logits).square().mean(-1)))}


class Trainer:
    """Somebody's loop, which knows of ``parts``."""

    def __init__(self, method=None, *, trains=("student", "head"), clears=("student", "head")):
        self.step = DistillStep(method or Headed(), student=toys.net(), probe=toys.rows(4))
        self.models = {"student": self.step.run.student, "head": self.step.run.models.get("headed.head")}
        self.clears = clears
        trained = [p for name in trains for p in self.models[name].parameters()]
        self.optimizer = torch.optim.SGD(trained, lr=0.1)

    def update(self, micros: int = 1) -> None:
        batches = [toys.rows(4, seed) for seed in range(micros)]
        self.step.begin_update(batches)
        for batch in batches:
            self.step(self.models["student"], batch).loss.backward()
        self.optimizer.step()
        for name in self.clears:
            self.models[name].zero_grad()


def test_a_trainer_that_knows_of_both_is_left_in_peace():
    trainer = Trainer()
    for _ in range(4):
        trainer.update(micros=3)


def test_what_is_never_trained_is_told_of_at_the_second_update():
    trainer = Trainer(trains=("student",))
    trainer.update()
    with pytest.raises(
        ConfigError, match=r"was trained in the last update, and .*\(headed\.head\) was not; give step"
    ):
        trainer.update()


@pytest.mark.parametrize("trains", [("student",), ("student", "head")])
def test_gradients_that_pile_up_are_told_of_at_the_second_update(trains):
    trainer = Trainer(trains=trains, clears=("student",))
    trainer.update()
    with pytest.raises(ConfigError, match=r"gradients of .*\(headed\.head\) were not cleared"):
        trainer.update()


def test_a_trainer_that_accumulates_on_its_own_is_left_in_peace():
    """Nothing cleared and nothing trained between two backward passes: its update goes on."""
    trainer = Trainer()
    for seed in range(3):
        trainer.step(trainer.models["student"], toys.rows(4, seed)).loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.update()


def test_a_trainer_may_clear_right_before_the_backward_pass():
    """So that gradients are looked at when the loss is differentiated, and not when it is made."""
    trainer = Trainer()
    for seed in range(3):
        loss = trainer.step(trainer.models["student"], toys.rows(4, seed)).loss
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        trainer.models["student"].zero_grad()


def test_a_loss_that_is_not_differentiated_is_no_update():
    trainer = Trainer(trains=("student",))
    for _ in range(3):
        trainer.step(trainer.models["student"], toys.rows(4))


def test_without_modules_beside_the_student_there_is_nothing_to_see():
    trainer = Trainer(toys.Squares(), trains=("student",), clears=())
    for _ in range(3):
        trainer.update()


def test_the_loop_of_a_run_is_not_watched():
    trainer = Trainer(trains=("student",))
    trainer.step.progress.drive(9)
    trainer.step.progress.begin(trainer.step.stages[0])
    for _ in range(3):
        trainer.update()


def test_two_losses_summed_for_one_backward_pass_are_left_in_peace():
    """The modules beside the student may get their gradient before the first loss's own pass is told of."""
    step = DistillStep([Headed()], student=toys.net(), probe=toys.rows(4))
    optimizer = torch.optim.SGD(step.parameter_groups(), 0.1)
    for _ in range(4):
        parts = [toys.rows(4), toys.rows(4, 1)]
        step.begin_update(parts)
        sum(step(step.run.student, part).loss for part in parts).backward()
        optimizer.step()
        step.zero_grad()
