"""Checks of a task: its data, its models and its metric."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stillhouse.api import IGNORE, Batch, Task
from stillhouse.contract.kinds import KINDS
from stillhouse.contract.metrics import higher_is_better, metric_behind
from stillhouse.contract.splits import Split, Splits, TensorSplit
from stillhouse.models.calling import forward
from stillhouse.plugin.builders import arguments_model
from stillhouse.runs.evaluate import computed
from stillhouse.testing.checks import CheckFunction, NotApplicable, expect
from stillhouse.testing.rig import Subject
from stillhouse.testing.state_checks import config_round_trips

ROWS = 512
"""Rows with a label that a metric is tried on, at most."""


def splits_are_sound(subject: Subject, folder: Path) -> None:
    """There are training rows, the rows of every split are finite, and batches carry their ids."""
    data = _splits(subject)
    data.validate()
    for name, split in data.items():
        index = torch.tensor([len(split) - 1, 0])
        ids = split.batch(index).ids
        expect(
            ids is not None and torch.equal(ids, index),
            subject,
            f"batches of the {name} split hold ids {ids}; expected the row numbers asked for",
        )


def splits_are_the_same_each_time(subject: Subject, folder: Path) -> None:
    """The same settings make the same rows, and the process's random numbers are left alone."""
    first = _splits(subject).fingerprint()
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        before = torch.get_rng_state()
        again = _task(subject).splits().fingerprint()
        drawn = not torch.equal(before, torch.get_rng_state())
    expect(
        not drawn,
        subject,
        "splits() draws from torch's global random numbers; expected a generator with a seed of the config's",
    )
    expect(first == again, subject, "two calls of splits() made different rows; expected the same")


def test_rows_are_in_no_other_split(subject: Subject, folder: Path) -> None:
    """No test row stands in the training, validation or unlabelled rows."""
    data = _splits(subject)
    if not isinstance(data.test, TensorSplit):
        raise NotApplicable("has no test split in memory")
    held_out = _digests(data.test)
    for name, split in data.items():
        if name != "test" and isinstance(split, TensorSplit):
            shared = len(held_out & _digests(split))
            expect(not shared, subject, f"{shared} rows of the test split stand in the {name} split too")


def _digests(split: TensorSplit) -> set[bytes]:
    inputs = split.inputs if isinstance(split.inputs, Tensor) else next(iter(split.inputs.values()))
    return {row.contiguous().numpy().tobytes() for row in inputs}


def models_fit_the_data(subject: Subject, folder: Path) -> None:
    """Every teacher and student is built from its defaults and takes a batch."""
    task = _task(subject)
    batch = _splits(subject).train.batch(torch.arange(2))
    for role, builders in (("teacher", task.teachers), ("student", task.students)):
        for name, build in builders.items():
            arguments_model(build)()
            with torch.random.fork_rng():
                given = forward(
                    build().eval(),
                    batch.for_teacher if role == "teacher" else batch.inputs,
                    KINDS[subject.kind.kind],
                )
            expect(
                given.shape[0] == 2 and _covers(given, batch),
                subject,
                f"{role} '{name}' gives outputs of shape {tuple(given.shape)} for two rows; expected a row of logits "
                "for each, with a column for each class",
            )


def _covers(outputs: Tensor, batch: Batch) -> bool:
    if batch.labels is None or batch.labels.is_floating_point():
        return True
    return outputs.shape[:-1] == batch.labels.shape and int(batch.labels.max()) < outputs.shape[-1]


def metric_is_scored_and_higher_is_better(subject: Subject, folder: Path) -> None:
    """``metrics`` hold the task's metric, and give right answers more of it than wrong ones, or less where it says so."""
    task = _task(subject)
    if KINDS[subject.kind.kind].labels == "none":
        raise NotApplicable("what labels of its held-out rows mean is its own")
    split: Split | None = _splits(subject).validation
    labels = None if split is None else split.probe(64).labels
    if labels is None:
        raise NotApplicable("has no labelled validation split")
    if labels.is_floating_point():
        labels = labels if labels.shape[1:].numel() > 1 else labels.reshape(-1)
        outputs = labels
    else:
        if (
            KINDS[subject.kind.kind].labels == "classes"
        ):  # metrics are given the rows that count, one after the other
            labels = labels[labels != IGNORE][:ROWS]
        outputs = 10 * torch.nn.functional.one_hot(labels.clamp(min=0)).float()
    scores = []
    for sign in (1, -1):
        metrics = task.metrics()
        for metric in metrics.values():
            metric.update(sign * outputs, labels)
        scores.append(computed(task, metrics))
    expect(
        task.metric in scores[0], subject, f"metrics() give {', '.join(scores[0])}; expected '{task.metric}'"
    )
    more = higher_is_better(task.metric, metric_behind(task.metric, task.metrics()))
    right, wrong = (one[task.metric] for one in scores)
    expect(
        right > wrong if more else right < wrong,
        subject,
        f"right outputs score {right:.4g} and wrong ones {wrong:.4g} in '{task.metric}'; expected "
        f"{'more' if more else 'less'} for the right ones",
    )


def _task(subject: Subject) -> Task:
    made: Task = subject.kind(subject.settings())
    return made


def _splits(subject: Subject) -> Splits:
    """The task's data, made once for all checks."""
    if "splits" not in subject.memo:
        subject.memo["splits"] = _task(subject).splits()
    made: Splits = subject.memo["splits"]
    return made


CHECKS: tuple[CheckFunction, ...] = (
    config_round_trips,
    splits_are_sound,
    splits_are_the_same_each_time,
    test_rows_are_in_no_other_split,
    models_fit_the_data,
    metric_is_scored_and_higher_is_better,
)
