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
