"""Which stages read kept soft labels in place of a call, and the pass that takes them. Said here and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stillhouse.contract.context import TEACHER, Stage
from stillhouse.contract.splits import Split, Splits
from stillhouse.models.calling import evaluating, forward
from stillhouse.models.integrity import digest, stochastic_module
from stillhouse.softlabels import SoftLabels, write_soft_labels
from stillhouse.softlabels.base import Shifted
from stillhouse.softlabels.fingerprint import differs
from stillhouse.softlabels.kept import there_is_room

if TYPE_CHECKING:
    from stillhouse.training.loop import Loop


def keep(loop: Loop, split: Split, folder: Path | None) -> SoftLabels | None:
    """The soft labels that the loop's stage reads, or None where its batches are answered by calls.

    A model's outputs that stand in for the teacher's are written to ``folder`` before the stage's first
    update, for a resume can't make them again: that model may have been trained on by then. The frozen
    teacher's are not: they can.
    """
    step, stage = loop.step, loop.schedule.stage
    if (given := stored(loop)) is not None:
        return given
    if stage.teacher is None or not split.fixed or step.plugins.implements("batch_transform"):
        return None
    if stage.teacher == TEACHER:
        return _teachers(loop, split, folder) if _worth_keeping(loop, split, folder) else None
    if not isinstance(stage.teacher, str) or stage.teacher not in step.run.models:
        return None
    path = None if folder is None else folder / f"{loop.at.stage}-{stage.name}.safetensors"
    about = {"stage": stage.name, "model": stage.teacher, "data": split.fingerprint()}
    if loop.at.stage_step and path is not None:
        return SoftLabels.load(path, about, loop.device)
    model = step.run.models[stage.teacher]
    labels, _ = write_soft_labels(
        model, split, about, device=loop.device, teacher=False, kind=step.kind, path=path
    )
    if path is not None:
        labels.save(path)
    return labels


def stored(loop: Loop) -> SoftLabels | None:
    """The labels that the step was given in the teacher's place, as the loop's stage counts its rows; None without."""
    stage, given = loop.schedule.stage, loop.step.answers.stored
    return None if given is None or stage.teacher != TEACHER else of_stage(given, stage, loop.splits)


def of_stage(labels: SoftLabels, stage: Stage, splits: Splits) -> SoftLabels:
    """Labels of ``splits.stage(labels.data)`` as the stage counts its rows.

    Raises CheckpointError where they are not those of every row of the stage.
    """
    length, by = len(splits.stage(stage.data)), 0
    if splits.unlabelled is not None and labels.data != stage.data:
        by = len(splits.train) if stage.data == "unlabelled" else 0
        by -= len(splits.train) if labels.data == "unlabelled" else 0
    there = labels.count(by, by + length)
    if there < length:
        raise differs(
            str(labels), "data", f"{there:,} samples", f"{length:,} {stage.data} ones in stage {stage.name}",
            "label the rest into the same directory, with --data all",
        )  # fmt: skip
    return Shifted(labels, by) if by else labels


def _worth_keeping(loop: Loop, split: Split, folder: Path | None) -> bool:
    """Whether the frozen teacher's answers can be kept, each sample is seen at least once, and there is room."""
    step, settings, teacher = loop.step, loop.settings, loop.step.teacher
    if teacher is None or not settings.cache_teacher or step.captures.asked(TEACHER):
        return False
    if step.plugins.implements("teacher_forward") or step.teachers.moving:
        return False
    if loop.schedule.length * settings.batch_size < len(split):
        return False
    probe = split.batch(torch.arange(min(2, len(split)))).to(loop.device)
    if stochastic_module(teacher, probe.for_teacher, step.kind) is not None:
        return False
    with evaluating(teacher):
        width = forward(teacher, probe.for_teacher, step.kind)[0].numel()
    return there_is_room(4 * width * len(split), folder)


def _teachers(loop: Loop, split: Split, folder: Path | None) -> SoftLabels:
    teacher = loop.step.teacher
    assert teacher is not None
    about = {"teacher": digest(teacher)}
    return write_soft_labels(teacher, split, about, device=loop.device, kind=loop.step.kind, scratch=folder)[
        0
    ]
