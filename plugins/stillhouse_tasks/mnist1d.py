"""MNIST-1D: a 40-number analogue of MNIST, generated from a seed (Greydanus & Kobak 2020, arXiv:2011.14439)."""

from __future__ import annotations

import importlib.metadata
import random
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import MissingExtra, Splits, Task, TaskConfig, TensorSplit, made_once
from stillhouse_tasks.nets import ConvNet, mlp

LENGTH, CLASSES = 40, 10
PARTS = ("inputs", "labels", "test_inputs", "test_labels")
OFFSETS = {"validation": 1, "unlabelled": 2}
"""Added to the seed, so that further samples come from seeds of their own."""


class Mnist1dConfig(TaskConfig):
    """Sizes of the splits. 4,000 and 1,000 with seed 42 are the published training and test set."""

    train: int = Field(4000, gt=0, le=4000, description="Labelled samples, of the published 4,000.")
    unlabelled: int = Field(25_000, ge=0, description="Further samples whose labels are thrown away.")
    validation: int = Field(1000, gt=0)
    seed: int = Field(42, ge=0, description="42 makes the published set.")
    label_noise: float = Field(
        0.0, ge=0, le=1, description="Part of the training labels replaced by one of the other nine classes."
    )


class ViewsConfig(Mnist1dConfig):
    """The same for two views."""

    noise: float = Field(0.3, ge=0, description="Standard deviation of each view's own noise.")
    shift: int = Field(4, ge=0, description="Greatest shift of a view, in positions.")


def cnn(channels: int = 100) -> nn.Module:
    """A convolutional network: about 90 % right, 85,000 parameters at the default width."""
    return ConvNet(LENGTH, channels, CLASSES)


def dense(hidden: int = 100, layers: int = 2) -> nn.Module:
    """An MLP: about 64 % right on hard labels; convolutions it has to do without."""
    return mlp(LENGTH, CLASSES, hidden, layers)


class Mnist1d(Task):
    """Classify 40-number signals into ten classes; a task on which methods can be told apart."""

    api_version = 1
    Config: ClassVar[type[TaskConfig]] = Mnist1dConfig
    config: Mnist1dConfig
    teachers = {"cnn": cnn, "mlp": dense}
    students = {"mlp": dense, "cnn": cnn}
    teacher_training = {
        "steps": 4000,
        "batch_size": 128,
        "optimizer": {"lr": 2e-3},
        "scheduler": "CosineAnnealingLR",
    }

    def splits(self) -> Splits:
        config = self.config
        published = make(5000, config.seed, test=1000)
        validation = make(config.validation, config.seed + OFFSETS["validation"])
        unlabelled = make(config.unlabelled, config.seed + OFFSETS["unlabelled"])
        labels = with_noise(published[1][: config.train], config.label_noise, config.seed)
        return Splits(
            train=TensorSplit(published[0][: config.train], labels),
            validation=TensorSplit(*validation[:2]),
            test=TensorSplit(*published[2:]),
            unlabelled=TensorSplit(unlabelled[0]) if config.unlabelled else None,
        )


class Mnist1dViews(Mnist1d):
    """Teacher and student each see a rendering of their own of the same sample: shifted and noised apart."""

    Config: ClassVar[type[TaskConfig]] = ViewsConfig
    config: ViewsConfig

    def splits(self) -> Splits:
        plain = super().splits()
        generator = torch.Generator().manual_seed(self.config.seed)
        views = Splits(train=plain.train)
        for name, split in plain.items():
            assert isinstance(split, TensorSplit)
            student, teacher = (self._view(split.inputs, generator) for _ in range(2))
            setattr(views, name, TensorSplit(student, split.labels, teacher_inputs=teacher))
        return views

    def _view(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Each row rolled by up to ``shift`` positions and noised ``(N, 40)``."""
        shifts = torch.randint(
            -self.config.shift, self.config.shift + 1, (len(inputs), 1), generator=generator
        )
        columns = (torch.arange(LENGTH) + shifts) % LENGTH
        return inputs.gather(1, columns) + self.config.noise * torch.randn(inputs.shape, generator=generator)


def with_noise(labels: Tensor, part: float, seed: int) -> Tensor:
    """The labels ``(n,)`` with ``round(part * n)`` of them moved to a wrong class, each as likely as the others."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: round(part * len(labels))]
    noisy = labels.clone()
    noisy[wrong] += torch.randint(1, CLASSES, (len(wrong),), generator=generator)
    return noisy % CLASSES


def make(samples: int, seed: int, test: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples: training inputs ``(n, 40)`` and labels ``(n,)``, then those of the test part.

    Generating them takes seconds, a sample at a time in Python: it is done once, and they are kept.
    """
    made = made_once(
        "data",
        {"task": "mnist1d", "samples": samples, "seed": seed, "test": test, **generators("mnist1d")},
        lambda: dict(zip(PARTS, _generate(samples, seed, test), strict=True)),
    )
    x, y, x_test, y_test = (made[name] for name in PARTS)
    return x, y, x_test, y_test


def generators(task: str) -> dict[str, str]:
    """Versions of the libraries that the samples of ``task`` come from."""
    try:
        return {name: importlib.metadata.version(name) for name in ("mnist1d", "numpy", "scipy")}
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtra(f"task '{task}'", str(error.name), "tasks") from None


def _generate(samples: int, seed: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The generator seeds python's and numpy's global state; both are put back."""
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError:
        raise MissingExtra("task 'mnist1d'", "mnist1d", "tasks") from None
    args = get_dataset_args()
    # A class at a time: round up, then cut.
    args.num_samples = -(-samples // CLASSES) * CLASSES
    args.train_split = 1 - test / args.num_samples if args.num_samples else 1.0
    args.seed = seed
    if not samples:
        nothing = torch.empty(0, LENGTH), torch.empty(0, dtype=torch.long)
        return (*nothing, *nothing)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        made = make_dataset(args)
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    x, x_test = (torch.tensor(made[name], dtype=torch.float32) for name in ("x", "x_test"))
    y, y_test = (torch.tensor(made[name], dtype=torch.long) for name in ("y", "y_test"))
    kept = len(x) if test else samples
    return x[:kept], y[:kept], x_test, y_test
