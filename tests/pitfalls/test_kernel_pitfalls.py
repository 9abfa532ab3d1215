"""Silent errors of other distillation software (docs/pitfalls): rows 2 to 7 and 11, ruled out."""

import pytest
import torch
from torch.nn.functional import kl_div

from stillhouse.kernels import Sampled, TeacherHead, TopK, linear_softmax_kl, reference, softmax_kl

DIVERGENCES = ("forward", "reverse", "jsd")
BACKENDS = ("numba", "torch")


def logits(rows, width, seed, scale=3.0):
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def loss_and_gradient(student, target, **settings):
    leaf = student.clone().requires_grad_()
    loss = softmax_kl(leaf, target, **settings)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_row_2_every_path_trains_the_objective_of_the_reference(divergence, temperature):
    hidden, weight, teacher = logits(12, 8, 1, 1.0), logits(30, 8, 2, 1.0), logits(12, 30, 3)
    mask = torch.arange(12) % 4 != 0
    settings = {"temperature": temperature, "divergence": divergence, "beta": 0.3, "mask": mask}
    student = hidden @ weight.t()
    exact = student.double().requires_grad_()
    rows = reference.softmax_kl_rows(exact, teacher.double(), temperature, divergence, 0.3, mask)
    expected = rows.sum() / mask.sum()
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    for backend in BACKENDS:
        for target in (teacher, TopK.from_logits(teacher, 30, temperature=temperature)):
            loss, gradient = loss_and_gradient(student, target, backend=backend, **settings)
            assert torch.allclose(loss.double(), expected, rtol=1e-5)
            assert torch.allclose(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-7)
    identity = TeacherHead(teacher, torch.eye(30))
    for target in (teacher, identity):
        leaf = hidden.clone().requires_grad_()
        loss = linear_softmax_kl(leaf, weight, target, **settings)
        assert torch.allclose(loss.double(), expected, rtol=1e-5)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert torch.allclose(gradient.double(), expected_gradient @ weight.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_3_the_gradient_keeps_its_scale_at_any_temperature(backend, divergence):
    student, teacher = (
        logits(64, 10, 1, 0.1),
        logits(64, 10, 2, 0.1),
    )  # small logits: softmax is linear in them
    norms = [
        loss_and_gradient(student, teacher, temperature=t, divergence=divergence, backend=backend)[1].norm()
        for t in (1.0, 8.0)
    ]
    assert 0.9 < norms[1] / norms[0] < 1.1


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dense", "top-k", "linear"])
def test_row_4_masked_rows_reach_nothing_whatever_they_hold(kind, backend, divergence):
    student, teacher = logits(6, 20, 1), logits(6, 20, 2)
    mask = torch.tensor([True, False, True, False, True, False])
    kept = {"divergence": divergence, "backend": backend}
    target = TopK.from_logits(teacher, 4) if kind == "top-k" else teacher
    clean = TopK(target.indices[mask], target.log_probs[mask]) if kind == "top-k" else teacher[mask]
    expected, expected_gradient = loss_and_gradient(student[mask], clean, **kept)
    for poison in (torch.inf, -torch.inf, torch.nan):
        dirty = student.clone()
        dirty[~mask] = poison
        if kind == "top-k":
            values, indices = target.log_probs.clone(), target.indices.clone()
            values[~mask], indices[~mask] = poison, -100
            spoilt = TopK(indices, values)
        else:
            spoilt = teacher.clone()
            spoilt[~mask] = poison
        if kind == "linear":
            leaf = dirty.clone().requires_grad_()
            loss = linear_softmax_kl(
                torch.where(mask[:, None], leaf, leaf.detach()), torch.eye(20), spoilt, mask=mask, **kept
            )
        else:
            leaf = dirty.clone().requires_grad_()
            loss = softmax_kl(leaf, spoilt, mask=mask, **kept)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert torch.allclose(loss, expected, rtol=1e-6)
        if kind != "linear":  # there a product of zero and NaN in the layer itself is outside of the loss
            assert (gradient[~mask] == 0).all()
        assert torch.allclose(gradient[mask], expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_4_all_rows_masked_is_a_defined_zero(backend):
    student = torch.full((3, 5), torch.nan)
    loss, gradient = loss_and_gradient(student, student.clone(), mask=torch.zeros(3).bool(), backend=backend)
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
def test_row_5_extreme_logits_give_finite_numbers(temperature, backend, divergence):
    one_hot = torch.full((1, 50), -1e4)
    one_hot[0, 3] = 1e4
    other = one_hot.roll(1, 1)
    banned = logits(1, 50, 1)
    banned[0, 10:] = -torch.inf
    cases = [
        (one_hot, one_hot),
        (one_hot, other),
        (banned, banned),
        (logits(1, 50, 2) * 1e3, logits(1, 50, 3) * 1e3),
    ]
    for student, teacher in cases:
        loss, gradient = loss_and_gradient(
            student, teacher, temperature=temperature, divergence=divergence, backend=backend
        )
        assert loss.isfinite()
        assert gradient.isfinite().all()
        if student is teacher:
            assert loss == 0
            assert gradient.abs().max() <= 1e-7 * temperature


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_6_top_k_is_a_divergence_and_a_lower_bound(backend, divergence):
    student, teacher = logits(16, 200, 1), logits(16, 200, 2)
    settings = {"temperature": 2.0, "divergence": divergence, "reduction": "none", "backend": backend}
    dense = softmax_kl(student, teacher, **settings)
    last = torch.zeros(16)
    # Not k = 199: the ghost of one unlikely entry is 1 - sum of float32 numbers, that is, mostly their rounding.
    for k in (1, 5, 50, 200):
        rows = softmax_kl(student, TopK.from_logits(teacher, k, temperature=2.0), **settings)
        assert (rows >= last - 1e-4).all()  # a finer partition tells more apart
        assert (rows <= dense * (1 + 1e-5) + 1e-5).all()
        last = rows
    assert torch.allclose(last, dense, rtol=1e-5)
    same = softmax_kl(teacher, TopK.from_logits(teacher, 5, temperature=2.0), **settings)
    assert same.abs().max() <= 1e-5
    assert (same >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_6_samples_do_not_truncate(backend):
    """Every entry of the teacher pulls, in proportion to its probability: not only the likeliest ones."""
    teacher = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, -1)
    sample = Sampled.from_logits(teacher, 2, generator=torch.Generator().manual_seed(0))
    _, gradient = loss_and_gradient(torch.zeros(4000, 4), sample, backend=backend)
    assert torch.allclose(gradient.sum(0), 0.25 - teacher[0].softmax(-1), atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("student_width", "teacher_width"), [(152_064, 151_936), (151_936, 152_064)])
def test_row_7_a_padded_vocabulary(student_width, teacher_width, divergence, backend):
    student, teacher = logits(2, student_width, 1), logits(2, teacher_width, 2)
    shared = min(student_width, teacher_width)
    loss, gradient = loss_and_gradient(student, teacher, divergence=divergence, backend=backend)
    s = student if divergence != "reverse" else student[:, :shared]
    t = teacher if divergence != "forward" else teacher[:, :shared]

    def padded(x):
        return torch.nn.functional.pad(
            x.double().log_softmax(-1), (0, 152_064 - x.shape[1]), value=-torch.inf
        )

    log_s, log_t = padded(s), padded(t)
    log_m = ((log_s.exp() + log_t.exp()) / 2).log()

    def kl(log_p, log_q):
        some = log_p.exp() > 0
        return (
            kl_div(
                torch.where(some, log_q, 0), torch.where(some, log_p, 0), log_target=True, reduction="none"
            )
            .where(some, 0)
            .sum(-1)
        )

    rows = {
        "forward": kl(log_t, log_s),
        "reverse": kl(log_s, log_t),
        "jsd": (kl(log_t, log_m) + kl(log_s, log_m)) / 2,
    }
    assert torch.allclose(loss.double(), rows[divergence].mean(), rtol=1e-5)
    assert gradient.shape == student.shape
    extra = gradient[:, shared:]
    if student_width > teacher_width:  # entries that the teacher lacks lose mass, or are left alone
        assert (extra == 0).all() if divergence == "reverse" else (extra > 0).any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [10, 1000, 50_257])
def test_row_11_bfloat16_gradients_within_one_percent(width, backend, divergence):
    student, teacher = logits(4, width, 1).bfloat16(), logits(4, width, 2).bfloat16()
    exact = student.double().requires_grad_()
    rows = reference.softmax_kl_rows(exact, teacher.double(), 2.0, divergence, 0.5)
    (expected,) = torch.autograd.grad(rows.mean(), exact)
    _, gradient = loss_and_gradient(student, teacher, temperature=2.0, divergence=divergence, backend=backend)
    assert gradient.dtype == torch.bfloat16
    assert (gradient.double() - expected).norm() / expected.norm() <= 1e-2
