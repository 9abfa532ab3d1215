"""A model's scores on a split, read batch by batch: its outputs are never joined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.config import RunConfig
from stillhouse.contract.batch import IGNORE, Batch, tensors_in
from stillhouse.contract.kinds import KINDS, TaskKind
from stillhouse.contract.metrics import LIMIT, Metrics, WholeSplit, numbers, too_large
from stillhouse.contract.reading import Reading
from stillhouse.contract.splits import Split, Splits
from stillhouse.contract.task import Task
from stillhouse.errors import ConfigError, DataError, StillhouseError
from stillhouse.models.calling import evaluating, forward
from stillhouse.training.compatibility import refuse_labels

BATCH = 1024
"""Rows scored at once, at most, where nothing is said."""
ROOM = 64 * 2**20
"""Bytes that a batch's inputs and outputs take, at most, where nothing is said."""
CHUNK = 16 * 2**20
"""Bytes of outputs that are handed to a metric at once."""
TRIED = 64
"""Rows that the score is tried on before training."""


def score(
    task: Task,
    model: nn.Module,
    split: Split,
    device: torch.device,
    *,
    teacher: bool = False,
    config: RunConfig | None = None,
    like: Split | None = None,
) -> dict[str, float]:
    """The task's metrics of a model on a split, over the rows that the mask has and that have a label.

    teacher
        Whether the model reads the teacher's inputs, where the split has some.
    config
        The run's, for ``evaluate_batch_size`` and ``workers``. Without that size a forward pass has the samples that
        the split's loader says, else 1,024 or as many as take 64 MiB of inputs and outputs.
    like
        The split whose first row says what a row takes, where this one is to be read once and no more.

    Raises DataError for a split without labels, and for labels that the model has no output for.
    """
    metrics, kind = task.metrics(), KINDS[task.kind]
    stated, workers = (None, None) if config is None else (config.evaluate_batch_size, config.workers)
    reading = Reading(workers=workers, pin_memory=device.type == "cuda")
    with torch.random.fork_rng(), evaluating(model):
        size = (
            stated
            or split.loading.batch_size
            or _fitting(model, split if like is None else like, device, kind, teacher=teacher)
        )
        _scored(metrics, model, split.every(size, reading), device, kind, teacher=teacher)
    return computed(task, metrics)


def _scored(
    metrics: Metrics,
    model: nn.Module,
    batches: Iterator[Batch],
    device: torch.device,
    kind: TaskKind,
    *,
    teacher: bool = False,
) -> None:
    _begin(metrics, device)
    for batch in batches:
        moved = batch.to(device)
        if moved.labels is None:
            raise DataError("a split without labels can't be scored")
        logits = forward(model, moved.for_teacher if teacher else moved.inputs, kind)
        moved = kind.complete(moved, logits.shape[1:-1])
        kind.check(moved, logits, "the scored model")
        _update(metrics, moved, logits, kind)


def _begin(metrics: Metrics, device: torch.device) -> None:
    for metric in metrics.values():
        for name, given in (("reset", ()), ("to", (device,))):
            if (act := getattr(metric, name, None)) is not None:
                act(*given)


def _update(metrics: Metrics, batch: Batch, logits: Tensor, kind: TaskKind) -> None:
    """Hand over the batch's rows that count, in chunks: a vocabulary's outputs are many bytes a row."""
    outputs, labels, mask = _flat(batch, logits, kind)
    rows = max(1, CHUNK * len(outputs) // (4 * max(1, outputs.numel())))
    every = mask is None or bool(mask.all())
    places = (
        torch.arange(len(outputs), device=outputs.device) if mask is None or every else mask.nonzero()[:, 0]
    )
    for index in torch.split(places, rows):
        chosen: Any = slice(int(index[0]), int(index[0]) + len(index)) if every and len(index) else index
        own, wanted = outputs[chosen], labels[chosen]
        if not len(wanted):
            continue
        if kind.labels == "classes":
            _check_range(wanted, own.shape[-1])
        for name, metric in metrics.items():
            try:
                metric.update(own if own.dtype == torch.float64 else own.float(), wanted)
            except (ValueError, RuntimeError, TypeError, IndexError) as error:
                raise ConfigError(
                    f"score: the metric {name or type(metric).__name__!r} can't read outputs {tuple(own.shape)} and labels "
                    f"{tuple(wanted.shape)} ({error}); expected one for {kind}: {kind.about}"
                ) from error


def _flat(batch: Batch, logits: Tensor, kind: TaskKind) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs ``(n, C)``, labels of as many rows, and which of them count; None for all."""
    labels = batch.labels
    assert labels is not None
    if kind.labels == "numbers":
        shape = (len(batch), -1) if labels.numel() > len(batch) else (len(batch),)
        return logits.reshape(shape), labels.reshape(shape), batch.mask
    classes = logits.shape[-1]
    mask = None if batch.mask is None else batch.mask.reshape(-1)
    if kind.labels == "flags":
        return logits.reshape(-1, classes), labels.reshape(-1, classes), mask
    known = (labels != IGNORE).reshape(-1)
    return logits.reshape(-1, classes), labels.reshape(-1), known if mask is None else known & mask


def _check_range(labels: Tensor, classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < classes:
        raise DataError(
            f"labels to be scored go from {low} to {high}; expected 0 to {classes - 1}, as the model has {classes} "
            f"outputs, or {IGNORE} for no label"
        )


def computed(task: Task, metrics: Metrics) -> dict[str, float]:
    """Each metric's numbers under its name; of one that is called ``""``, under their own."""
    found: dict[str, Any] = {}
    who = _who(task)
    for name, metric in metrics.items():
        value = metric.compute()
        found |= numbers(value, who) if not name else {name: value}
    scores = numbers(found, who)
    if not task.metric:
        task.metric = next(iter(scores))  # type: ignore[misc]
    return scores


def _who(task: Task) -> str:
    return type(task).__name__.lstrip("_")


def _fitting(model: nn.Module, split: Split, device: torch.device, kind: TaskKind, *, teacher: bool) -> int:
    """Samples that a batch may have, by what one of them takes."""
    first = split.probe(1).to(device)
    inputs = first.for_teacher if teacher else first.inputs
    tensors = [forward(model, inputs, kind), *(tensor for _, tensor in tensors_in(inputs))]
    size = sum(tensor.numel() * max(4, tensor.element_size()) for tensor in tensors)
    return max(1, min(BATCH, ROOM // max(size, 1)))


def check_score(task: Task, model: nn.Module, splits: Splits, device: torch.device) -> None:
    """Try the score on some rows with the untrained model, so that one that gives no numbers is told before training.

    On validation rows, else on training rows. A score that these are too few for is tried on the whole validation
    split; without one it can't be told, and what it raises is no reason to stop.

    Raises ConfigError or DataError for what would end the run at its first score.
    """
    split = splits.train if splits.validation is None else splits.validation
    head = split.probe(TRIED)
    if head.labels is None:
        return
    kind = KINDS[task.kind]
    with torch.random.fork_rng(), evaluating(model):
        _refuse_whole(task.metrics(), model, split, device, kind)
        metrics = task.metrics()
        _scored(metrics, model, iter([head]), device, kind)
    try:
        scores = computed(task, metrics)
    except Exception as error:  # too few rows for it, perhaps
        if splits.validation is None:
            if isinstance(error, StillhouseError):
                raise
            return
        scores = score(task, model, splits.validation, device)
    if task.metric not in scores:
        raise ConfigError(
            f"{type(task).__name__.lstrip('_')} is scored by {', '.join(scores)}; expected its metric '{task.metric}' among them"
        )


def _refuse_whole(
    metrics: Metrics, model: nn.Module, split: Split, device: torch.device, kind: TaskKind
) -> None:
    if not split.numbered or not any(isinstance(metric, WholeSplit) for metric in metrics.values()):
        return
    width = forward(model, split.probe(1).to(device).inputs, kind)[0].numel()
    if 4 * width * len(split) > LIMIT:
        raise too_large(4 * width * len(split))


class Sealed:
    """The test split, which opens once: whoever asks again has looked at it before."""

    def __init__(self, split: Split | None) -> None:
        self._split = split
        self.opened = 0

    def check_labels(self, classes: int) -> None:
        """DataError where a class number of the test labels has no output: told before training; the rows stay unseen."""
        refuse_labels(getattr(self._split, "labels", None), classes, "test.labels")

    def open(self) -> Split | None:
        """The split, the first time; RuntimeError after that."""
        if self.opened:
            raise RuntimeError("the test split was opened before in this run; it opens once, at the end")
        self.opened += 1
        return self._split
