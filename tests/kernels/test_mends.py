"""Wrong numbers that nothing reported: columns that are dropped, counts that change, labels that are infinite."""

import pytest
import torch
from cases import exact, logits, relative

from stillhouse.kernels import distillation_loss, linear_distillation_loss, linear_softmax_kl, softmax_kl


def test_what_a_forward_kl_drops_does_not_scale_what_it_keeps():
    student, teacher = logits(16, 1000, 1), logits(16, 1010, 2).double()
    teacher[:, 1005] = 1e8
    leaf = student.clone().requires_grad_()
    loss = softmax_kl(leaf, teacher, backend="numba")
    rows, gradient = exact(student, teacher[:, :1000])
    assert relative(loss.detach(), rows.mean()) <= 2e-6
    assert relative(torch.autograd.grad(loss, leaf)[0], gradient) <= 2e-6


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])  # of which the last are made again
@pytest.mark.parametrize("layer", [False, True])
def test_a_count_that_changes_before_backward(layer, weights):
    """As that of a step which is reused for the next one."""
    student, teacher, labels = logits(64, 200, 1, dtype=torch.float16), logits(64, 200, 2), torch.arange(64)
    gradients = []
    for later in (64, 640):
        leaf, counts = student.clone().requires_grad_(), [torch.tensor(64), torch.tensor(64)]
        settings = {"count": counts[0], "label_count": counts[1], "backend": "numba", "weights": (1.0, 0.0)}
        if layer:
            eye = torch.eye(200, dtype=torch.float16)
            terms = linear_distillation_loss(leaf, eye, teacher.half(), labels, **settings)
        else:
            terms = distillation_loss(leaf, teacher.half(), labels, **settings)
        for count in counts:
            count.fill_(later)
        loss = weights[0] * terms.soft + weights[1] * terms.label
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert gradients[0].any()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("layer", [False, True])
def test_a_divergence_alone_whose_count_changes_before_backward(layer):
    student, teacher = logits(64, 200, 1, dtype=torch.float16), logits(64, 200, 2).half()
    gradients = []
    for later in (64, 640):
        leaf, count = student.clone().requires_grad_(), torch.tensor(64)
        settings = {"count": count, "backend": "numba"}
        if layer:
            loss = linear_softmax_kl(leaf, torch.eye(200, dtype=torch.float16), teacher, **settings)
        else:
            loss = softmax_kl(leaf, teacher, **settings)
        count.fill_(later)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_an_infinite_probability_of_a_label(backend):
    student, teacher, labels = logits(64, 200, 1), logits(64, 200, 2), torch.rand(64, 200)
    labels[7, 3] = torch.inf
    with pytest.raises(ValueError, match=r"labels: got .*\+inf in row 7"):
        distillation_loss(student, teacher, labels, backend=backend)
    mask = torch.arange(64) != 7
    student[5, 4] = -torch.inf  # which is no error: the label is finite, and what it rules out costs +inf
    assert distillation_loss(student, teacher, labels, mask=mask, backend=backend).label == torch.inf


@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_what_nothing_is_divided_by_is_zero_also_where_a_row_is_infinite(count):
    student, teacher, labels = logits(8, 200, 1), logits(8, 200, 2), torch.arange(8)
    student[3, 3] = -torch.inf
    settings = {"count": count, "label_count": count, "backend": "torch"}
    layer = torch.zeros(200, 200), teacher, labels
    terms = linear_distillation_loss(torch.zeros(8, 200), *layer, bias=student[3], **settings)
    assert terms.soft == terms.label == 0
    alone = linear_softmax_kl(torch.zeros(8, 200), *layer[:2], bias=student[3], count=count, backend="torch")
    assert alone == 0


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 1.0), (1e-6, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("counts", [(1, 10**6), (10**6, 1), (64, 64), (10**6, 10**6)])
def test_a_float16_gradient_of_terms_with_counts_of_their_own(counts, weights, as_tensor):
    student, teacher = logits(64, 200, 1, dtype=torch.float16), logits(64, 200, 2, dtype=torch.float16)
    labels, leaves = torch.arange(64), [student.double().requires_grad_(), student.clone().requires_grad_()]
    given = [torch.tensor(count) if as_tensor else count for count in counts]
    for leaf, backend in zip(leaves, ("torch", "numba"), strict=True):
        terms = distillation_loss(
            leaf, teacher, labels, weights=weights, count=given[0], label_count=given[1], backend=backend
        )
        loss = weights[0] * terms.soft + weights[1] * terms.label
        size = max(weight / count for weight, count in zip(weights, counts, strict=True))
        (loss / size).backward()  # as a loss scaler lifts it
    expected, got = (leaf.grad for leaf in leaves)
    assert relative(got, expected) <= 2e-3


def test_the_largest_float16_gradient_of_a_term_is_one_that_a_layer_can_multiply():
    for temperature in (1.0, 100.0):
        student, teacher = torch.zeros(4, 200), torch.zeros(4, 200)
        student[:, 0] = teacher[:, 1] = 6e4
        leaf = student.half().requires_grad_()
        terms = distillation_loss(
            leaf,
            teacher.half(),
            torch.arange(4),
            temperature=temperature,
            count=1,
            label_count=10**6,
            backend="numba",
        )
        (terms.soft + terms.label).backward()
        assert leaf.grad.isfinite().all()
