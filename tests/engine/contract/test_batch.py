"""Batches: parts, nested inputs, masks that are none."""

from __future__ import annotations

import pytest
import torch

from stillhouse.contract.batch import IGNORE, Batch, tensors_in
from stillhouse.contract.outputs import Targets
from stillhouse.errors import ConfigError, DataError
from stillhouse.kernels import TopK

X = torch.arange(12.0).reshape(4, 3)
Y = torch.tensor([0, 1, IGNORE, 1])
MASK = torch.tensor([True, False, True, True])


def test_a_part_is_a_part_of_everything():
    hot = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    batch = Batch({"a": X, "b": X + 1}, Y, torch.arange(4), X * 2, MASK, {"task": torch.arange(4)}, hot)
    part = batch.part(slice(1, 3))
    assert torch.equal(part.inputs["b"], X[1:3] + 1)
    assert torch.equal(part.labels, Y[1:3])
    assert part.ids.tolist() == [1, 2]
    assert torch.equal(part.for_teacher, X[1:3] * 2)
    assert part.mask.tolist() == [False, True]
    assert part.extra["task"].tolist() == [1, 2]
    assert part.probabilities.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_the_teacher_reads_the_students_inputs_unless_it_has_its_own():
    assert Batch(X).for_teacher is X
    assert Batch(X, teacher_inputs=X * 2).for_teacher is not X


def test_dense_logits_are_asked_for_by_name():
    kept = TopK.from_logits(torch.randn(4, 10), 3)
    with pytest.raises(ConfigError, match=r"got TopK for the teacher's logits; expected a dense tensor"):
        Targets(soft=kept).dense


def test_inputs_may_be_nested_mappings_and_tuples():
    batch = Batch({"image": X, "text": (X + 1, {"more": X + 2, "name": "a word"})})
    part = batch.part(slice(1, 3))
    assert (len(batch), len(part)) == (4, 2)
    assert torch.equal(part.inputs["text"][1]["more"], X[1:3] + 2)
    assert part.inputs["text"][1]["name"] == "a word"
    assert [name for name, _ in tensors_in(batch.inputs)] == [
        "inputs.image",
        "inputs.text.0",
        "inputs.text.1.more",
    ]


def test_a_batch_that_is_there_already_is_not_copied():
    batch = Batch({"a": X}, Y)
    assert batch.to(torch.device("cpu")) is batch
    assert batch.to(torch.device("meta")).inputs["a"].device.type == "meta"


@pytest.mark.parametrize(("mask", "got"), [(MASK.long(), "torch.int64"), ([True] * 4, "list")])
def test_a_mask_that_is_not_bool_is_refused(mask, got):
    with pytest.raises(DataError, match=rf"mask is {got}; expected torch\.bool.*mask\.bool\(\)"):
        Batch(X, Y, mask=mask)


def test_inputs_without_a_tensor_have_no_rows():
    with pytest.raises(DataError, match=r"inputs are dict without a tensor"):
        len(Batch({"name": "a word"}))


def test_labels_come_in_two_forms():
    assert [Batch(X).has_labels, Batch(X, Y).has_labels, Batch(X, probabilities=X).has_labels] == [
        False,
        True,
        True,
    ]
