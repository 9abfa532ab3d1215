"""Which positions of a feature count, and the mean over them."""

from __future__ import annotations

import pytest
import torch

from stillhouse.api import KINDS, Batch, ConfigError, StepInfo, StudentOut, feature_mean, kept
from stillhouse.contract.features import Feature, token_mask, wide

REAL = torch.tensor([[True, True, True, False], [False, True, True, True], [True, False, False, False]])
VALUES = torch.arange(12.0).reshape(3, 4)


def feature(*shape: int, tokens: bool = True, own_rows: bool = True, role: str = "student") -> Feature:
    return Feature(role, "layer", shape, tokens, own_rows)


def batch(mask=None, attention=REAL) -> Batch:
    return Batch({"input_ids": torch.zeros(3, 4).long(), "attention_mask": attention.long()}, mask=mask)


def test_values_at_the_batchs_rows_are_averaged_over_those_that_count():
    rows = REAL.clone()
    rows[0, 0] = False
    info = StepInfo(rows=20.0, kind=KINDS["token_classification"])
    found = feature_mean(VALUES, feature(3, 4, 2), batch(rows), info)
    assert float(found) == pytest.approx(float(VALUES[rows].sum()) / 20)


def test_where_rows_are_samples_a_samples_value_is_the_mean_of_its_real_tokens():
    found = feature_mean(VALUES, feature(3, 4, 2), batch(), StepInfo(rows=3.0))
    assert float(found) == pytest.approx((1.0 + 6.0 + 8.0) / 3)


def test_a_masked_sample_counts_nowhere_whatever_it_holds():
    values = VALUES.clone()
    values[1] = torch.nan
    mask = torch.tensor([True, False, True])
    found = feature_mean(values, feature(3, 4, 2), batch(mask), StepInfo(rows=2.0))
    assert float(found) == pytest.approx((1.0 + 8.0) / 2)


def test_a_samples_value_stands_for_each_of_its_rows_where_rows_are_tokens():
    found = feature_mean(
        torch.tensor([1.0, 10.0, 100.0]), feature(3, 2, tokens=False), batch(REAL), StepInfo(rows=7.0)
    )
    assert float(found) == pytest.approx((3 * 1 + 3 * 10 + 1 * 100) / 7)


def test_an_encoders_positions_are_the_inputs_though_the_decoder_has_as_many():
    rows = torch.zeros_like(REAL)
    rows[0, 0] = rows[1, 1] = True
    encoder = feature(3, 4, 2, own_rows=False)
    found = feature_mean(VALUES, encoder, batch(rows), StepInfo(rows=2.0))
    assert float(found) == pytest.approx((1.0 + 6.0) / 2)


def test_positions_of_another_number_than_the_tokens_all_count():
    found = feature_mean(torch.tensor([[1.0, 3.0]] * 3), feature(3, 2, 5), batch(), StepInfo(rows=3.0))
    assert float(found) == pytest.approx(2.0)


def test_pooling_is_the_mean_of_the_tokens_that_count_and_flattens_the_rest():
    states = torch.arange(24.0).reshape(3, 4, 2)
    pooled = feature(3, 4, 2).pooled(states, batch())
    torch.testing.assert_close(
        pooled, torch.stack([row[real].mean(0) for row, real in zip(states, REAL, strict=True)])
    )
    assert torch.equal(feature(3, 4, 2, tokens=False).pooled(states, batch()), states.flatten(1))


def test_the_teachers_tokens_are_those_of_its_own_inputs():
    other = ~REAL
    given = Batch(batch().inputs, teacher_inputs={"attention_mask": other})
    states = torch.zeros(3, 4, 2)
    assert torch.equal(feature(3, 4, 2, role="teacher").mask(states, given), other)
    assert torch.equal(feature(3, 4, 2).mask(states, given), REAL)


def test_a_masked_samples_tokens_are_masked():
    mask = token_mask(batch().inputs, Batch(torch.zeros(3), mask=torch.tensor([True, False, True])))
    assert torch.equal(mask, REAL & torch.tensor([[True], [False], [True]]))


def test_what_does_not_count_reaches_no_gradient():
    values = torch.tensor([[1.0], [torch.inf]], requires_grad=True)
    kept(values, torch.tensor([True, False])).square().sum().backward()
    assert values.grad.tolist() == [[2.0], [0.0]]


def test_sums_are_taken_in_float32_or_float64():
    assert [wide(torch.zeros(1, dtype=d)).dtype for d in (torch.bfloat16, torch.float32, torch.float64)] == [
        torch.float32,
        torch.float32,
        torch.float64,
    ]


def test_a_feature_that_did_not_come_is_told_of():
    with pytest.raises(
        ConfigError, match=r"no feature student.layer came with this batch; expected the model to be called"
    ):
        feature(3, 2).of(StudentOut(torch.zeros(3, 2)))
