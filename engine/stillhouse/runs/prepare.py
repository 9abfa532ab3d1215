"""What runs of one config share, made once before the first of them: data, teacher, and whether all of it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.config import RunConfig
from stillhouse.contract.context import STUDENT
from stillhouse.contract.metrics import higher_is_better, metric_behind
from stillhouse.contract.task import Task
from stillhouse.errors import ConfigError, Diverged
from stillhouse.runs.answering import teacher_of
from stillhouse.runs.evaluate import score
from stillhouse.runs.rehearsal import rehearse
from stillhouse.runs.resolve import pick_device, resolve
from stillhouse.runs.train import cpu_threads
from stillhouse.training.random_state import RandomState


@dataclass
class Prepared:
    """What runs of one config share.

    data
        Fingerprints of the splits.
    teacher
        The teacher's fingerprint and validation scores; empty without one.
    metric, higher, metrics
        The score that the task is judged by, whether more of it is better, and all that the task gives.
    refused
        Why the methods, the models and the task don't fit; None where they do. Then no teacher was trained.
    """

    data: dict[str, str]
    teacher: dict[str, Any]
    metric: str
    higher: bool
    metrics: list[str]
    refused: str | None = None


def prepare(config: RunConfig, say: Callable[[str], None] = lambda message: None) -> Prepared:
    """Make the data and the teacher that runs of this config will find kept, and check that all of it fits.

    Raises what a run would raise before its first update, but for a misfit, which is told in ``refused``. No score of
    the test split is taken.
    """
    parts = resolve(config)
    device = pick_device(config.device)
    outside = RandomState.capture()
    try:
        with cpu_threads(config.threads):
            data = parts.task.splits()
            data.validate()
            found, data = data.fingerprint(), replace(data, test=None)
            metrics: list[str] = []
            if data.validation is not None and data.validation.labelled:
                student = parts.builders[STUDENT]().to(device)
                metrics = list(score(parts.task, student, data.validation, device, config=config))
            try:
                rehearse(parts, data, device)
            except ConfigError as error:
                return _made(parts.task, found, {}, metrics, str(error))
            except Diverged as error:  # with these settings: the cell will tell, others may do better
                say(str(error))
            teacher = teacher_of(parts, data, device, say)[1]
            return _made(parts.task, found, teacher, metrics, None)
    finally:
        outside.restore()


def _made(
    task: Task, data: dict[str, str], teacher: dict[str, Any], metrics: list[str], refused: str | None
) -> Prepared:
    higher = higher_is_better(task.metric, metric_behind(task.metric, task.metrics()))
    return Prepared(data, teacher, task.metric, higher, metrics, refused)
