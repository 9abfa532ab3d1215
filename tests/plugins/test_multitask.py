from __future__ import annotations

import pytest
import torch
import toys

from stillhouse.api import DataError
from stillhouse_tasks import multitask
from stillhouse_tasks.mnist1d import make as plain_mnist1d


def test_the_signals_are_those_of_the_package_with_the_place_known():
    signals, digits, quarters = multitask.make(400, 0)
    again = multitask.make(400, 0)
    assert all(torch.equal(a, b) for a, b in zip((signals, digits, quarters), again, strict=True))
    assert set(quarters.tolist()) == {0, 1, 2, 3}
    plain = plain_mnist1d(400, 0)[0]
    shape = [(signals / signals.std()).abs().mean(), (plain / plain.std()).abs().mean()]
    assert shape[0] == pytest.approx(float(shape[1]), rel=0.05)


def test_each_sample_has_the_label_of_its_task():
    task = multitask.Mnist1dMultitask(
        multitask.MultitaskConfig(digit=30, parity=20, position=10, unlabelled=5, validation=6, test=7)
    )
    made = task.splits()
    assert made.train.extra["task"].bincount().tolist() == [30, 20, 10]
    for number, (low, high) in enumerate([(0, 9), (10, 11), (12, 15)]):
        own = made.train.labels[made.train.extra["task"] == number]
        assert low <= own.min()
        assert own.max() <= high
    outputs = torch.full((18, 16), -1e4).scatter(1, made.validation.labels[:, None], 5.0)
    found = toys.scores(task, outputs, made.validation.labels)
    assert found["accuracy"] == found["accuracy.digit"] == found["accuracy.position"] == 1
    assert made.unlabelled.extra["task"].unique().tolist() == [-1]
    with pytest.raises(DataError, match="got task id 3; expected -1"):
        multitask.dense()(torch.zeros(1, 40), torch.tensor([3]))
