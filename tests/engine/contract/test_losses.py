"""Losses on labels: the mean over the update's rows; unlabelled and masked rows count nowhere."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from stillhouse.api import (
    IGNORE,
    KINDS,
    Batch,
    StepInfo,
    Targets,
    binary_cross_entropy,
    binary_kl,
    cross_entropy,
    label_loss,
    regression_loss,
    soft_and_label_terms,
    soft_loss,
)
from stillhouse.errors import ConfigError

NAN, INF = float("nan"), float("inf")


def logits(rows: int = 6, classes: int = 4) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(0)).requires_grad_()


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def test_is_torchs_cross_entropy_where_every_row_counts():
    given = logits()
    got = cross_entropy(given, LABELS, count=6)
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
    loss = cross_entropy(given, labels, count=5, mask=mask)
    loss.backward()
    others = [0, 2, 3, 4, 5]
    torch.testing.assert_close(loss, F.cross_entropy(given[others], LABELS[others]), rtol=1e-6, atol=0)
    assert torch.equal(given.grad[1], torch.zeros(4))
    assert given.grad[others].isfinite().all()


def test_an_update_without_any_label_has_loss_zero():
    given = logits()
    loss = cross_entropy(given, torch.full((6,), IGNORE), count=0)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(given.grad, torch.zeros(6, 4))


def test_probabilities_as_labels():
    given, soft = logits(), torch.randn(6, 4).softmax(-1)
    got = cross_entropy(given, soft, count=6)
    torch.testing.assert_close(got, F.cross_entropy(given, soft), rtol=1e-6, atol=0)
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    got = cross_entropy(given, soft, count=5, mask=mask)
    torch.testing.assert_close(got, F.cross_entropy(given[mask], soft[mask]), rtol=1e-6, atol=0)


def test_sequences_are_rows():
    given = torch.randn(2, 3, 4)
    labels = torch.tensor([[0, 1, IGNORE], [3, IGNORE, IGNORE]])
    got = cross_entropy(given, labels, count=3)
    torch.testing.assert_close(
        got, F.cross_entropy(given.reshape(-1, 4), labels.reshape(-1)), rtol=1e-6, atol=0
    )


def test_half_precision_is_accumulated_in_float32():
    given = (logits().detach() * 30).bfloat16()
    got = cross_entropy(given, LABELS, count=6)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, F.cross_entropy(given.float(), LABELS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [None, 1, 3])
def test_regression_is_the_mean_squared_error(width):
    shape = (6,) if width is None else (6, width)
    labels = torch.randn(shape)
    outputs = torch.randn(6, width or 1)
    got = regression_loss(outputs, labels, count=6)
    torch.testing.assert_close(got, F.mse_loss(outputs.reshape(shape), labels), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [3.0, NAN, INF])
def test_masked_rows_count_nowhere_in_a_regression(bad):
    labels, outputs = torch.randn(6), torch.randn(6, 1)
    outputs[2] = bad
    outputs.requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    got = regression_loss(outputs, labels, count=5, mask=mask)
    got.backward()
    torch.testing.assert_close(got, F.mse_loss(outputs[mask, 0], labels[mask]), rtol=1e-6, atol=0)
    assert outputs.grad[2].item() == 0
    assert outputs.grad[mask].isfinite().all()


def test_several_labels_at_once_are_the_mean_over_classes_and_rows():
    given, flags = logits(), torch.randint(2, (6, 4), generator=torch.Generator().manual_seed(1)).float()
    got = binary_cross_entropy(given, flags, count=6)
    torch.testing.assert_close(got, F.binary_cross_entropy_with_logits(given, flags), rtol=1e-6, atol=0)


def test_binary_kl_is_each_classs_own_yes_and_no():
    given, teacher = logits().detach().double(), torch.randn(6, 4, dtype=torch.double)
    got = binary_kl(given, teacher, temperature=3.0, count=6)
    p, q = (teacher / 3).sigmoid(), (given / 3).sigmoid()
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(got.double(), 9 * expected.mean(), rtol=1e-5, atol=0)
    assert binary_kl(given, given, temperature=3.0, count=6).item() == 0


@pytest.mark.parametrize("loss", [binary_cross_entropy, functools.partial(binary_kl, temperature=2.0)])
@pytest.mark.parametrize("bad", [3.0, NAN, INF])
def test_masked_rows_count_nowhere_where_classes_stand_alone(loss, bad):
    given, flags = logits().detach(), torch.rand(6, 4)
    given[2] = bad
    given.requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    got = loss(given, flags, count=5, mask=mask)
    got.backward()
    torch.testing.assert_close(got, loss(given[mask], flags[mask], count=5), rtol=1e-6, atol=0)
    assert torch.equal(given.grad[2], torch.zeros(4))
    assert given.grad[mask].isfinite().all()


def info(kind: str = "classification", **counts: float) -> StepInfo:
    return StepInfo(kind=KINDS[kind], **{"rows": 6, "labelled": 6, **counts})


class TestLabelLoss:
    """The loss that fits the kind, divided by the update's rows with a label."""

    batch = Batch(torch.zeros(6, 1))

    def test_a_batch_without_labels_is_refused(self):
        with pytest.raises(ConfigError, match=r"without labels"):
            label_loss(logits(), Targets(), self.batch, info())

    @pytest.mark.parametrize(
        ("kind", "loss", "labels"),
        [
            ("classification", cross_entropy, LABELS),
            ("multi_label", binary_cross_entropy, torch.eye(4)[LABELS]),
            ("regression", regression_loss, torch.randn(6, 4)),
        ],
    )
    def test_is_the_kinds(self, kind, loss, labels):
        given = logits()
        got = label_loss(given, Targets(labels), self.batch, info(kind, labelled=3, rows=5))
        assert torch.equal(got, loss(given, labels, count=3))

    def test_probabilities_take_the_place_of_labels(self):
        given, soft = logits(), torch.randn(6, 4).softmax(-1)
        got = label_loss(given, Targets(probabilities=soft), self.batch, info())
        assert torch.equal(got, cross_entropy(given, soft, count=6))

    def test_masked_rows_are_left_out(self):
        given, mask = logits(), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
        got = label_loss(given, Targets(LABELS), Batch(torch.zeros(6, 1), mask=mask), info(labelled=5))
        torch.testing.assert_close(got, F.cross_entropy(given[mask], LABELS[mask]), rtol=1e-6, atol=0)


class TestSoftLoss:
    """The loss on the teacher's outputs that fits the kind, divided by the update's rows."""

    batch = Batch(torch.zeros(6, 1))
    teacher = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))

    def test_is_kl_for_classes(self):
        given = logits()
        kl = F.kl_div((given / 2).log_softmax(-1), (self.teacher / 2).softmax(-1), reduction="sum")
        got = soft_loss(given, Targets(soft=self.teacher), self.batch, info(rows=12), temperature=2.0)
        torch.testing.assert_close(got, 4 * kl / 12, rtol=1e-5, atol=0)

    def test_is_kl_of_yes_and_no_for_flags(self):
        given = logits()
        got = soft_loss(
            given, Targets(soft=self.teacher), self.batch, info("multi_label", rows=12), temperature=2.0
        )
        assert torch.equal(got, binary_kl(given, self.teacher, temperature=2.0, count=12))

    @pytest.mark.parametrize("kind", ["regression", "embedding"])
    def test_is_the_squared_error_for_numbers(self, kind):
        given = logits()
        got = soft_loss(given, Targets(soft=self.teacher), self.batch, info(kind), temperature=9.0)
        torch.testing.assert_close(got, F.mse_loss(given, self.teacher), rtol=1e-6, atol=0)


def test_the_two_terms_of_most_methods():
    given, targets = logits(), Targets(LABELS, torch.randn(6, 4))

    def made(targets: Targets, soft: float, hard: float) -> dict[str, float]:
        terms = soft_and_label_terms(
            given,
            targets,
            Batch(torch.zeros(6, 1)),
            info(),
            temperature=2.0,
            soft_weight=soft,
            label_weight=hard,
        )
        return {name: (term.value.item(), term.weight) for name, term in terms.items()}

    kl = soft_loss(given, targets, Batch(torch.zeros(6, 1)), info(), temperature=2.0).item()
    ce = cross_entropy(given, LABELS, count=6).item()
    assert made(targets, 0.9, 0.1) == {"kl": (kl, 0.9), "ce": (ce, 0.1)}
    assert made(targets, 1.0, 0.0) == {"kl": (kl, 1.0)}
    assert made(targets, 0.0, 1.0) == {"ce": (ce, 1.0)}
    assert made(Targets(None, targets.soft), 0.9, 0.1) == {"kl": (kl, 0.9)}
