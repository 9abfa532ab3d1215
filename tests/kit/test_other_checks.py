"""Each check of a task or an observer catches one that breaks what it asks for, and passes one that does not."""

from __future__ import annotations

import re

import pytest
import torch
from breaking import in_process, outcome
from torch import nn

from stillhouse.api import Observer, ObserverConfig, Splits, Task, TaskConfig, TensorSplit, WholeSplit
from stillhouse.testing import checks_for, outcomes, subject_of, toy_splits, toy_student


class Toys(Task):
    """The toys as a task."""

    api_version = 1
    teachers = {"toy": lambda: toy_student()}
    students = {"toy": lambda: toy_student()}

    def splits(self):
        return toy_splits()


class Drifts(Toys):
    def splits(self):
        data = toy_splits()
        data.train = TensorSplit(torch.randn(32, 8), data.train.labels)
        return data


class Unseeded(Toys):
    def splits(self):
        generator = torch.Generator()
        generator.seed()
        return Splits(TensorSplit(torch.randn(32, 8, generator=generator), toy_splits().train.labels))


class Leaks(Toys):
    def splits(self):
        data = toy_splits()
        data.unlabelled = data.test.without_labels()
        return data


class HasNan(Toys):
    def splits(self):
        data = toy_splits()
        data.train.inputs[3] = float("nan")
        return data


class NoIds(Toys):
    def splits(self):
        class Anonymous(TensorSplit):
            def batch(self, index):
                return super().batch(torch.zeros_like(index))

        data = toy_splits()
        data.train = Anonymous(data.train.inputs, data.train.labels)
        return data


class TooNarrow(Toys):
    students = {"narrow": lambda: nn.Linear(8, 3)}


class LowerIsBetter(Toys):
    def metrics(self):
        return {
            "": WholeSplit(
                lambda outputs, labels: {"accuracy": -(outputs.argmax(-1) == labels).float().mean()}
            )
        }


class OtherMetric(Toys):
    metric = "f1"


class Quiet(Observer):
    """Watches."""

    api_version = 1


class StartsOnce(Quiet):
    def on_run_start(self, record):
        (record.dir / "mine").mkdir()


class Meddles(Quiet):
    """Draws from the random numbers that the student's dropout draws from."""

    def on_metrics(self, row):
        torch.rand(1)


class Trains(Quiet):
    def on_metrics(self, row):
        import gc

        for found in gc.get_objects():
            if issubclass(type(found), nn.Linear):  # isinstance() asks dead weak references
                found.weight.data.mul_(1.01)


class NoDefault(TaskConfig):
    rows: int


class HasNoDefault(Toys):
    Config = NoDefault


class Open(ObserverConfig, extra="ignore"):
    """Takes anything."""


class TakesUnknownSettings(Quiet):
    Config = Open


BREAKS = [
    (HasNoDefault, "config_round_trips", "expected a default for every field"),
    (TakesUnknownSettings, "config_round_trips", "expected extra='forbid'"),
    (Drifts, "splits_are_the_same_each_time", "draws from torch's global random numbers"),
    (Unseeded, "splits_are_the_same_each_time", "two calls of splits\\(\\) made different rows"),
    (Leaks, "test_rows_are_in_no_other_split", "16 rows of the test split stand in the unlabelled"),
    (HasNan, "splits_are_sound", "NaN"),
    (NoIds, "splits_are_sound", "expected the row numbers"),
    (TooNarrow, "models_fit_the_data", "student 'narrow' gives outputs of shape"),
    (LowerIsBetter, "metric_is_scored_and_higher_is_better", "expected more for the right ones"),
    (OtherMetric, "metric_is_scored_and_higher_is_better", "expected 'f1'"),
    (StartsOnce, "survives_a_run_and_a_resume", "FileExistsError"),
    (Trains, "training_is_unchanged", "read and change nothing"),
    (Meddles, "training_is_unchanged", "read and change nothing"),
]


@pytest.mark.parametrize("kind", [Toys, Quiet])
def test_every_check_has_a_plugin_that_breaks_it(kind):
    of_their_own = {"listing_imports_nothing", "import_does_no_work"}  # see test_import_checks.py
    names = {check.name for check in checks_for(subject_of(kind))}
    assert names == {check for one, check, _ in BREAKS if issubclass(one, kind)} | of_their_own


@pytest.mark.parametrize(
    ("kind", "check", "message"), BREAKS, ids=[f"{k.__name__}-{c}" for k, c, _ in BREAKS]
)
def test_checks_of_tasks_and_observers_catch_what_breaks_them(kind, check, message):
    found = outcome(kind, check)
    assert found.status == "failed"
    assert re.search(message, found.message), found.message


@pytest.mark.parametrize("kind", [Toys, Quiet])
def test_a_good_task_and_a_good_observer_pass(kind):
    found = list(outcomes(in_process(kind)))
    assert [(one.check.name, one.message) for one in found if one.bad] == []


class Surprise(Toys):
    """Less of it is better, and its metric says so."""

    metric = "nll"


class Contrary(Toys):
    """Says that less is better of what right answers have more of."""

    metric = "accuracy"

    def metrics(self):
        found = WholeSplit(lambda outputs, labels: float((outputs.argmax(-1) == labels).float().mean()))
        found.higher_is_better = False
        return {"accuracy": found}


class Embeds(Toys):
    """Its held-out rows are numbered, and the score knows what the numbers mean."""

    kind = "embedding"

    def metrics(self):
        return {"accuracy": WholeSplit(lambda outputs, numbers: 0.5)}


def test_a_metric_of_which_less_is_better_is_held_to_that():
    check = "metric_is_scored_and_higher_is_better"
    assert outcome(Surprise, check).status == "passed"
    found = outcome(Contrary, check)
    assert found.status == "failed"
    assert "expected less for the right ones" in found.message


def test_a_score_of_embeddings_is_the_tasks_own():
    assert outcome(Embeds, "metric_is_scored_and_higher_is_better").status not in ("passed", "failed")
