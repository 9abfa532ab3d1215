"""A model's outputs and scores on a whole split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.contract.kinds import KINDS, TaskKind
from stillhouse.contract.splits import Split, Splits
from stillhouse.contract.task import Task
from stillhouse.errors import ConfigError, DataError
from stillhouse.models.calling import DEFAULT, evaluating, forward


def outputs(
    model: nn.Module,
    split: Split,
    device: torch.device,
    *,
    teacher: bool = False,
    batch_size: int = 1024,
    kind: TaskKind = DEFAULT,
) -> tuple[Tensor, Tensor | None]:
    """Outputs ``(N, C)`` and labels ``(N,)`` of the split, in row order, on the CPU."""
    given, labels = [], []
    with torch.random.fork_rng(), evaluating(model):
        for start in range(0, len(split), batch_size):
            batch = split.batch(torch.arange(start, min(start + batch_size, len(split)))).to(device)
            given.append(forward(model, batch.for_teacher if teacher else batch.inputs, kind).cpu())
            if batch.labels is not None:
                labels.append(batch.labels.cpu())
    return torch.cat(given), torch.cat(labels) if labels else None


def score(
    task: Task, model: nn.Module, split: Split, device: torch.device, *, teacher: bool = False
) -> dict[str, float]:
    """The task's metrics of a model on a split."""
    given, labels = outputs(model, split, device, teacher=teacher, kind=KINDS[task.kind])
    if labels is None:
        raise DataError("a split without labels can't be scored")
    return numbers(task.score(given, labels), type(task).__name__)


def numbers(scores: Any, who: str) -> dict[str, float]:
    """Metrics as Python numbers: from numbers of any library, and from several (a score for each class) one each.

    Raises ConfigError for what is no mapping of names to numbers.
    """
    if not isinstance(scores, Mapping) or not scores:
        got = (
            "an empty mapping" if isinstance(scores, Mapping) else f"{type(scores).__name__} ({scores!r:.60})"
        )
        raise ConfigError(f"score of {who} gave {got}; expected metrics by name, as in {{'accuracy': 0.9}}")
    found: dict[str, float] = {}
    for name, value in scores.items():
        plain = value.tolist() if hasattr(value, "tolist") else value
        several = isinstance(plain, list | tuple)
        for number, one in enumerate(_flat(plain) if several else [plain]):
            if isinstance(one, str | bytes) or not hasattr(one, "__float__"):
                raise ConfigError(
                    f"score of {who} gave '{name}' = {value!r:.60} ({type(value).__name__}); expected a number"
                )
            key = f"{name}.{number}" if several else str(name)
            found[key] = int(one) if isinstance(one, int) else float(one)
    return found


def _flat(values: Any) -> list[Any]:
    return [one for value in values for one in (_flat(value) if isinstance(value, list | tuple) else [value])]


def check_score(task: Task, model: nn.Module, splits: Splits, device: torch.device) -> None:
    """Score the untrained model once, so that a score that gives no numbers is told before training.

    On the validation split; where there is none, on some training rows, whose labels may be few for a score: what it
    raises there is no reason to stop.
    """
    if splits.validation is not None:
        score(task, model, splits.validation, device)
    elif splits.train.labelled and len(splits.train):
        rows = splits.train.batch(torch.arange(min(256, len(splits.train)))).to(device)
        if rows.labels is None:
            return
        with torch.random.fork_rng(), evaluating(model):
            given = forward(model, rows.inputs, KINDS[task.kind]).cpu()
        try:
            scores = task.score(given, rows.labels.cpu())
        except Exception:  # noqa: BLE001 - see above
            return
        numbers(scores, type(task).__name__)


class Sealed:
    """The test split, which opens once: whoever asks again has looked at it before."""

    def __init__(self, split: Split | None) -> None:
        self._split = split
        self.opened = 0

    def open(self) -> Split | None:
        """The split, the first time; RuntimeError after that."""
        if self.opened:
            raise RuntimeError("the test split was opened before in this run; it opens once, at the end")
        self.opened += 1
        return self._split
