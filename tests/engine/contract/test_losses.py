"""Losses on labels: the mean over the update's rows; unlabelled and masked rows count nowhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stillhouse.api import IGNORE, StepInfo, cross_entropy, label_loss, regression_loss
from stillhouse.errors import ConfigError

NAN, INF = float("nan"), float("inf")


def logits(rows: int = 6, classes: int = 4) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(0)).requires_grad_()


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def test_is_torchs_cross_entropy_where_every_row_counts():
    given = logits()
    got = cross_entropy(given, LABELS, StepInfo(rows=6, labelled=6))
    torch.testing.assert_close(got, F.cross_entropy(given, LABELS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bad", [0.0, NAN, INF, -INF])
def test_a_row_without_a_label_gives_no_loss_and_no_gradient_whatever_it_holds(bad, masked):
    given = logits()
    with torch.no_grad():
        given[1] = bad
    labels, mask = LABELS.clone(), None
    if masked:
        mask = torch.ones(6, dtype=torch.bool)
        mask[1] = False
    else:
        labels[1] = IGNORE
    loss = cross_entropy(given, labels, StepInfo(rows=5 if masked else 6, labelled=5), mask)
    loss.backward()
    others = [0, 2, 3, 4, 5]
    torch.testing.assert_close(loss, F.cross_entropy(given[others], LABELS[others]), rtol=1e-6, atol=0)
    assert torch.equal(given.grad[1], torch.zeros(4))
    assert given.grad[others].isfinite().all()


def test_an_update_without_any_label_has_loss_zero():
    given = logits()
    loss = cross_entropy(given, torch.full((6,), IGNORE), StepInfo(rows=6, labelled=0))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(given.grad, torch.zeros(6, 4))


def test_probabilities_as_labels():
    given, soft = logits(), torch.randn(6, 4).softmax(-1)
    got = cross_entropy(given, soft, StepInfo(rows=6, labelled=6))
    torch.testing.assert_close(got, F.cross_entropy(given, soft), rtol=1e-6, atol=0)
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    got = cross_entropy(given, soft, StepInfo(rows=5, labelled=5), mask)
    torch.testing.assert_close(got, F.cross_entropy(given[mask], soft[mask]), rtol=1e-6, atol=0)


def test_sequences_are_rows():
    given = torch.randn(2, 3, 4)
    labels = torch.tensor([[0, 1, IGNORE], [3, IGNORE, IGNORE]])
    got = cross_entropy(given, labels, StepInfo(rows=6, labelled=3))
    torch.testing.assert_close(
        got, F.cross_entropy(given.reshape(-1, 4), labels.reshape(-1)), rtol=1e-6, atol=0
    )


def test_half_precision_is_accumulated_in_float32():
    given = (logits().detach() * 30).bfloat16()
    got = cross_entropy(given, LABELS, StepInfo(rows=6, labelled=6))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, F.cross_entropy(given.float(), LABELS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [None, 1, 3])
def test_regression_is_the_mean_squared_error(width):
    shape = (6,) if width is None else (6, width)
    labels = torch.randn(shape)
    outputs = torch.randn(6, width or 1)
    got = regression_loss(outputs, labels, StepInfo(rows=6, labelled=6))
    torch.testing.assert_close(got, F.mse_loss(outputs.reshape(shape), labels), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [3.0, NAN, INF])
def test_masked_rows_count_nowhere_in_a_regression(bad):
    labels, outputs = torch.randn(6), torch.randn(6, 1)
    outputs[2] = bad
    outputs.requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    got = label_loss(outputs, labels, StepInfo(rows=5, labelled=5), mask)
    got.backward()
    torch.testing.assert_close(got, F.mse_loss(outputs[mask, 0], labels[mask]), rtol=1e-6, atol=0)
    assert outputs.grad[2].item() == 0
    assert outputs.grad[mask].isfinite().all()


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ConfigError, match=r"without labels"):
        label_loss(logits(), None, StepInfo())


def test_the_loss_that_fits_the_labels_is_taken():
    given, step = logits(), StepInfo(rows=6, labelled=6)
    soft = torch.randn(6, 4).softmax(-1)
    assert torch.equal(label_loss(given, LABELS, step), cross_entropy(given, LABELS, step))
    assert torch.equal(label_loss(given, soft, step), cross_entropy(given, soft, step))
    one = logits(6, 1)
    floats = torch.randn(6, 1)
    assert torch.equal(label_loss(one, floats, step), regression_loss(one, floats, step))
