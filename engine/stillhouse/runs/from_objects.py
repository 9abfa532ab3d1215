"""``stillhouse.distill(student, teacher, data)``: a run from Python objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from stillhouse.api import Task
from stillhouse.config import dump, validate
from stillhouse.contract.context import STUDENT, TARGET
from stillhouse.contract.kinds import TaskKind, kind_of
from stillhouse.contract.splits import DatasetSplit, Split, Splits, TensorSplit
from stillhouse.contract.task import classification, regression
from stillhouse.errors import DataError, nearest
from stillhouse.models.calling import DEFAULT
from stillhouse.models.integrity import digest, prepare_to_train
from stillhouse.plugin.load import MethodLike, as_plugins
from stillhouse.runs import directory
from stillhouse.runs.display import Display
from stillhouse.runs.display import display as default_display
from stillhouse.runs.evaluate import numbers
from stillhouse.runs.resolve import Parts, pick_device
from stillhouse.runs.train import Summary, make
from stillhouse.runs.weights import load
from stillhouse.training import optim

Score = Callable[[Tensor, Tensor], dict[str, float]]
SPLITS = ("train", "validation", "test", "unlabelled")


@dataclass
class Distilled:
    """What came out: the trained model, its scores by split, and everything else in ``summary``."""

    student: nn.Module
    scores: dict[str, dict[str, float]]
    summary: Summary


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Any,
    *,
    method: MethodLike | Sequence[MethodLike] = "sld",
    target: nn.Module | None = None,
    task: str | None = None,
    score: Score | None = None,
    dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
    **training: Any,
) -> Distilled:
    """Train ``student`` (in place) with a method, from ``teacher``, on ``data``.

    student, teacher, target
        Modules whose forward takes a batch's inputs and gives logits. The teacher is frozen: no
        gradient, eval mode. ``target``: another model to end with; it is the one returned.
    data
        ``(inputs, labels)`` or inputs as tensors, a map-style Dataset, a DataLoader of one (its order
        and batch size are not used), or a mapping with some of train, validation, test, unlabelled.
    method
        A name, ``{"name": ..., setting: ...}``, a Method object, or a list of these.
    task
        What a batch means, see Distillation. Without it labels are classes, or numbers where they are floats.
    score
        From outputs and labels of a split to metrics by name, the first being the one shown; default
        accuracy and nll, or r2 and mse where labels are floats.
    dir, resume, overwrite
        A run directory to keep; without it nothing is written. ``resume`` goes on with an unfinished run there,
        ``overwrite`` starts over.
    training
        Any key of a run's ``Training`` and logging settings: ``steps=9000``, ``batch_size=128``,
        ``optimizer={"lr": 2e-3}``, ``scheduler="CosineAnnealingLR"``, ``seed=1``, ``device="cpu"`` ...

    Raises ConfigError, DataError or PluginError before any training where something doesn't fit.
    """
    kind = kind_of(task, _sample(data))
    splits = as_splits(data, kind)
    splits.validate()
    described = _ObjectTask(kind, score)
    config = validate({"name": "distill", "task": "objects", "method": "objects", **training, "out": dir})
    optim.check(config.optimizer, config.scheduler)
    plugins = as_plugins(method)
    specs = [{"name": plugin.name, **plugin.method.config.model_dump(mode="json")} for plugin in plugins]
    config = validate({**dump(config), "method": None, "methods": specs})
    for model in (student, target):
        if model is not None:
            prepare_to_train(model)
    builders: dict[str, Callable[[], nn.Module]] = {STUDENT: lambda: student}
    if target is not None:
        builders[TARGET] = lambda: target
    parts = Parts(config, described, plugins, [], builders, teacher, config.out, rebuilt=False)
    final = target or student
    shown = display or default_display()
    summary, found = make(
        parts, splits, pick_device(config.device), shown, resume=resume, overwrite=overwrite
    )
    if found:
        folder = config.run_dir
        kept = directory.read_manifest(folder)
        before = directory.origin(kept["data"], kept["teacher"].get("digest"))
        made_from = replace(splits, test=None).fingerprint()
        directory.same_origin(
            folder, before, directory.origin(made_from, None if teacher is None else digest(teacher))
        )
        load(final, folder / directory.STUDENT)
    return Distilled(final, summary["scores"], summary)


class _ObjectTask(Task):
    """The task behind data that were handed over."""

    api_version: ClassVar[int] = 1

    def __init__(self, kind: TaskKind, score: Score | None) -> None:
        super().__init__()
        self.kind = kind.name  # type: ignore[misc]
        floats = kind.labels == "numbers"
        self._score = score or (regression if floats else classification)
        self.metric = "r2" if floats else "accuracy"  # type: ignore[misc]

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        scores = numbers(self._score(outputs, labels), "the score that was handed over")
        self.metric = next(iter(scores))  # type: ignore[misc]
        return scores


def _sample(data: Any) -> Any:
    """One row of the training data as its loader gives it, or the tensors themselves."""
    if isinstance(data, Splits):
        return data.train.batch(torch.zeros(1, dtype=torch.long))
    if isinstance(data, Mapping) and data.get("train") is not None:
        data = data["train"]
    if isinstance(data, DataLoader):
        return None if isinstance(data.dataset, IterableDataset) else data.collate_fn([data.dataset[0]])
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset) and len(data):  # type: ignore[arg-type]
        return default_collate([data[0]])
    return data


def as_splits(data: Any, kind: TaskKind = DEFAULT) -> Splits:
    """Splits from what a user has; DataError for what can't be read."""
    if isinstance(data, Splits):
        return replace(data)
    if isinstance(data, Mapping):
        unknown = [name for name in data if name not in SPLITS]
        if unknown:
            raise DataError(f"data has a split '{unknown[0]}'{nearest(str(unknown[0]), SPLITS)}")
        if data.get("train") is None:
            raise DataError(f"data has the splits {', '.join(data) or 'none'}; expected 'train' among them")
        return Splits(
            **{name: as_split(value, name, kind) for name, value in data.items() if value is not None}
        )
    return Splits(as_split(data, "train", kind))


def as_split(data: Any, name: str, kind: TaskKind = DEFAULT) -> Split:
    """One split from tensors, a Dataset or a DataLoader."""
    if isinstance(data, TensorSplit | DatasetSplit):
        return data
    pair = isinstance(data, tuple | list) and len(data) in (1, 2) and all(isinstance(x, Tensor) for x in data)
    if isinstance(data, Tensor) or pair:
        batch = kind.read(data)
        return TensorSplit(batch.inputs, batch.labels, batch.teacher_inputs, batch.mask)
    labelled = name != "unlabelled"
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        return DatasetSplit(data.dataset, labelled, collate=data.collate_fn, kind=kind)
    if isinstance(data, Dataset) and hasattr(data, "__len__") and not isinstance(data, IterableDataset):
        return DatasetSplit(data, labelled, kind=kind)
    what = type(data).__name__
    if isinstance(data, tuple | list) and data:
        what += f" of {', '.join(type(item).__name__ for item in data[:3])}"
    raise DataError(
        f"the {name} split is {what}; expected tensors (torch.as_tensor makes one of an array), (inputs, labels), "
        "a map-style Dataset or a DataLoader of one (an iterable has no sample ids, and can't be resumed)"
    )
