"""When a stage's soft labels are taken in one pass and kept, instead of a call at every step."""

from __future__ import annotations

from pathlib import Path

import torch

from stillhouse.contract.context import TEACHER
from stillhouse.contract.splits import Split
from stillhouse.models.calling import evaluating, forward
from stillhouse.models.integrity import digest, stochastic_module
from stillhouse.softlabels import SoftLabels, write_soft_labels
from stillhouse.softlabels.kept import there_is_room
from stillhouse.training.loop import Loop


def keep(loop: Loop, split: Split, folder: Path | None) -> SoftLabels | None:
    """The stage's soft labels, or None where its batches are answered by calls.

    A model's outputs that stand in for the teacher's are written to ``folder`` before the stage's first
    update, for a resume can't make them again: that model may have been trained on by then. The frozen
    teacher's are not: they can.
    """
    stage = loop.step.stages[loop.at.stage]
    if stage.teacher is None or not split.fixed or loop.step.plugins.implements("batch_transform"):
        return None
    if stage.teacher == TEACHER:
        return _teachers(loop, split, folder)
    path = None if folder is None else folder / f"{loop.at.stage}-{stage.name}.safetensors"
    about = {"stage": stage.name, "model": stage.teacher, "data": split.fingerprint()}
    if loop.at.stage_step and path is not None:
        return SoftLabels.load(path, about, loop.device)
    model = loop.step.run.models[stage.teacher]
    labels, _ = write_soft_labels(model, split, about, device=loop.device, teacher=False, path=path)
    if path is not None:
        labels.save(path)
    return labels


def _teachers(loop: Loop, split: Split, folder: Path | None) -> SoftLabels | None:
    step, settings = loop.step, loop.settings
    teacher = step.teacher
    if teacher is None or not settings.cache_teacher or step.captures.asked(TEACHER):
        return None
    if step.plugins.implements("teacher_forward"):
        return None
    stage = step.stages[loop.at.stage]
    seen = loop.lengths[loop.at.stage] * settings.batch_size
    probe = split.batch(torch.arange(min(2, len(split)))).to(loop.device)
    if stage.top_per_class is None and seen < len(split):
        return None
    if stochastic_module(teacher, probe.for_teacher) is not None:
        return None
    with evaluating(teacher):
        width = forward(teacher, probe.for_teacher)[0].numel()
    if stage.top_per_class is None and not there_is_room(4 * width * len(split), folder):
        return None
    made_from = {"teacher": digest(teacher)}
    return write_soft_labels(teacher, split, made_from, device=loop.device, scratch=folder)[0]
