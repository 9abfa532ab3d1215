"""distill(student, teacher, data): three lines, and the caller's world as it was."""

from __future__ import annotations

import copy
import random
import signal

import numpy as np
import pytest
import torch
import toys
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import stillhouse
from stillhouse.errors import CheckpointError, ConfigError, DataError, StillhouseError

FAST = {"steps": 9, "batch_size": 8, "device": "cpu"}


class Items(Dataset):
    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, row):
        items = [column[row] for column in self.columns]
        return items[0] if len(items) == 1 else tuple(items)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*toys.rows(8), strict=True))


def distilled(data, student=None, teacher=None, **given):
    student = student if student is not None else toys.net(seed=1)
    return stillhouse.distill(student, teacher or toys.net(16, seed=2), data, **{**FAST, **given})


def everything():
    made = toys.splits()
    return {
        "train": (made.train.inputs, made.train.labels),
        "validation": (made.validation.inputs, made.validation.labels),
        "test": (made.test.inputs, made.test.labels),
        "unlabelled": made.unlabelled.inputs,
    }


X, Y = toys.rows(48, 1)
FORMS = {
    "inputs": lambda: X,
    "inputs and labels": lambda: (X, Y),
    "a list": lambda: [X, Y],
    "a dataset": lambda: TensorDataset(X, Y),
    "a dataset of inputs": lambda: Items(X),
    "a loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True),
    "a loader with a collate of its own": lambda: DataLoader(
        Items(X, Y), collate_fn=lambda items: {"input": torch.stack([x for x, _ in items]), "labels": torch.stack([y for _, y in items])}
    ),
    "a mapping": everything,
    "a mapping of datasets": lambda: {
        "train": TensorDataset(X, Y),
        "unlabelled": Items(toys.rows(7, 3)[0]),
        "validation": TensorDataset(*toys.rows(9, 5)),
    },
    "splits": toys.splits,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_takes_data_in_every_form(form):
    student = toys.net(seed=1)
    before = toys.weights(student)
    made = distilled(FORMS[form](), student, batch_size=3)
    assert made.student is student
    assert made.summary["steps"] == 9
    assert not toys.same_bits(before, student)


def test_forms_of_the_same_rows_train_the_same_student():
    trained = []
    for form in ("inputs and labels", "a list"):
        trained.append(distilled(FORMS[form](), method="kd").student)
    assert toys.same_bits(*trained)


def test_scores_every_split_that_has_labels_and_opens_the_test_split_once():
    made = distilled(everything())
    assert set(made.scores) == {"validation", "test"}
    assert set(made.scores["test"]) == {"accuracy", "nll"}
    assert made.summary["test_opened"] == 1


def test_without_a_validation_split_it_runs_and_scores_nothing():
    assert distilled((X, Y)).scores == {}


def test_the_callers_random_numbers_and_teacher_are_untouched():
    def draw():
        return torch.rand(2).tolist(), np.random.rand(), random.random()

    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    expected = draw()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    teacher = toys.net(16, seed=2)
    before = toys.weights(teacher)
    distilled(everything(), toys.net(seed=1, dropout=0.5), teacher)
    assert draw() == expected
    assert toys.same_bits(before, teacher)
    for module in teacher.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_same_seed_twice_and_another_one():
    trained = [
        distilled(everything(), toys.net(seed=1, dropout=0.5), seed=seed).student for seed in (0, 0, 1)
    ]
    assert toys.same_bits(trained[0], trained[1])
    assert not toys.same_bits(trained[0], trained[2])


def test_another_target_is_what_comes_out_and_the_student_can_be_trained_on():
    student, target = toys.net(seed=1), toys.net(12, seed=5)
    made = distilled(everything(), student, target=target)
    assert made.student is target
    assert all(parameter.requires_grad for parameter in (*student.parameters(), *target.parameters()))


@pytest.mark.parametrize("fails", ["method", "data"])
def test_the_models_are_left_as_they_were_when_it_is_refused(fails):
    student, teacher = toys.net(seed=1), toys.net(16, seed=2)
    before = toys.weights(student)
    with pytest.raises(StillhouseError):
        distilled(
            X[:0] if fails == "data" else X, student, teacher, method="sdl" if fails == "method" else "sld"
        )
    assert toys.same_bits(before, student)
    assert all(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((X[:0], Y[:0]), "the train split is empty"),
        ((X, Y[:3]), "train.labels has 3 rows, the inputs have 48"),
        ((torch.where(torch.arange(48)[:, None] == 7, torch.nan, X), Y), "train.inputs holds NaN or infinity, first in row 7"),
        ({"train": X, "unlabelled": X / 0}, "unlabelled.inputs holds NaN or infinity, first in row 0"),
        ({"train": TensorDataset(X * torch.nan, Y)}, "train.inputs holds NaN"),
        ({"train": X, "valdation": X}, "data has a split 'valdation'; did you mean 'validation'?"),
        ({"validation": (X, Y)}, "expected 'train' among them"),
        ({}, "data has the splits none"),
        ("mnist", "the train split is str; expected tensors"),
        ((X.numpy(), Y.numpy()), "the train split is tuple of ndarray, ndarray; expected tensors (torch.as_tensor"),
        ((X, Y.bool()), "labels are torch.bool, and classification has class numbers (torch.int64)"),
        ((X, ["cat"] * 48), "the train split is tuple of Tensor, list; expected tensors"),
        ((X, torch.where(torch.arange(48) == 7, 4, Y)), "train.labels holds 4, first in row 7; expected 0 to 3"),
        ({"train": X, "validation": (X, Y - 1)}, "labels to be scored go from -1 to 2; expected 0 to 3"),
        ({"train": (X, Y), "validation": X}, "validation split has no labels"),
        ({"train": (X, Y), "test": X}, "test split has no labels"),
        ({"train": (X, Y), "validation": Items(X)}, "validation split has no labels"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_data_that_can_not_be_used_are_refused_before_training(data, said):
    student = toys.net(seed=1)
    before = toys.weights(student)
    with pytest.raises(DataError) as caught:
        distilled(data, student)
    assert said in str(caught.value)
    assert toys.same_bits(before, student)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stpes": 3}, "stpes: unknown; did you mean 'steps'?"),
        ({"steps": "many"}, "steps: "),
        ({"optimizer": {"name": "AdamV"}}, "did you mean 'Adam"),
        ({"method": "hard_lables"}, "did you mean 'hard_labels'"),
        (
            {"method": {"name": "sld", "temprature": 1}},
            "method.temprature: unknown; did you mean 'temperature'?",
        ),
        ({"method": toys.Alike(), "student": toys.net(outputs=5)}, "outputs of shape"),
        ({"device": "tpu"}, "device"),
        ({"device": "cudda"}, "device: got 'cudda'"),
    ],
)
def test_settings_that_can_not_be_used_are_refused_before_training(given, said):
    with pytest.raises(StillhouseError) as caught:
        distilled((X, Y), **given)
    assert said in str(caught.value)


def test_labels_without_an_output_are_found_without_a_teacher_too():
    data = {"train": (X, Y), "validation": (X, Y - 1)}
    with pytest.raises(DataError, match=r"validation\.labels holds -1, first in row"):
        stillhouse.distill(toys.net(), None, data, method="hard_labels", **FAST)


def test_a_method_object_of_ones_own():
    made = stillhouse.distill(toys.net(seed=1), None, (X, Y), method=toys.Squares(), **FAST)
    assert made.summary["methods"] == ["squares"]


def test_a_score_of_ones_own_names_the_metric():
    made = distilled(
        everything(), score=lambda outputs, labels: {"mine": float(outputs.mean()), "rows": len(labels)}
    )
    assert made.summary["metric"] == "mine"
    assert made.scores["test"]["rows"] == 16


def test_float_labels_are_a_regression():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    data = {"train": (X, X.sum(-1)), "test": (X, X.sum(-1))}
    made = stillhouse.distill(
        net, None, data, method="hard_labels", steps=400, batch_size=16, optimizer={"lr": 3e-2}, device="cpu"
    )
    assert made.summary["metric"] == "r2"
    assert made.scores["test"]["r2"] > 0.9


class Stops(toys.Squares):
    """Does something to the run in the update after the fourth."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    @stillhouse.api.hookimpl
    def on_update_end(self, info):
        if info.index == 4:
            self.act()


def test_threads_are_those_asked_for_and_the_callers_come_back():
    seen = []
    before = torch.get_num_threads()
    distilled(X, method=["sld", Stops(lambda: seen.append(torch.get_num_threads()))], threads=before + 1)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_after_an_error_everything_can_be_trained_again():
    student, target = toys.net(seed=1), toys.net(12, seed=5)
    with pytest.raises(ZeroDivisionError):
        distilled(everything(), student, target=target, method=["sld", Stops(lambda: 1 / 0)])
    assert all(parameter.requires_grad for parameter in (*student.parameters(), *target.parameters()))


@pytest.mark.parametrize("kept", [False, True])
def test_ctrl_c_says_what_is_kept(tmp_path, kept):
    stops = Stops(lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(StillhouseError, match=r"interrupted after update 5; ") as caught:
        distilled(X, method=["sld", stops], dir=tmp_path / "run" if kept else None)
    assert ("resume=True" in str(caught.value)) == kept
    assert ("nothing is kept" in str(caught.value)) != kept


class Noisy(Dataset):
    """Random items, which are seen when they are read."""

    def __len__(self):
        return 48

    def __getitem__(self, row):
        return X[row] + torch.randn(6) + np.random.randn(), Y[row]


@pytest.mark.parametrize("workers", [(0, 2), (2, 0)])
def test_random_items_after_a_kill_go_on_bit_for_bit_with_any_number_of_workers(tmp_path, workers):
    class Stops(toys.Squares):
        stop = True

        @stillhouse.api.hookimpl
        def on_update_end(self, info):
            if self.stop and info.index == 6:
                raise RuntimeError("power cut")

    class NeverStops(Stops):
        stop = False

    Stops.__name__ = NeverStops.__name__ = "Same"
    common = {"checkpoint_every": 2, "dir": tmp_path / "run"}
    whole = distilled(Noisy(), method=["kd", NeverStops()]).student
    with pytest.raises(RuntimeError, match=r"power cut"):
        distilled(Noisy(), method=["kd", Stops()], workers=workers[0], **common)
    again = distilled(Noisy(), method=["kd", NeverStops()], workers=workers[1], resume=True, **common)
    assert toys.same_bits(whole, again.student)


def test_an_iterable_is_resumed_by_reading_what_it_had(tmp_path):
    class Rows(IterableDataset):
        def __iter__(self):
            return iter([(x + torch.randn(6), y) for x, y in zip(X, Y, strict=True)])

    def run(folder, stop, **given):
        act = Stops(lambda: 1 / 0) if stop else Stops(lambda: None)
        loader = DataLoader(Rows(), 7)
        return distilled(
            loader, method=["kd", act], dir=folder, batch_size=7, checkpoint_every=2, **given
        ).student

    whole = run(tmp_path / "whole", stop=False)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", stop=True)
    said = []
    shown = stillhouse.runs.display.Display()
    shown.say = said.append
    again = run(tmp_path / "run", stop=False, resume=True, display=shown)
    assert toys.same_bits(whole, again)
    assert any("4 batches are read once more and dropped" in line for line in said)


class TestDirectory:
    def run(self, folder, student=None, **given):
        student = student if student is not None else toys.net(seed=1)
        return distilled(given.pop("data", everything()), student, dir=folder, **given)

    def test_is_kept_and_read_back(self, tmp_path):
        first = self.run(tmp_path / "run")
        again = toys.net(seed=1)
        second = self.run(tmp_path / "run", again)
        assert toys.same_bits(first.student, again)
        assert second.scores == first.scores

    def test_is_not_made_for_what_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="outputs of shape"):
            self.run(tmp_path / "run", toys.net(outputs=5), method=toys.Alike())
        assert not (tmp_path / "run").exists()
        self.run(tmp_path / "run")

    def test_overwrite_starts_over(self, tmp_path):
        self.run(tmp_path / "run", steps=6)
        with pytest.raises(CheckpointError, match="overwrite=True"):
            self.run(tmp_path / "run")
        assert self.run(tmp_path / "run", overwrite=True).summary["steps"] == 9

    @pytest.mark.parametrize("method", ["sld", {"name": "kd", "alpha": 0.5}])
    def test_goes_on_after_an_error_bit_for_bit(self, tmp_path, method):
        class Stops(toys.Squares):
            stop = True

            @stillhouse.api.hookimpl
            def on_update_end(self, info):
                if self.stop and info.index == 6:
                    raise RuntimeError("power cut")

        class NeverStops(Stops):
            stop = False

        Stops.__name__ = NeverStops.__name__ = "Same"
        common = {"checkpoint_every": 2, "data": toys.splits()}
        whole = self.run(tmp_path / "whole", method=[method, NeverStops()], **common).student
        student = toys.net(seed=1)
        with pytest.raises(RuntimeError, match=r"power cut"):
            self.run(tmp_path / "run", student, method=[method, Stops()], **common)
        again = toys.net(seed=1)
        made = self.run(tmp_path / "run", again, method=[method, NeverStops()], resume=True, **common)
        assert made.summary["steps"] == 9
        assert toys.same_bits(whole, again)
        for module in (*student.modules(), *again.modules()):
            assert not module._forward_hooks

    @pytest.mark.parametrize("resume", [False, True])
    @pytest.mark.parametrize("change", ["data", "teacher", "settings"])
    def test_of_something_else_is_refused_naming_it(self, tmp_path, change, resume):
        self.run(tmp_path / "run")
        if resume:
            (tmp_path / "run" / "summary.json").unlink()
        given = {
            "data": {"data": {**everything(), "unlabelled": toys.rows(64, 77)[0]}},
            "teacher": {"teacher": toys.net(16, seed=3)},
            "settings": {"batch_size": 4},
        }[change]
        said = {
            "data": "another unlabelled split",
            "teacher": "another teacher",
            "settings": "batch_size: 8 there, 4 here",
        }
        with pytest.raises(CheckpointError, match=said[change]):
            self.run(tmp_path / "run", resume=resume, **given)


def test_models_with_shared_weights_are_refused():
    net = toys.net()
    with pytest.raises(ConfigError, match=r"copy\.deepcopy"):
        distilled((X, Y), net, net)
    distilled((X, Y), toys.net(), copy.deepcopy(toys.net()))


def test_a_student_with_nothing_to_train_is_refused():
    frozen = toys.net(seed=1).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"trains student, and no parameter there can be trained; expected"):
        distilled(toys.rows(16), student=frozen)
