"""The tasks that need no download."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from stillhouse.errors import StillhouseError
from stillhouse_tasks.digits import Digits, DigitsConfig
from stillhouse_tasks.mnist1d import Mnist1d, Mnist1dConfig, Mnist1dViews, ViewsConfig, make

SMALL = {"train": 200, "unlabelled": 300, "validation": 100}
TASKS = {
    "digits": lambda **more: Digits(DigitsConfig(**more)),
    "mnist1d": lambda **more: Mnist1d(Mnist1dConfig(**SMALL, **more)),
    "mnist1d-views": lambda **more: Mnist1dViews(ViewsConfig(**SMALL, **more)),
}


@pytest.fixture(scope="module")
def made():
    return {name: build().splits() for name, build in TASKS.items()}


def rows_of(split) -> set[bytes]:
    return {row.numpy().tobytes() for row in split.inputs}


@pytest.mark.parametrize("task", TASKS)
class TestEveryTask:
    def test_has_four_disjoint_splits(self, task, made):
        splits = dict(made[task].items())
        assert set(splits) == {"train", "validation", "test", "unlabelled"}
        rows = {name: rows_of(split) for name, split in splits.items()}
        for name, mine in rows.items():
            assert len(mine) == len(splits[name]), "no row twice"
            for other, theirs in rows.items():
                assert name == other or not mine & theirs

    def test_hides_the_labels_of_the_unlabelled_split(self, task, made):
        assert made[task].unlabelled.labels is None
        assert made[task].unlabelled.extra == {}

    def test_is_the_same_every_time(self, task, made):
        assert TASKS[task]().splits().fingerprint() == made[task].fingerprint()

    def test_is_another_one_for_another_seed(self, task, made):
        other = TASKS[task](seed=7).splits().fingerprint()
        assert not set(other.values()) & set(made[task].fingerprint().values())

    def test_leaves_the_global_generators_alone(
        self, task, made
    ):  # made: the libraries are imported, which draws
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(3)
        expected = torch.rand(1).item(), np.random.rand(), random.random()
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(3)
        TASKS[task]().splits()
        assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected

    def test_can_be_trained_on(self, task, made):
        made[task].validate()
        for split in (made[task].train, made[task].validation, made[task].test):
            assert set(split.labels.tolist()) == set(range(10)), "every class is there"

    def test_builds_teachers_and_students_that_fit(self, task, made):
        kind = type(TASKS[task]())
        batch = made[task].train.batch(torch.arange(3))
        for build in kind.teachers.values():
            assert build()(batch.for_teacher).shape == (3, 10)
        for build in kind.students.values():
            assert build()(batch.inputs).shape == (3, 10)


def test_digits_refuses_a_division_that_leaves_nothing_to_test_on():
    with pytest.raises(StillhouseError, match=r"labelled \+ unlabelled \+ validation = 1797 of 1797 images"):
        Digits(DigitsConfig(labelled=897, unlabelled=600, validation=300)).splits()


@pytest.mark.parametrize("task", ["digits", "mnist1d"])
def test_an_unlabelled_split_of_none_is_none(task):
    config = {"unlabelled": 0, "validation": 50}
    kind = Digits(DigitsConfig(**config)) if task == "digits" else Mnist1d(Mnist1dConfig(**config))
    assert kind.splits().unlabelled is None


def test_mnist1d_is_the_published_set():
    from mnist1d.data import get_dataset_args, make_dataset

    state = np.random.get_state(), random.getstate()
    published = make_dataset(get_dataset_args())
    np.random.set_state(state[0])
    random.setstate(state[1])
    splits = Mnist1d(Mnist1dConfig(unlabelled=0, validation=10)).splits()
    assert (len(splits.train), len(splits.test)) == (4000, 1000)
    assert torch.equal(splits.train.inputs, torch.tensor(published["x"], dtype=torch.float32))
    assert splits.test.labels.tolist() == published["y_test"].tolist()


def test_mnist1d_makes_as_many_as_asked_for():
    x, y, x_test, _ = make(33, 5)
    assert (x.shape, y.shape, len(x_test)) == ((33, 40), (33,), 0)


def test_views_of_one_sample_differ_and_belong_together(made):
    plain, views = made["mnist1d"], made["mnist1d-views"]
    for name, split in views.items():
        assert split.teacher_inputs is not None
        assert not torch.equal(split.inputs, split.teacher_inputs), name
    assert torch.equal(views.train.labels, plain.train.labels)
    quiet = Mnist1dViews(ViewsConfig(**SMALL, noise=0.0)).splits().train
    for view in (quiet.inputs, quiet.teacher_inputs):
        assert torch.equal(view.sort(-1).values, plain.train.inputs.sort(-1).values), (
            "each is the sample, rolled"
        )
    still = Mnist1dViews(ViewsConfig(**SMALL, noise=0.0, shift=0)).splits().train
    assert torch.equal(still.inputs, plain.train.inputs)


@pytest.mark.parametrize("module", ["mnist1d", "multitask"])
def test_samples_are_generated_once(module, tmp_path, monkeypatch):
    import importlib

    task = importlib.import_module(f"stillhouse_tasks.{module}")
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    first = task.make(30, 3)
    monkeypatch.setattr(task, "_generate", None)
    again = task.make(30, 3)
    assert len(first) == len(again)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    with pytest.raises(TypeError):  # other samples are not taken for these
        task.make(30, 4)
