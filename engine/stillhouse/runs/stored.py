"""Kept labels that a config names in the teacher's place: opened, and compared with what the run has.

What can't be told apart by a look is told by digests: of the teacher where the config names one, of the tokenizer, and of
every row of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from stillhouse.cache import Cache
from stillhouse.config import TeacherConfig
from stillhouse.contract.context import TEACHER
from stillhouse.contract.splits import Splits
from stillhouse.errors import CheckpointError, DamagedFile
from stillhouse.models.integrity import digest
from stillhouse.models.served import Served
from stillhouse.plugin.dispatch import Plugins
from stillhouse.runs import teachers, weights
from stillhouse.runs.resolve import Parts, comes_trained
from stillhouse.softlabels import SoftLabels, StoredLabels
from stillhouse.softlabels.fingerprint import check_same, differs, tokenizer_digest
from stillhouse.softlabels.inspection import verify as verify_store
from stillhouse.training.labels import of_stage
from stillhouse.training.step import DistillStep


def labels_of(
    parts: Parts, data: Splits, device: torch.device, say: Callable[[str], None] = lambda message: None
) -> StoredLabels | None:
    """The labels that the config names, compared once; None where it names none, or no method reads any.

    Raises CheckpointError naming the field where they were made from something else, DamagedFile for a damaged store.
    """
    where, plugins = parts.config.soft_labels, Plugins(parts.methods)
    if where is None or not plugins.requires & {"logits", "hidden_states"}:
        return None
    if parts.soft_labels is None:
        labels = SoftLabels.open(where)
        _refuse_changes(labels, data)
        labels.check(
            teacher=_teacher(parts, data, device, labels, say),
            tokenizer=tokenizer_digest(getattr(parts.task, "tokenizer", None)),
            split=data.stage(labels.data),
        )
        parts.soft_labels = labels
    return parts.soft_labels


def _refuse_changes(labels: StoredLabels, data: Splits) -> None:
    """Refuse inputs that are not those which the teacher was shown."""
    asked, split = "", data.stage(labels.data)
    if not split.numbered:
        asked = "rows without numbers (an iterable)"
    elif not split.fixed:
        asked = "rows that change at every reading"
    if asked:
        stored = labels.fingerprint.get("transform")
        raise differs(
            str(labels), "transform", stored, asked, "label rows that stay as they are, or ask the teacher"
        )


def _teacher(
    parts: Parts, data: Splits, device: torch.device, labels: StoredLabels, say: Callable[[str], None]
) -> str | None:
    """The digest of the teacher that the config names, which is let go again; None where it names none."""
    spec = parts.config.teacher
    if parts.teacher is not None:
        return teachers.digest_given(parts.teacher)
    if spec is None or "teacher" not in parts.builders:
        return None
    with torch.random.fork_rng():
        model = parts.builders["teacher"]().to(device)
    if isinstance(model, Served):
        return model.origin()
    if spec.checkpoint is not None:
        weights.load(model, spec.checkpoint)
    elif not comes_trained(parts, spec):
        _fill_from_cache(model, spec, parts, data, labels, say)
    return digest(model)


def _fill_from_cache(
    model: nn.Module,
    spec: TeacherConfig,
    parts: Parts,
    data: Splits,
    labels: StoredLabels,
    say: Callable[[str], None],
) -> None:
    settings = teachers.training(spec.train, parts.task)
    made_from = teachers.fingerprint(
        model, {"name": spec.name, **spec.settings}, teachers.teacher_view(data.train), settings
    )
    kept = Cache("teachers", say).read(made_from)
    if kept is None:
        asked = f"{spec.name}, which is not trained here"
        mend = "leave the teacher out to go by the labels alone (teacher=null), or label with it here"
        raise differs(str(labels), "teacher", labels.fingerprint.get("teacher"), asked, mend)
    weights.fill(model, kept, "the teacher's weights")


def facts(labels: StoredLabels) -> dict[str, Any]:
    """What a manifest says of kept labels in the teacher's place."""
    made = {name: value for name, value in labels.fingerprint.items() if name not in ("teacher", "data")}
    seed = (labels.about.get("recipe") or {}).get("seed")
    return {
        "found": f"soft labels {labels}",
        "digest": labels.fingerprint.get("teacher"),
        "soft_labels": {
            **made,
            "form": str(labels.form),
            **({"seed": seed} if labels.form.kind == "sampled" else {}),
        },
    }


def identity(teacher: Mapping[str, Any]) -> str | None:
    """In one line what the answers of a manifest's teacher are: its digest, and of kept labels their form."""
    labels = teacher.get("soft_labels", {})
    said = [str(labels[name]) for name in ("form", "seed") if name in labels]
    return ", ".join([str(teacher["digest"]), *said]) if "digest" in teacher else None


def check_stages(step: DistillStep, data: Splits) -> None:
    """Refuse labels that are not those of every row of each stage that reads them."""
    for stage in step.stages:
        if step.answers.stored is not None and stage.teacher == TEACHER:
            of_stage(step.answers.stored, stage, data)


def verify(manifest: Mapping[str, Any]) -> None:
    """Raise DamagedFile or CheckpointError unless the labels that a run reads are whole, and those that it began with."""
    where = manifest["config"]["soft_labels"]
    for name, problem in verify_store(where):
        if problem:
            raise DamagedFile(f"{name}: {problem}")
    now, before = facts(SoftLabels.open(where)), manifest["teacher"]
    if now["digest"] != before["digest"]:
        raise CheckpointError(
            f"soft labels {where} are of teacher {now['digest']}, the run began with {before['digest']}"
        )
    check_same(where, now["soft_labels"], before["soft_labels"])
