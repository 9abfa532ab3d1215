"""MNIST-1D as three tasks, each with samples and labels of its own: digit, parity, position.

The signals are made with the package's own steps (Greydanus & Kobak 2020, arXiv:2011.14439), one after the other as
its ``transform`` does, so that the place to which the digit is moved is known.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import Metrics, MissingExtra, Splits, Task, TaskConfig, TensorSplit, made_once
from stillhouse_tasks.mnist1d import LENGTH, generators
from stillhouse_tasks.multihead import EachTask, MultiHead, labelled, unlabelled
from stillhouse_tasks.nets import ConvNet, mlp

TASKS = {"digit": 10, "parity": 2, "position": 4}
"""Classes of each task; a label is a column of the heads side by side."""

PARTS = ("signals", "digits", "positions")
Made = tuple[Tensor, Tensor, Tensor]
"""Signals ``(n, 40)``, digits ``(n,)`` and positions ``(n,)``."""


class MultitaskConfig(TaskConfig):
    """Sizes of the splits. Each sample has the label of one task alone."""

    digit: int = Field(3000, gt=0, description="Training samples labelled with the digit.")
    parity: int = Field(1000, gt=0, description="Training samples labelled with the digit's parity.")
    position: int = Field(
        500, gt=0, description="Training samples labelled with the quarter the digit is in."
    )
    unlabelled: int = Field(
        10_000, ge=0, description="Further samples without label; every task is asked of each."
    )
    validation: int = Field(500, gt=0, description="Validation samples of each task.")
    test: int = Field(1000, gt=0, description="Test samples of each task.")
    seed: int = Field(42, ge=0)


def cnn(channels: int = 100, width: int = 64) -> nn.Module:
    """A convolutional trunk shared by three heads."""
    trunk = nn.Sequential(ConvNet(LENGTH, channels, width), nn.ReLU())
    return MultiHead(trunk, width, list(TASKS.values()))


def dense(hidden: int = 100, layers: int = 2) -> nn.Module:
    """An MLP as trunk, shared by three heads."""
    trunk = nn.Sequential(mlp(LENGTH, hidden, hidden, layers - 1), nn.ReLU())
    return MultiHead(trunk, hidden, list(TASKS.values()))


class Mnist1dMultitask(Task):
    """Digit class, parity and position; the models are told which is asked by ``task`` among their inputs.

    ``extra["task"]`` holds the same ids: 0, 1, 2, and -1 for unlabelled samples. ``accuracy`` is the mean over tasks.
    """

    api_version = 1
    Config = MultitaskConfig
    config: MultitaskConfig
    teachers = {"cnn": cnn}
    students = {"mlp": dense}
    teacher_training = {
        "steps": 3000,
        "batch_size": 128,
        "optimizer": {"lr": 2e-3},
        "scheduler": "CosineAnnealingLR",
    }

    def splits(self) -> Splits:
        config = self.config
        train = [config.digit, config.parity, config.position]
        validation, test = [config.validation] * 3, [config.test] * 3
        sizes = [*train, *validation, *test, config.unlabelled]
        signals, digits, positions = make(sum(sizes), config.seed)
        mean, std = signals[: sum(train)].mean(), signals[: sum(train)].std()
        parts = zip(
            *(torch.split(made, sizes) for made in ((signals - mean) / std, digits, positions)), strict=True
        )
        found = list(parts)
        x = found[-1][0]
        return Splits(
            train=_labelled(found[:3]),
            validation=_labelled(found[3:6]),
            test=_labelled(found[6:9]),
            unlabelled=unlabelled(x) if len(x) else None,
        )

    def metrics(self) -> Metrics:
        return {"": EachTask(TASKS)}


def _labelled(parts: list[Made]) -> TensorSplit:
    """One part for each task, joined."""
    return labelled(
        [part[0] for part in parts], [parts[0][1], parts[1][1] % 2, parts[2][2]], list(TASKS.values())
    )


def make(samples: int, seed: int) -> Made:
    """Signals, their digits, and the quarter (0 to 3) of the places that the digit was moved to; generated once."""
    made = made_once(
        "data",
        {"task": "mnist1d-multitask", "samples": samples, "seed": seed, **generators("mnist1d-multitask")},
        lambda: dict(zip(PARTS, _generate(samples, seed), strict=True)),
    )
    signals, digits, quarters = (made[name] for name in PARTS)
    return signals, digits, quarters


def _generate(samples: int, seed: int) -> Made:
    """The generator reads numpy's and python's global state; both are put back."""
    try:
        from mnist1d.data import get_dataset_args, get_templates
    except ImportError:
        raise MissingExtra("task 'mnist1d-multitask'", "mnist1d", "tasks") from None
    args, templates = get_dataset_args(), get_templates()
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        np.random.seed(seed)
        random.seed(seed)
        digits = np.random.randint(len(templates["y"]), size=samples)
        moved = np.random.randint(args.max_translation, size=samples)
        signals = [_signal(templates["x"][d], int(k), args) for d, k in zip(digits, moved, strict=True)]
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    classes = torch.tensor(np.asarray(templates["y"])[digits], dtype=torch.long)
    quarter = torch.tensor(moved * TASKS["position"] // args.max_translation, dtype=torch.long)
    return torch.tensor(np.stack(signals), dtype=torch.float32), classes, quarter


def _signal(template: np.ndarray[Any, Any], places: int, args: Any) -> np.ndarray[Any, Any]:
    """``mnist1d.transform.transform`` with the translation given instead of drawn."""
    from importlib import import_module

    steps = import_module("mnist1d.transform")  # the package hides it behind a function of that name

    longest = args.template_len + args.padding[-1]
    x = steps.interpolate(steps.pad(template + 1e-8, args.padding), longest)
    x = np.roll(x * (1 + args.scale_coeff * (np.random.rand() - 0.5)), places)
    mask = x != 0
    x = mask * x + (1 - mask) * steps.corr_noise_like(x, args.corr_noise_scale)
    x = steps.shear(x + steps.iid_noise_like(x, args.iid_noise_scale), args.shear_scale)
    made: np.ndarray[Any, Any] = steps.interpolate(x, args.final_seq_length)
    return made
