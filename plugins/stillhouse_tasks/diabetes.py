"""scikit-learn's diabetes data: 442 patients, 10 measurements, progression after a year (Efron et al. 2004)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import ConfigError, MissingExtra, Splits, Task, TaskConfig, TensorSplit
from stillhouse_tasks.nets import mlp

MEASUREMENTS = 10


class DiabetesConfig(TaskConfig):
    """How the 442 patients are divided; what is left over is the test split."""

    labelled: int = Field(220, gt=0, description="Training patients that keep their label.")
    unlabelled: int = Field(0, ge=0, description="Training patients without theirs.")
    validation: int = Field(100, gt=0)
    seed: int = Field(0, ge=0, description="Of the division.")


def wide_mlp(hidden: int = 128, layers: int = 2) -> nn.Module:
    """A wide MLP with one output."""
    return mlp(MEASUREMENTS, 1, hidden, layers)


def small_mlp(hidden: int = 8, layers: int = 1) -> nn.Module:
    """A narrow MLP with one output."""
    return mlp(MEASUREMENTS, 1, hidden, layers)


class Diabetes(Task):
    """Predict disease progression: a regression task.

    Inputs ``(N, 10)`` and labels ``(N, 1)`` are standardised by the training patients' mean and deviation.
    """

    api_version = 1
    Config = DiabetesConfig
    config: DiabetesConfig
    kind = "regression"
    metric = "r2"
    teachers = {"mlp": wide_mlp}
    students = {"mlp": small_mlp}
    # Few rows: a short training with strong decay stops before it fits them one by one.
    teacher_training = {"steps": 60, "batch_size": 64, "optimizer": {"lr": 1e-3, "weight_decay": 0.1}}

    def splits(self) -> Splits:
        try:
            from sklearn.datasets import load_diabetes
        except ImportError:
            raise MissingExtra("task 'diabetes'", "scikit-learn", "tasks") from None
        measured, progression = load_diabetes(return_X_y=True, scaled=False)
        config, patients = self.config, len(measured)
        sizes = [config.labelled, config.unlabelled, config.validation]
        if sum(sizes) >= patients:
            raise ConfigError(
                f"task: labelled + unlabelled + validation = {sum(sizes)} of {patients} patients; expected "
                "fewer, so that some are left to test on"
            )
        order = torch.randperm(patients, generator=torch.Generator().manual_seed(config.seed))
        inputs = torch.tensor(measured, dtype=torch.float32)[order]
        labels = torch.tensor(progression, dtype=torch.float32)[order, None]
        ends = torch.tensor(sizes).cumsum(0)
        x = _standardised(inputs, config.labelled).tensor_split(ends)
        y = _standardised(labels, config.labelled).tensor_split(ends)
        return Splits(
            train=TensorSplit(x[0], y[0]),
            unlabelled=TensorSplit(x[1]) if config.unlabelled else None,
            validation=TensorSplit(x[2], y[2]),
            test=TensorSplit(x[3], y[3]),
        )


def _standardised(values: Tensor, known: int) -> Tensor:
    """Every column with mean 0 and deviation 1 over the first ``known`` rows."""
    return (values - values[:known].mean(0)) / values[:known].std(0)
