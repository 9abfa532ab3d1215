"""Whether methods, models and data fit together: asked before the first step, and before a teacher is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.contract.batch import IGNORE, Batch
from stillhouse.contract.splits import Splits
from stillhouse.errors import ConfigError, DataError
from stillhouse.models.calling import evaluating, forward
from stillhouse.models.integrity import stochastic_module
from stillhouse.plugin.dispatch import Plugins

OFFERED = frozenset({"logits", "deterministic_teacher", "hidden_states", "labels", "student_update"})
"""Capabilities of the reference loop, on a task with labels."""


def check_fit(
    plugins: Plugins,
    models: Mapping[str, nn.Module],
    teacher: nn.Module | None,
    probe: Batch,
    *,
    splits: Splits | None = None,
    offers: frozenset[str] = OFFERED,
) -> None:
    """Raise ConfigError where a method needs what is not offered, or models don't fit it; DataError for the labels.

    Depends on what the models are, not on their weights: a teacher need not be trained yet.
    """
    needs = plugins.requires
    if (needs & {"logits", "hidden_states"}) and teacher is None:
        _refuse(plugins, "logits", "needs a teacher, and there is none; name one")
    if "labels" in needs and not probe.labelled and probe.labels is None:
        _refuse(plugins, "labels", "needs labels, and the training split has none")
    if "unlabelled" in needs and (splits is None or splits.unlabelled is None):
        _refuse(plugins, "unlabelled", "needs an unlabelled split, and the task has none")
    for name in sorted(needs - offers - {"unlabelled"}):
        _refuse(plugins, name, f"requires '{name}', which this trainer does not offer")
    if probe.labels is not None and probe.labels.is_floating_point():
        _refuse_regression(plugins)
    if splits is not None:
        _check_labels(models, teacher, probe, splits)
    if teacher is None or not needs & {"logits", "hidden_states"}:
        return
    if "deterministic_teacher" in needs:
        stochastic = stochastic_module(teacher, probe.for_teacher)
        if stochastic is not None:
            _refuse(
                plugins,
                "deterministic_teacher",
                f"is for deterministic teachers, and this one gave two answers to one batch: {stochastic} "
                "is stochastic; put it in eval mode, or use the method 'kd', which asks it anew each step",
            )
    _compare_outputs(plugins, models, teacher, probe)


def _check_labels(
    models: Mapping[str, nn.Module], teacher: nn.Module | None, probe: Batch, splits: Splits
) -> None:
    """Refuse class numbers that no model has an output for; torch would tell of them in the middle of training."""
    given = [outputs(model, probe.inputs) for model in models.values()]
    if teacher is not None:
        given.append(outputs(teacher, probe.for_teacher))
    classes = max(logits.shape[-1] for logits in given)
    for name, split in splits.items():
        labels = getattr(split, "labels", None)
        if labels is None or labels.is_floating_point() or labels.dim() != given[0].dim() - 1:
            continue
        wrong = (labels != IGNORE) & ((labels < 0) | (labels >= classes))
        if wrong.any():
            row = int(wrong.reshape(len(labels), -1).any(-1).nonzero()[0])
            raise DataError(
                f"{name}.labels holds {int(labels[wrong][0])}, first in row {row}; expected 0 to {classes - 1}, as the "
                f"models have {classes} outputs, or {IGNORE} for no label: give the models more outputs, or mend the labels"
            )


def _compare_outputs(
    plugins: Plugins, models: Mapping[str, nn.Module], teacher: nn.Module, probe: Batch
) -> None:
    given = outputs(teacher, probe.for_teacher)
    for name, model in models.items():
        student = outputs(model, probe.inputs)
        if given.shape == student.shape:
            continue
        for plugin in plugins.plugins:
            if not plugin.method.different_outputs:
                raise ConfigError(
                    f"{plugin}: the teacher gives outputs of shape {tuple(given.shape)}, the {name} "
                    f"{tuple(student.shape)}; expected the same: give the {name} as many outputs"
                )


def _refuse_regression(plugins: Plugins) -> None:
    for plugin in plugins.plugins:
        if not plugin.method.regression:
            raise ConfigError(
                f"{plugin} compares class probabilities, and this task's labels are floats (regression); "
                "expected class labels: choose a method that says regression, such as hard_labels or ibmd"
            )


def _refuse(plugins: Plugins, capability: str, why: str) -> None:
    who = [plugin for plugin in plugins.plugins if capability in plugin.method.requires]
    raise ConfigError(f"{who[0] if who else plugins.plugins[0]} {why}")


def outputs(model: nn.Module, inputs: Any) -> Tensor:
    """The model's logits in eval mode, without a graph; the random generators stay as they are."""
    with torch.random.fork_rng(), evaluating(model):
        return forward(model, inputs)
