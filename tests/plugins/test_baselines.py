"""Hard labels and KD against torch's own functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import toys

from stillhouse.api import IGNORE, KINDS, Batch, StepInfo, StudentOut, Targets
from stillhouse.training.labels import keep
from stillhouse_baselines.hard_labels import HardLabels
from stillhouse_baselines.kd import KD, KDConfig


def total(method, student, labels, teacher=None, mask=None):
    rows = len(student) if mask is None else float(mask.sum())
    known = (
        0
        if labels is None
        else float(((labels != IGNORE) if mask is None else (labels != IGNORE) & mask).sum())
    )
    step = StepInfo(rows=rows, labelled=known)
    terms = method.loss_terms(
        StudentOut(student), Targets(labels, teacher), Batch(student, labels, mask=mask), step
    )
    return sum(term.weight * term.value for term in terms.values())


def given(rows: int = 8):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.arange(rows) % 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_kd_is_the_papers_formula_in_value_and_gradient(alpha, temperature):
    student, teacher, labels = given()
    ours = total(KD(KDConfig(alpha=alpha, temperature=temperature)), student, labels, teacher)
    kl = F.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean"
    )
    theirs = alpha * temperature**2 * kl + (1 - alpha) * F.cross_entropy(student.float(), labels)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-7)
    grads = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_kd_with_a_one_hot_teacher_is_cross_entropy():
    student, _, labels = given()
    sure = torch.where(F.one_hot(labels, 5).bool(), 0.0, -torch.inf).double()
    ours = total(KD(KDConfig(alpha=1.0, temperature=1.0)), student, labels, sure)
    torch.testing.assert_close(ours, F.cross_entropy(student, labels), rtol=1e-9, atol=0)


def test_kd_gives_rows_without_a_label_the_teacher_alone():
    student, teacher, labels = given()
    labels[2:5] = IGNORE
    ours = total(KD(KDConfig(alpha=0.5, temperature=2.0)), student, labels, teacher)
    kl = 4 * F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
    known = labels != IGNORE
    expected = 0.5 * kl + 0.5 * F.cross_entropy(student[known], labels[known])
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-7)


def test_kd_needs_no_labels_and_no_cross_entropy_where_alpha_is_one():
    student, teacher, labels = given()
    method = KD(KDConfig(alpha=1.0))
    assert torch.equal(total(method, student, None, teacher), total(method, student, labels, teacher))


def test_kd_counts_masked_rows_nowhere():
    student, teacher, labels = given()
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).bool()
    ours = total(KD(), student, labels, teacher, mask)
    expected = total(KD(), student[mask], labels[mask], teacher[mask])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_hard_labels_is_cross_entropy():
    student, _, labels = given()
    torch.testing.assert_close(
        total(HardLabels(), student, labels).double(), F.cross_entropy(student, labels)
    )


def test_hard_labels_calls_no_teacher_and_has_no_temperature():
    loop = toys.loop("hard_labels", teacher=toys.net(16, seed=2))
    loop.run()
    assert loop.step.teacher_calls == 0
    assert list(HardLabels.Config.model_fields) == []


def test_hard_labels_takes_float_targets_for_a_regression():
    student = torch.randn(8, 1)
    labels = torch.randn(8)
    info = StepInfo(rows=8, labelled=8, kind=KINDS["regression"])
    made = HardLabels().loss_terms(StudentOut(student), Targets(labels), Batch(student, labels), info)
    got = made["ce"].value
    torch.testing.assert_close(got, F.mse_loss(student[:, 0], labels))


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"alpha": 1.5}, {"T": 3}])
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        KDConfig(**settings)


@pytest.mark.parametrize("cache", [True, False])
def test_kept_teacher_outputs_change_nothing_that_matters(cache):
    loops = [toys.loop("kd", keep=keep if kept else None, steps=40) for kept in (True, False)]
    for loop in loops:
        loop.run()
    for mine, its in zip(loops[0].model.parameters(), loops[1].model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    assert loops[0].step.teacher_calls < 10 < 40 <= loops[1].step.teacher_calls


def test_kd_distils():
    teacher, student = toys.net(32, seed=2), toys.net(16, seed=1)
    data = toys.splits(train=200)

    def disagreement():
        x = data.test.inputs
        return (teacher(x).argmax(-1) != student(x).argmax(-1)).float().mean()

    before = disagreement()
    toys.loop(
        {"name": "kd", "alpha": 1.0},
        teacher=teacher,
        student=student,
        data=data,
        steps=300,
        optimizer={"lr": 1e-2},
    ).run()
    assert disagreement() < before


def test_kd_of_several_labels_at_once_is_that_of_each_classs_yes_and_no():
    student, teacher, labels = given()
    flags = F.one_hot(labels, 5).double()
    info = StepInfo(rows=8, labelled=8, kind=KINDS["multi_label"])
    made = KD(KDConfig(temperature=2.0, alpha=0.3)).loss_terms(
        StudentOut(student), Targets(flags, teacher), Batch(student, flags), info
    )
    p, q = (teacher / 2).sigmoid(), (student / 2).sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(made["kl"].value.double(), 4 * kl.mean(), rtol=1e-5, atol=1e-7)
    bce = F.binary_cross_entropy_with_logits(student, flags)
    torch.testing.assert_close(made["ce"].value.double(), bce, rtol=1e-5, atol=1e-7)
    assert (made["kl"].weight, made["ce"].weight) == (0.3, 0.7)


def test_different_numbers_of_outputs_train():
    student = toys.net(outputs=9)
    before = toys.weights(student)
    loop = toys.loop("kd", student=student)
    loop.run()
    assert loop.step.run.chosen["outputs"]["value"] == "4 shared"
    assert not toys.same_bits(before, student)
