"""All that a plugin author imports.

A method is a class with a config model and the hooks it needs::

    class MyMethod(Method):
        api_version = 1
        Config = MyConfig

        @hookimpl
        def loss_terms(self, student_out, targets, batch, info):
            ...
            return {"mine": LossTerm(value)}

named in its package's ``pyproject.toml`` under ``[project.entry-points."stillhouse.methods"]``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from stillhouse.cache import made_once
from stillhouse.contract.batch import IGNORE, Batch
from stillhouse.contract.conformance import Conformance
from stillhouse.contract.context import Auxiliary, RunContext, Stage, StepInfo
from stillhouse.contract.datasets import DatasetSplit
from stillhouse.contract.features import Feature, FeaturePair, Layers, feature_mean, feature_pairs, kept, wide
from stillhouse.contract.hooks import hookimpl
from stillhouse.contract.kinds import CLASS_KINDS, KINDS, TaskKind
from stillhouse.contract.losses import (
    binary_cross_entropy,
    binary_kl,
    cross_entropy,
    label_loss,
    regression_loss,
    soft_and_label_terms,
    soft_loss,
)
from stillhouse.contract.metrics import Metric, Metrics, WholeSplit, metrics_named
from stillhouse.contract.observers import Observer, ObserverConfig, RunRecord
from stillhouse.contract.outputs import LossTerm, StudentOut, Targets, TeacherOut
from stillhouse.contract.splits import Split, Splits, TensorSplit
from stillhouse.contract.task import Builder, Task, TaskConfig
from stillhouse.errors import ConfigError, DataError, Diverged, MissingExtra, PluginError

API_VERSION = 1
"""The version of this contract. The engine runs plugins of this version and of the one before."""

CAPABILITIES = frozenset(
    {
        "logits",  # the teacher's outputs
        "deterministic_teacher",  # outputs that are the same at every call
        "hidden_states",  # outputs of named modules
        "labels",  # true labels
        "unlabelled",  # a split without labels
        "student_update",  # the method makes the update itself
        "generate",  # the student can generate sequences
    }
)
"""What a method may require and a trainer or a task may offer; compared before step 0."""


SUPPORTS = frozenset(KINDS) | {"different_outputs"}
"""What a method may say that it supports."""


class MethodConfig(BaseModel):
    """Base of a method's settings: every field has a default, unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Method:
    """A distillation method: settings, and hooks marked with ``@hookimpl``.

    api_version
        The API_VERSION that the plugin was written for; every plugin states it.
    Config
        The settings' model.
    requires
        Names from CAPABILITIES; compared with what the run offers before step 0.
    supports
        Names of the task kinds that the method has a meaning for (``CLASS_KINDS``: those with one softmax a row), and
        ``different_outputs`` where teacher and student may have different numbers of outputs. Others are refused
        before step 0.
    writes
        Files that it writes to the run directory, as in ``("weights.json", "pddm/*")``: ``--overwrite`` removes these, and
        refuses where anything else lies there.
    conformance
        What the checks of ``stillhouse.testing`` should know.
    """

    api_version: ClassVar[int]
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    requires: ClassVar[frozenset[str]] = frozenset({"logits"})
    supports: ClassVar[frozenset[str]] = CLASS_KINDS
    writes: ClassVar[tuple[str, ...]] = ()
    conformance: ClassVar[Conformance] = Conformance()
    config: Any
    """The settings, of type ``Config``; a subclass annotates it with its own."""

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config


__all__ = [
    "API_VERSION",
    "CAPABILITIES",
    "CLASS_KINDS",
    "IGNORE",
    "KINDS",
    "SUPPORTS",
    "Auxiliary",
    "Batch",
    "Builder",
    "ConfigError",
    "Conformance",
    "DataError",
    "DatasetSplit",
    "Diverged",
    "Feature",
    "FeaturePair",
    "Layers",
    "LossTerm",
    "Method",
    "MethodConfig",
    "Metric",
    "Metrics",
    "MissingExtra",
    "Observer",
    "ObserverConfig",
    "PluginError",
    "RunContext",
    "RunRecord",
    "Split",
    "Splits",
    "Stage",
    "StepInfo",
    "StudentOut",
    "Targets",
    "Task",
    "TaskConfig",
    "TaskKind",
    "TeacherOut",
    "TensorSplit",
    "WholeSplit",
    "binary_cross_entropy",
    "binary_kl",
    "cross_entropy",
    "feature_mean",
    "feature_pairs",
    "hookimpl",
    "kept",
    "label_loss",
    "made_once",
    "metrics_named",
    "regression_loss",
    "soft_and_label_terms",
    "soft_loss",
    "wide",
]
