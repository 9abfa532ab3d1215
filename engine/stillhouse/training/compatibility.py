"""Whether methods, models, stages and data fit together: asked once, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.contract.batch import IGNORE, Batch, tensors_in
from stillhouse.contract.context import TEACHER, RunContext, Stage
from stillhouse.contract.kinds import KINDS, TaskKind
from stillhouse.contract.splits import Splits
from stillhouse.errors import ConfigError, DataError
from stillhouse.models.calling import evaluating, forward
from stillhouse.models.integrity import digest, stochastic_module
from stillhouse.plugin.dispatch import Plugin, Plugins
from stillhouse.softlabels import SoftLabels
from stillhouse.softlabels.fingerprint import differs
from stillhouse.training.answers import names_of

OFFERED = frozenset({"logits", "deterministic_teacher", "hidden_states", "labels", "student_update"})
"""Capabilities of the reference loop, on a task with labels."""
NO_IDS = (
    "kept soft labels are found by sample id, and this batch has none; expected its samples' numbers (B,) as 'sample_id' "
    "among the inputs, a column of the data set: the numbers that the labels were made under"
)
EMBEDDED = OFFERED - {"student_update"}
"""Capabilities of a step in somebody else's loop, which makes the update itself."""


def check_fit(
    plugins: Plugins,
    models: Mapping[str, nn.Module],
    teachers: Mapping[str, nn.Module],
    run: RunContext,
    *,
    offers: frozenset[str] = OFFERED,
    stored: SoftLabels | None = None,
) -> int:
    """Raise ConfigError where a method needs what is not offered, or models don't fit it; DataError for the labels.

    Returns how many classes every model of the run has an output for.

    Depends on what the models are, not on their weights: a teacher need not be trained yet.

    stored
        The teacher's kept outputs, which are read in its place: it need not be there then.
    """
    probe, kind, needs = run.probe, run.kind, plugins.requires
    assert probe is not None
    asks = needs & {"logits", "hidden_states"}
    if asks and not teachers and (stored is None or asks != {"logits"}):
        _refuse(plugins, min(asks), "needs a teacher, and there is none; name one")
    if "labels" in needs and not probe.has_labels:
        _refuse(plugins, "labels", "needs labels, and the training split has none")
    if "unlabelled" in needs and (run.splits is None or run.splits.unlabelled is None):
        _refuse(plugins, "unlabelled", "needs an unlabelled split, and the task has none")
    for name in sorted(needs - offers - {"unlabelled"}):
        _refuse(plugins, name, f"requires '{name}', which this trainer does not offer")
    _refuse_kinds(plugins, kind)
    outputs_by_name = {name: outputs(model, probe.inputs, kind) for name, model in models.items()}
    for name, own in outputs_by_name.items():
        kind.check(probe, own, f"the {name}")
    classes = min(own.shape[-1] for own in outputs_by_name.values())
    _check_labels(kind, classes, probe, run.splits)
    if stored is not None and asks:
        _check_stored(stored, plugins, run, outputs_by_name)
        return classes
    for teacher in {id(model): model for model in teachers.values()}.values() if asks else ():
        if "deterministic_teacher" in needs:
            _refuse_stochastic(plugins, teacher, probe, kind)
        given = outputs(teacher, probe.for_teacher, kind)
        for name, own in outputs_by_name.items():
            _compare_outputs(plugins, run, name, own, given)
    return classes


def _refuse_stochastic(plugins: Plugins, teacher: nn.Module, probe: Batch, kind: TaskKind) -> None:
    stochastic = stochastic_module(teacher, probe.for_teacher, kind)
    if stochastic is not None:
        _refuse(
            plugins,
            "deterministic_teacher",
            f"is for deterministic teachers, and this one gave two answers to one batch: {stochastic} "
            "is stochastic; put it in eval mode, or use the method 'kd', which asks it anew each step",
        )


def _check_stored(labels: SoftLabels, plugins: Plugins, run: RunContext, own: Mapping[str, Tensor]) -> None:
    """Refuse kept labels that don't fit the methods, the teacher beside them, the probe's samples or the models' outputs."""
    if changing := plugins.implementing("batch_transform"):
        stored, asked = labels.fingerprint.get("transform"), f"inputs changed by '{min(changing)}'"
        raise differs(
            str(labels), "transform", stored, asked, "leave that method out, or ask the teacher at every step"
        )
    if asking := plugins.implementing("teacher_forward"):
        raise ConfigError(
            f"method '{min(asking)}' calls the teacher in a way of its own, which kept labels can't answer; expected "
            "methods that read its outputs: leave soft_labels out"
        )
    if "hidden_states" in plugins.requires:
        _refuse(
            plugins, "hidden_states", "reads the teacher's hidden layers, and kept labels stand in its place"
        )
    _check_temperature(labels, plugins)
    if len(several := [name for name in run.teachers if name != TEACHER]) > 1:
        raise ConfigError(
            f"soft labels stand in one teacher's place; got {len(several)}: {', '.join(several)}"
        )
    for teacher in run.teachers.values():
        if (found := digest(teacher)) != labels.fingerprint.get("teacher"):
            raise differs(str(labels), "teacher", labels.fingerprint.get("teacher"), found)
    probe = run.probe
    assert probe is not None
    if run.splits is not None and labels.data == "unlabelled":
        return  # the probe is of labelled rows, which are not there
    if probe.ids is None:
        raise ConfigError(NO_IDS)
    found_rows = labels.targets(probe.ids, probe.mask)
    if isinstance(found_rows, Tensor):
        given = found_rows
    else:
        given = torch.empty(*found_rows.indices.shape[:-1], labels.form.outputs, device="meta")
    for name, outputs_of in own.items():
        _compare_outputs(plugins, run, name, outputs_of, given)


def _check_temperature(labels: SoftLabels, plugins: Plugins) -> None:
    """A top k's rest can't be moved to another temperature, and draws are biased there."""
    if labels.form.kind not in ("topk", "sampled"):
        return
    for plugin in plugins.plugins:
        asked = getattr(plugin.method.config, "temperature", None)
        if isinstance(asked, int | float) and asked != 1 and "logits" in plugin.method.requires:
            raise ConfigError(
                f"{plugin} has temperature = {asked:g}, and soft labels {labels} ({labels.form}) have a meaning at 1 alone; "
                "expected temperature = 1, or labels of form dense or hidden"
            )


def _check_labels(kind: TaskKind, classes: int, probe: Batch, splits: Splits | None) -> None:
    """Refuse class numbers that a model has no output for; torch would tell of them in the middle of training."""
    if kind.labels != "classes":
        return
    known: list[tuple[str, Any]] = [("the batch's labels", probe.labels)]
    if splits is not None:
        known = [(f"{name}.labels", getattr(split, "labels", None)) for name, split in splits.items()]
    for name, labels in known:
        refuse_labels(labels, classes, name)


def refuse_labels(labels: Any, classes: int, name: str = "the batch's labels") -> None:
    """DataError where class numbers are not from 0 to ``classes - 1``, and not ``-100``."""
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        row = int(wrong.reshape(len(labels), -1).any(-1).nonzero()[0])
        raise DataError(
            f"{name} {'hold' if ' ' in name else 'holds'} {int(labels[wrong][0])}, first in row {row}; expected 0 to {classes - 1}, as the "
            f"models have {classes} outputs, or {IGNORE} for no label: give the models more outputs, or mend the labels"
        )


def _compare_outputs(plugins: Plugins, run: RunContext, name: str, own: Tensor, given: Tensor) -> None:
    if given.shape == own.shape:
        return
    rows = run.kind.labels == "numbers" or given.shape[:-1] == own.shape[:-1]
    for plugin in plugins.plugins:
        if not rows or "different_outputs" not in plugin.method.supports:
            raise ConfigError(
                f"{plugin}: the teacher gives outputs of shape {tuple(given.shape)}, the {name} "
                f"{tuple(own.shape)}; expected the same: give the {name} as many outputs"
            )
    if run.kind.labels == "classes":
        shared = min(given.shape[-1], own.shape[-1])
        run.chose(
            "outputs",
            f"{shared} shared",
            f"the teacher has {given.shape[-1]}, the {name} {own.shape[-1]}: padding",
        )


def _refuse_kinds(plugins: Plugins, kind: TaskKind) -> None:
    for plugin in plugins.plugins:
        supports = plugin.method.supports
        if kind.name not in supports:
            known = ", ".join(name for name in KINDS if name in supports)
            raise ConfigError(
                f"{plugin} has no meaning for {kind.name} ({kind.about}); expected one of {known}: choose a method that "
                f"supports {kind.name}, or say by task= what a batch means"
            )


def check_stages(
    plugins: Plugins,
    stages: tuple[Stage, ...],
    owner: str | None,
    run: RunContext,
    captured: set[tuple[str, str]],
) -> None:
    """Raise ConfigError where a stage names what is not there, or offers less than a method beside it requires.

    owner
        The method that gave the stages; it knows them.
    captured
        Who asked for features of which model.
    """
    known = {TEACHER, *run.models, *run.teachers}
    for stage in stages:
        for name in (*(stage.train or ()), stage.model, *names_of(stage)):
            if name is not None and name not in known:
                raise ConfigError(
                    f"stage '{stage.name}' names '{name}'; known models: {', '.join(run.models)}"
                )
        for plugin in plugins.plugins:
            if plugin.name != owner and plugin.name in run.with_losses:
                _check_beside(
                    plugin, stage, owner, run, {role for who, role in captured if who == plugin.name}
                )


def _check_beside(plugin: Plugin, stage: Stage, owner: str | None, run: RunContext, roles: set[str]) -> None:
    needs = plugin.method.requires
    whose = f"stage '{stage.name}' of '{owner}'"
    wrong = ""
    if stage.model is None:
        wrong = f"{whose} calls no student"
    elif needs & {"logits", "hidden_states"} and stage.teacher is None:
        wrong = f"{whose} calls no teacher"
    elif "hidden_states" in needs and stage.teacher in run.models:
        wrong = f"{whose} learns from the {stage.teacher}'s outputs, without the teacher's features"
    elif missing := roles - set(run.teachers) - {TEACHER, stage.model}:
        wrong = f"{whose} calls the {stage.model}, and '{plugin.name}' reads features of the {missing.pop()}"
    if wrong:
        raise ConfigError(
            f"{plugin} can't stand beside '{owner}': {wrong}; expected a stage that gives what it requires: leave one "
            "of the two methods out"
        )


def row_shape(kind: TaskKind, student: nn.Module, probe: Batch) -> Callable[[Batch], tuple[int, ...]] | None:
    """From a batch to the shape of one sample's rows, as the student's outputs have it; None where a row is a sample.

    The positions of the outputs are those of the inputs where these have as many, else as many as the probe's.
    """
    if kind.positions is False:
        return None
    logits = outputs(student, probe.inputs, kind)
    positions = tuple(logits.shape[1:-1])
    if not positions:
        return None
    end = 1 + len(positions)

    def first(batch: Batch) -> tuple[int, ...]:
        return tuple(tensors_in(batch.inputs)[0][1].shape[1:end])

    return first if first(probe) == positions else lambda batch: positions


def _refuse(plugins: Plugins, capability: str, why: str) -> None:
    who = [plugin for plugin in plugins.plugins if capability in plugin.method.requires]
    raise ConfigError(f"{who[0] if who else plugins.plugins[0]} {why}")


def outputs(model: nn.Module, inputs: Any, kind: TaskKind) -> Tensor:
    """The model's logits in eval mode, without a graph; the random generators stay as they are."""
    with torch.random.fork_rng(), evaluating(model):
        return forward(model, inputs, kind)
