"""``stillhouse.distill(student, teacher, data)``: a run from Python objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from stillhouse.api import Task
from stillhouse.config import RunConfig, Training, dump, validate
from stillhouse.contract.context import STUDENT, TARGET
from stillhouse.contract.kinds import TaskKind, kind_of
from stillhouse.contract.metrics import (
    KNOWN,
    Metric,
    Metrics,
    WholeSplit,
    default_metrics,
    higher_is_better,
    metrics_named,
)
from stillhouse.contract.splits import Splits
from stillhouse.errors import ConfigError
from stillhouse.models.integrity import prepare_to_train
from stillhouse.plugin.load import MethodLike, as_plugins, configured
from stillhouse.runs import directory, stored, teachers
from stillhouse.runs.data import as_splits, batch_size_of, sample
from stillhouse.runs.display import Display
from stillhouse.runs.display import display as default_display
from stillhouse.runs.resolve import Parts, pick_device
from stillhouse.runs.train import Summary, make
from stillhouse.runs.weights import load
from stillhouse.training import optim

Score = str | Sequence[str] | Metric | Metrics | Callable[[Tensor, Tensor], Mapping[str, Any]]
"""What ``distill`` scores by: names, an object with update and compute, several by name, or a function."""


@dataclass
class Distilled:
    """What came out: the trained model, its scores by split, and everything else in ``summary``."""

    student: nn.Module
    scores: dict[str, dict[str, float]]
    summary: Summary


def distill(
    student: nn.Module,
    teacher: nn.Module | Mapping[str, nn.Module] | None,
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
        gradient, eval mode; several by name are one, their mean. ``target``: another model to end with; it is the one returned.
    data
        ``(inputs, labels)`` or inputs as tensors, anything with ``__len__`` and ``__getitem__`` (a Dataset, one of the
        library ``datasets``), a DataLoader, an IterableDataset, or a mapping with some of train, validation, test,
        unlabelled. A DataLoader's collate_fn, workers and pinned memory are used; its sampler's batches too, drawn
        anew each epoch under the run's seed (of a plain ``shuffle=True`` the batch size, with every batch full). A
        stage over labelled and unlabelled rows mixes the two at random. An iterable's batches come as they are.
    method
        A name, ``{"name": ..., setting: ...}``, a Method object, or a list of these.
    task
        What a batch means, see Distillation. Without it labels are classes, or numbers where they are floats.
    score
        Names of metrics (accuracy, f1, nll, perplexity, miou; r2, mse, spearman), an object with ``update`` and
        ``compute`` as torchmetrics' are, several of these by name, or a function of a whole split's outputs and
        labels to numbers by name, where the outputs take 512 MiB at most. Rows that count are scored. The first that is
        better when higher is the one shown. Default: those of the kind of task (accuracy and nll; r2 and mse).
    dir, resume, overwrite
        A run directory to keep; without it nothing is written. ``resume`` goes on with an unfinished run there,
        ``overwrite`` starts over.
    training
        ``observers``, and any key of a run's ``Training`` and logging settings: ``steps=9000``, ``batch_size=128``,
        ``optimizer={"lr": 2e-3}``, ``scheduler="CosineAnnealingLR"``, ``seed=1``, ``device="cpu"`` ...

    Raises ConfigError, DataError or PluginError before any training where something doesn't fit.
    """
    kind = kind_of(task, sample(data))
    splits = as_splits(data, kind, training.get("batch_size"), training.get("workers"))
    splits.validate()
    described = _HandedOver(kind, score)
    if "batch_size" not in training and (own := batch_size_of(data)) is not None:
        training["batch_size"] = own
    _refuse_unused(training, dir, resume=resume, overwrite=overwrite)
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
    observers = [
        configured("observer", spec, f"observers.{number}")[1] for number, spec in enumerate(config.observers)
    ]
    parts = Parts(config, described, plugins, observers, builders, teacher, config.out, rebuilt=False)
    final = target or student
    shown = display or default_display()
    summary, found = make(
        parts, splits, pick_device(config.device), shown, resume=resume, overwrite=overwrite
    )
    if found:
        folder = config.run_dir
        kept = directory.read_manifest(folder)
        before = directory.origin(kept["data"], kept["teacher"])
        made_from = replace(splits, test=None).fingerprint()
        directory.same_origin(folder, before, directory.origin(made_from, _facts(parts, splits, shown)))
        load(final, folder / directory.STUDENT)
    return Distilled(final, summary["scores"], summary)


KEYS = frozenset(Training.model_fields) | {
    "name", "observers", "soft_labels", "threads", "log_every", "validate_every", "evaluate_batch_size", "checkpoint_every",
}  # fmt: skip
"""Keys of a run's config that may be given here; the others are arguments of their own, or say what objects say."""


def _refuse_unused(
    training: Mapping[str, Any], dir: str | Path | None, *, resume: bool, overwrite: bool
) -> None:
    """ConfigError for what would be dropped without a word."""
    for name in training:
        if name == "out":
            raise ConfigError("got out; expected dir, the run directory to keep")
        if name in RunConfig.model_fields and name not in KEYS:  # the others are told as a config's are
            raise ConfigError(
                f"got {name}, which is no setting here; expected one of {', '.join(sorted(KEYS))}"
            )
    for name, given in (
        ("resume", resume),
        ("overwrite", overwrite),
        ("observers", training.get("observers")),
    ):
        if given and dir is None:
            raise ConfigError(f"got {name} and no dir; expected the run directory that it is about")


def _facts(parts: Parts, splits: Splits, shown: Display) -> dict[str, Any]:
    """What a run of these objects would say of its teacher."""
    labels = stored.labels_of(parts, splits, pick_device(parts.config.device), shown.say)
    if labels is not None:
        return stored.facts(labels)
    return {"digest": teachers.digest_given(parts.teacher)}


class _HandedOver(Task):
    """The task behind data that were handed over."""

    api_version: ClassVar[int] = 1

    def __init__(self, kind: TaskKind, score: Score | None) -> None:
        super().__init__()
        self.kind = kind.name  # type: ignore[misc]
        self._metrics = _metrics(score, kind)
        shown = next(
            (name for name, metric in self._metrics().items() if higher_is_better(name, metric)), None
        )
        self.metric = next(iter(self._metrics()), "") if shown is None else shown  # type: ignore[misc]

    def metrics(self) -> Metrics:
        return self._metrics()


def _metrics(score: Score | None, kind: TaskKind) -> Callable[[], Metrics]:
    """What makes the metrics that ``score`` stands for."""
    if score is None:
        return lambda: default_metrics(kind)
    if isinstance(score, Metric):
        name = (
            "" if isinstance(score, Iterable) else type(score).__name__
        )  # a collection has names of its own
        return lambda: {name: score}
    if isinstance(score, Mapping):
        for name, metric in score.items():
            if not isinstance(metric, Metric):
                raise ConfigError(
                    f"score: '{name}' is {type(metric).__name__}; expected an object with update and compute, as "
                    "torchmetrics' are"
                )
        return lambda: score
    if callable(score):
        return lambda: {"": WholeSplit(score)}
    names = [score] if isinstance(score, str) else score
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"score is {score!r:.60}; expected names ({', '.join(KNOWN)}), metrics by name, or a function of outputs "
            "and labels"
        )
    names = list(names)
    metrics_named(names, kind)
    return lambda: metrics_named(names, kind)
