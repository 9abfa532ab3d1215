"""Checks of an observer: it is told of a run, and changes nothing about it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from stillhouse.api import Observer, RunRecord
from stillhouse.config import validate
from stillhouse.contract.task import Task
from stillhouse.runs.display import Display
from stillhouse.runs.recorder import Recorder
from stillhouse.testing.checks import CheckFunction, expect
from stillhouse.testing.rig import CPU, Subject, toy_student
from stillhouse.testing.state_checks import config_round_trips
from stillhouse.testing.toys import Plain, toy_splits
from stillhouse.training.loop import Loop
from stillhouse.training.step import DistillStep


def survives_a_run_and_a_resume(subject: Subject, folder: Path) -> None:
    """A run from start to end, then a second start in the same directory, as after a resume."""
    for _ in range(2):
        _run(folder, [_observer(subject)])


def training_is_unchanged(subject: Subject, folder: Path) -> None:
    """A run's weights are the same, bit for bit, with the observer and without."""
    alone = _run(folder / "alone", [])
    watched = _run(folder / "watched", [_observer(subject)])
    for name, tensor in alone.items():
        expect(
            torch.equal(tensor, watched[name]),
            subject,
            f"a run with it ends with other weights in {name}; expected an observer to read and change nothing: what is "
            "random comes from a generator of its own",
        )


def _observer(subject: Subject) -> Observer:
    made: Observer = subject.kind(subject.settings())
    return made


def _run(folder: Path, observers: list[Observer]) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    config = validate(
        {
            "name": "check",
            "task": "toys",
            "method": "plain",
            "steps": 6,
            "batch_size": 8,
            "log_every": 2,
            "validate_every": 3,
            "checkpoint_every": 6,
            "out": folder,
        }
    )
    data = toy_splits()
    # Dropout: an observer that draws from the training's random numbers shows in the weights.
    student = nn.Sequential(nn.Dropout(0.2), toy_student())
    step = DistillStep(Plain(), student=student, probe=data.train.batch(torch.arange(4)))
    recorder = Recorder(config, _Toys(), data.validation, CPU, Display(), folder, observers)
    loop = Loop(step, data, config, CPU, recorder)
    record = RunRecord("check", folder, config.model_dump(mode="json"), {"seed": 0})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for observer in observers:
            observer.on_run_start(record)
        loop.run()
    for observer in observers:
        observer.on_run_end({"scores": {"validation": {"accuracy": 0.5}}, "steps": 6})
    return student.state_dict()


class _Toys(Task):
    """The task of the toys."""

    api_version = 1


CHECKS: tuple[CheckFunction, ...] = (config_round_trips, survives_a_run_and_a_resume, training_is_unchanged)
