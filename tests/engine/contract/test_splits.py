"""Splits: tensors, Datasets, joined; the test split opens once."""

from __future__ import annotations

import pytest
import torch
import toys
from torch.utils.data import TensorDataset

from stillhouse.api import IGNORE, KINDS, TensorSplit
from stillhouse.contract.datasets import DatasetSplit
from stillhouse.contract.joined import JoinedSplit
from stillhouse.contract.splits import Splits
from stillhouse.contract.task import Task
from stillhouse.errors import ConfigError, DataError
from stillhouse.runs.evaluate import Sealed, score

X, Y = toys.rows(6, 1)
U = toys.rows(4, 2)[0]
ALL = torch.cat([X, U])


def tensors() -> tuple:
    return TensorSplit(X, Y), TensorSplit(U)


def datasets() -> tuple:
    return DatasetSplit(TensorDataset(X, Y)), DatasetSplit(TensorDataset(U), labelled=False)


@pytest.mark.parametrize("make", [tensors, datasets])
@pytest.mark.parametrize("index", [[0, 9, 3, 6], [6, 7], [1, 2], [9], [0], [9, 9, 0, 0]])
def test_a_joined_split_reads_both_in_the_order_that_is_asked_for(make, index):
    ids = torch.tensor(index)
    batch = JoinedSplit(*make()).batch(ids)
    assert torch.equal(batch.inputs, ALL[ids])
    assert torch.equal(batch.labels, torch.cat([Y, torch.full((4,), IGNORE)])[ids])
    assert torch.equal(batch.ids, ids)
    assert KINDS["classification"].labelled(batch) == sum(i < 6 for i in index)


@pytest.mark.parametrize("side", [0, 1])
def test_a_mask_that_one_side_has_is_kept(side):
    parts = list(tensors())
    parts[side].mask = torch.zeros(len(parts[side]), dtype=torch.bool)
    mask = JoinedSplit(*parts).batch(torch.arange(10)).mask
    assert mask.tolist() == [side != 0] * 6 + [side != 1] * 4


@pytest.mark.parametrize("side", [0, 1])
def test_a_teachers_view_that_one_side_has_is_kept(side):
    parts = list(tensors())
    parts[side].teacher_inputs = parts[side].inputs * 2
    views = JoinedSplit(*parts).batch(torch.arange(10)).for_teacher
    factors = torch.tensor([[2.0 if side == 0 else 1.0]] * 6 + [[2.0 if side == 1 else 1.0]] * 4)
    assert torch.equal(views, ALL * factors)


def test_mappings_are_joined_by_name():
    first = TensorSplit({"a": X, "b": X + 1}, Y)
    second = TensorSplit({"a": U, "b": U + 1})
    batch = JoinedSplit(first, second).batch(torch.tensor([7, 0]))
    assert torch.equal(batch.inputs["b"], ALL[[7, 0]] + 1)


def test_regression_targets_and_unlabelled_rows_do_not_mix():
    with pytest.raises(ConfigError, match=r"needs class labels, got float ones"):
        JoinedSplit(TensorSplit(X, X[:, 0]), TensorSplit(U)).batch(torch.arange(10))


class TestStageData:
    def test_names_what_a_stage_reads(self):
        train, unlabelled = tensors()
        both = Splits(train, unlabelled=unlabelled)
        assert both.stage("labelled") is train
        assert both.stage("unlabelled") is unlabelled
        assert len(both.stage("all")) == 10

    def test_falls_back_on_the_labelled_inputs_without_their_labels(self):
        alone = Splits(tensors()[0])
        assert alone.stage("unlabelled").batch(torch.arange(2)).labels is None
        assert alone.stage("all") is alone.train
        assert Splits(datasets()[0]).stage("unlabelled").batch(torch.arange(2)).labels is None

    def test_knows_no_other(self):
        with pytest.raises(ConfigError, match=r"expected labelled, unlabelled or all"):
            Splits(tensors()[0]).stage("test")


class TestFingerprint:
    @pytest.mark.parametrize(
        "other",
        [
            TensorSplit(X.clone().index_fill_(0, torch.tensor([3]), 0), Y),
            TensorSplit(X, Y.flip(0)),
            TensorSplit(X),
            TensorSplit(X.double(), Y),
            TensorSplit(X.reshape(12, 3), Y),
            TensorSplit(X, Y, mask=torch.ones(6, dtype=torch.bool)),
            TensorSplit(X, Y, teacher_inputs=X),
        ],
    )
    def test_changes_with_anything_in_the_rows(self, other):
        assert TensorSplit(X, Y).fingerprint() == TensorSplit(X.clone(), Y.clone()).fingerprint()
        assert TensorSplit(X, Y).fingerprint() != other.fingerprint()

    def test_of_a_dataset_changes_with_its_rows_and_length(self):
        prints = {
            DatasetSplit(TensorDataset(x, y)).fingerprint()
            for x, y in ((X, Y), (X[:5], Y[:5]), (X + 1, Y), (X, Y + 1))
        }
        assert len(prints) == 4


class TestScores:
    def test_need_labels(self):
        with pytest.raises(DataError, match=r"without labels"):
            score(Task(), toys.net(), TensorSplit(X), torch.device("cpu"))


def test_the_test_split_opens_once():
    split = TensorSplit(X, Y)
    sealed = Sealed(split)
    assert sealed.open() is split
    with pytest.raises(RuntimeError, match=r"it opens once, at the end"):
        sealed.open()
    assert sealed.opened == 1


def test_unlabelled_tokens_count_beside_labelled_ones_and_pads_do_not():
    ids = torch.arange(12).reshape(3, 4)
    labels = torch.tensor([[1, 2, IGNORE, IGNORE], [1, 1, 1, IGNORE], [2, 2, 2, 2]])
    joined = JoinedSplit(TensorSplit(ids, labels), TensorSplit(ids + 12))
    batch = joined.batch(torch.tensor([4, 0]))
    assert batch.labels.tolist() == [[IGNORE] * 4, [1, 2, IGNORE, IGNORE]]
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
