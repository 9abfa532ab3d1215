"""Which stages read kept soft labels in place of a call, and the pass that takes them. Said here and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stillhouse.contract.context import TEACHER, Stage
from stillhouse.contract.splits import Split
from stillhouse.models.calling import evaluating, forward
from stillhouse.models.integrity import digest, stochastic_module
from stillhouse.softlabels import SoftLabels, write_soft_labels

if TYPE_CHECKING:
    from stillhouse.training.loop import Loop

LIMIT = 512 * 2**20
"""Bytes of teacher logits that are held in memory; above it the teacher is called at each step."""


def keep(loop: Loop, split: Split, folder: Path | None) -> SoftLabels | None:
    """The soft labels that the loop's stage reads, or None where its batches are answered by calls.

    A model's outputs that stand in for the teacher's are written to ``folder`` before the stage's first
    update, for a resume can't make them again: that model may have been trained on by then. The frozen
    teacher's are not: they can.
    """
    step, stage = loop.step, loop.schedule.stage
    if stage.teacher is None or not split.fixed or step.plugins.implements("batch_transform"):
        return None
    if stage.teacher == TEACHER:
        return _teachers(loop, stage, split) if _worth_keeping(loop, stage, split) else None
    if not isinstance(stage.teacher, str) or stage.teacher not in step.run.models:
        return None
    path = None if folder is None else folder / f"{loop.at.stage}-{stage.name}.safetensors"
    about = {"stage": stage.name, "model": stage.teacher, "data": split.fingerprint()}
    if loop.at.stage_step and path is not None:
        return SoftLabels.load(path, about, loop.device)
    model = step.run.models[stage.teacher]
    labels, _ = write_soft_labels(model, split, about, device=loop.device, teacher=False, kind=step.kind)
    if path is not None:
        labels.save(path)
    return labels


def _worth_keeping(loop: Loop, stage: Stage, split: Split) -> bool:
    """Whether the frozen teacher's answers can be kept, each sample is seen at least once, and they fit in memory."""
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
    return 4 * width * len(split) <= LIMIT


def _teachers(loop: Loop, stage: Stage, split: Split) -> SoftLabels:
    teacher = loop.step.teacher
    assert teacher is not None
    return write_soft_labels(
        teacher, split, {"teacher": digest(teacher)}, device=loop.device, kind=loop.step.kind
    )[0]
