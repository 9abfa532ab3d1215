"""A task: data, models by name, and what they are scored by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import nn

from stillhouse.contract.kinds import KINDS
from stillhouse.contract.metrics import Metrics, default_metrics
from stillhouse.contract.splits import Splits

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
        The score that tables show; more of it is better, unless its metric says otherwise (``higher_is_better``), as
        ``nll`` and ``perplexity`` do. ``""``: the first that is scored.
    teachers, students
        Model builders by name. A builder takes typed keyword arguments with defaults. One with an attribute ``trained``
        that is True gives models with their weights: a teacher of it is used as it comes.
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

    def metrics(self) -> Metrics:
        """What models are scored by: new metrics by name, each an object with ``update`` and ``compute``.

        Default: those of the task's kind. ``metrics_named`` makes some by name, torchmetrics' objects are taken as
        they are, ``WholeSplit(function)`` gives a function all outputs at once. One that computes numbers by name
        may be called ``""``: they then keep their own.
        """
        return default_metrics(KINDS[self.kind])
