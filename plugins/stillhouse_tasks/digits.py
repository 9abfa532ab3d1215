"""scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, 10 classes (Alpaydin & Kaynak 1998)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from stillhouse.api import ConfigError, MissingExtra, Splits, Task, TaskConfig, TensorSplit
from stillhouse_tasks.nets import mlp

PIXELS, CLASSES = 64, 10


class DigitsConfig(TaskConfig):
    """How the 1,797 images are divided; what is left over is the test split."""

    labelled: int = Field(300, gt=0, description="Training images that keep their label.")
    unlabelled: int = Field(600, ge=0, description="Training images without theirs.")
    validation: int = Field(300, gt=0)
    seed: int = Field(0, ge=0, description="Of the division.")


def wide_mlp(hidden: int = 512, layers: int = 2) -> nn.Module:
    """A wide MLP."""
    return mlp(PIXELS, CLASSES, hidden, layers)


def small_mlp(hidden: int = 16, layers: int = 1) -> nn.Module:
    """A narrow MLP."""
    return mlp(PIXELS, CLASSES, hidden, layers)


class OverlaidConfig(DigitsConfig):
    """The same, with nuisance."""

    strength: float = Field(0.7, ge=0, description="Of the image that is laid over each.")


class Digits(Task):
    """Classify handwritten digits; pixels are scaled to 0..1."""

    api_version = 1
    Config: ClassVar[type[TaskConfig]] = DigitsConfig
    config: DigitsConfig
    teachers = {"mlp": wide_mlp}
    students = {"mlp": small_mlp}
    teacher_training = {"steps": 1500, "optimizer": {"lr": 1e-3}}

    def splits(self) -> Splits:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise MissingExtra("task 'digits'", "scikit-learn", "tasks") from None
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.config.seed))
        inputs = torch.tensor(images, dtype=torch.float32)[order] / 16
        classes = torch.tensor(labels, dtype=torch.long)[order]
        config = self.config
        sizes = [config.labelled, config.unlabelled, config.validation]
        if sum(sizes) >= len(images):
            raise ConfigError(
                f"task: labelled + unlabelled + validation = {sum(sizes)} of {len(images)} images; expected "
                "fewer, so that some are left to test on"
            )
        ends = torch.tensor(sizes).cumsum(0)
        x, y = inputs.tensor_split(ends), classes.tensor_split(ends)
        return Splits(
            train=TensorSplit(x[0], y[0]),
            unlabelled=TensorSplit(x[1]) if config.unlabelled else None,
            validation=TensorSplit(x[2], y[2]),
            test=TensorSplit(x[3], y[3]),
        )


class OverlaidDigits(Digits):
    """Digits with another image of the same split laid over each, fainter: nuisance that says nothing of the label."""

    Config: ClassVar[type[TaskConfig]] = OverlaidConfig
    config: OverlaidConfig

    def splits(self) -> Splits:
        plain = super().splits()
        generator = torch.Generator().manual_seed(self.config.seed)
        made = Splits(train=plain.train)
        for name, split in plain.items():
            assert isinstance(split, TensorSplit)
            other = split.inputs[torch.randperm(len(split), generator=generator)]
            setattr(made, name, TensorSplit(split.inputs + self.config.strength * other, split.labels))
        return made
