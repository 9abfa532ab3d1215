"""Batches: rows, labelled rows, parts."""

from __future__ import annotations

import pytest
import torch

from stillhouse.contract.batch import IGNORE, Batch
from stillhouse.contract.outputs import Targets
from stillhouse.errors import ConfigError
from stillhouse.kernels import TopK

X = torch.arange(12.0).reshape(4, 3)
Y = torch.tensor([0, 1, IGNORE, 1])
MASK = torch.tensor([True, False, True, True])


@pytest.mark.parametrize(
    ("batch", "rows", "labelled"),
    [
        (Batch(X), 4, 0),
        (Batch(X, Y), 4, 3),
        (Batch(X, Y, mask=MASK), 3, 2),
        (Batch(X, torch.randn(4, 2)), 4, 4),
        (Batch(X, torch.randn(4), mask=MASK), 3, 3),
        (Batch({"ids": X}, torch.zeros(4, 5, dtype=torch.long)), 20, 20),
        (Batch(X, mask=torch.zeros(4, dtype=torch.bool)), 0, 0),
    ],
)
def test_rows_are_what_a_mean_divides_by(batch, rows, labelled):
    assert (batch.rows, batch.labelled, len(batch)) == (rows, labelled, 4)


def test_a_part_is_a_part_of_everything():
    batch = Batch({"a": X, "b": X + 1}, Y, torch.arange(4), X * 2, MASK, {"task": torch.arange(4)})
    part = batch.part(slice(1, 3))
    assert torch.equal(part.inputs["b"], X[1:3] + 1)
    assert torch.equal(part.labels, Y[1:3])
    assert part.ids.tolist() == [1, 2]
    assert torch.equal(part.for_teacher, X[1:3] * 2)
    assert part.mask.tolist() == [False, True]
    assert part.extra["task"].tolist() == [1, 2]
    assert batch.part(slice(0, 2)).rows + batch.part(slice(2, 4)).rows == batch.rows


def test_the_teacher_reads_the_students_inputs_unless_it_has_its_own():
    assert Batch(X).for_teacher is X
    assert Batch(X, teacher_inputs=X * 2).for_teacher is not X


def test_dense_logits_are_asked_for_by_name():
    kept = TopK.from_logits(torch.randn(4, 10), 3)
    with pytest.raises(ConfigError, match=r"got TopK for the teacher's logits; expected a dense tensor"):
        Targets(soft=kept).dense
