"""A task: data, models by name, and a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from stillhouse.contract.batch import IGNORE
from stillhouse.contract.splits import Splits
from stillhouse.errors import DataError

Builder = Callable[..., nn.Module]
"""Makes a model from typed keyword arguments; a config's keys beside ``name`` are these arguments."""


class TaskConfig(BaseModel):
    """Base of a task's settings: every field has a default, unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Task:
    """Base of tasks; found by entry point in ``stillhouse.tasks``.

    api_version
        The API_VERSION that the task was written for.
    kind
        What a batch means: a name of ``stillhouse.api.KINDS``.
    metric
        The key of ``score`` that tables show; higher is better.
    teachers, students
        Model builders by name. A builder takes typed keyword arguments with defaults.
    teacher_training
        Settings for training a teacher where no checkpoint is given: keys of a run's config.
    """

    api_version: ClassVar[int]
    Config: ClassVar[type[TaskConfig]] = TaskConfig
    kind: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    teachers: ClassVar[Mapping[str, Builder]] = {}
    students: ClassVar[Mapping[str, Builder]] = {}
    teacher_training: ClassVar[Mapping[str, Any]] = {}

    config: Any

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    def splits(self) -> Splits:
        """Load or make the data. No network unless the config asks for it."""
        raise NotImplementedError(f"{type(self).__name__}.splits is abstract: return a Splits")

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Metrics of a whole split from its outputs ``(N, C)`` and labels ``(N,)``; default: accuracy, nll."""
        return classification(outputs, labels)


def classification(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """``accuracy`` (part right) and ``nll`` (nats a row) over the rows that have a label."""
    known = labels != IGNORE
    outputs, labels = outputs[known].float(), labels[known]
    classes = outputs.shape[-1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"labels to be scored go from {int(labels.min())} to {int(labels.max())}; expected 0 to {classes - 1}, as the "
            f"model has {classes} outputs, or {IGNORE} for no label"
        )
    return {
        "accuracy": float((outputs.argmax(-1) == labels).float().mean()),
        "nll": float(F.cross_entropy(outputs, labels)),
    }


def regression(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """``r2`` (share of variance explained) and ``mse``."""
    outputs, labels = outputs.float().reshape(len(labels), -1), labels.float().reshape(len(labels), -1)
    mse = (outputs - labels).square().mean()
    return {"r2": float(1 - mse / (labels - labels.mean(0)).square().mean()), "mse": float(mse)}
