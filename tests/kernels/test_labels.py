"""The label term beside a divergence, every form against the specification in float64, in value and gradient."""

import pytest
import torch
from cases import DIVERGENCES, exact, logits, relative
from torch.nn.functional import cross_entropy

from stillhouse.kernels import (
    Sampled,
    TeacherHead,
    TopK,
    distillation_loss,
    linear_distillation_loss,
    reference,
    softmax_kl,
)
from stillhouse.kernels.targets import Labels

ROWS = 48
WEIGHTS = (0.7, 0.3)


def target_of(kind, teacher, temperature):
    if kind == "ghost":
        return TopK.from_logits(teacher, min(16, teacher.shape[1]), temperature=temperature)
    if kind == "renormalise":
        return TopK.from_logits(teacher, min(16, teacher.shape[1]), rest="renormalise")
    if kind == "sampled":
        generator = torch.Generator().manual_seed(0)
        return Sampled.from_logits(teacher, 16, temperature=temperature, generator=generator)
    return teacher


def labels_of(kind, rows, width, seed=3):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(width, (rows,), generator=generator)
    if kind == "hard":
        indices[::5] = -100
        return indices
    soft = torch.rand(rows, width, generator=generator).pow(8)
    soft = soft / soft.sum(-1, keepdim=True)
    soft[3] = 0  # a row without label
    return soft


def two_terms(student, target, labels, *, weights=WEIGHTS, smoothing=0.0, mask=None, **settings):
    """(Soft term, label term, gradient of their weighted sum), all in float64 by the specification."""
    soft_rows, soft_gradient = exact(student, target, mask=mask, **settings)
    s = student.double().requires_grad_()
    y = (
        Labels(None, labels.double(), smoothing)
        if labels.is_floating_point()
        else Labels(labels, None, smoothing)
    )
    rows = reference.label_rows(s, y, mask)
    has = y.present() if mask is None else y.present() & mask
    label = rows.sum() / has.sum()
    (gradient,) = torch.autograd.grad(label, s)
    count = ROWS if mask is None else int(mask.sum())
    return soft_rows.sum() / count, label.detach(), weights[0] * soft_gradient + weights[1] * gradient


def fused(student, target, labels, *, weights=WEIGHTS, smoothing=0.0, **settings):
    s = student.detach().clone().requires_grad_()
    settings = {"backend": "numba", **settings}
    soft, label = distillation_loss(s, target, labels, weights=weights, label_smoothing=smoothing, **settings)
    (gradient,) = torch.autograd.grad(weights[0] * soft + weights[1] * label, s)
    return soft.detach(), label.detach(), gradient


def agree(got, expected, value=1e-6, gradient=1e-6):
    assert abs(got[0].double() - expected[0]) <= value * max(abs(expected[0]), 1e-9)
    assert abs(got[1].double() - expected[1]) <= value * max(abs(expected[1]), 1e-9)
    assert relative(got[2], expected[2]) <= gradient


def test_the_specification_is_torchs_cross_entropy():
    student = logits(ROWS, 30, 1, dtype=torch.float64).requires_grad_()
    for kind in ("hard", "soft"):
        for smoothing in (0.0, 0.2):
            labels = labels_of(kind, ROWS, 30)
            labels = labels if kind == "hard" else labels.double()
            y = Labels(labels, None, smoothing) if kind == "hard" else Labels(None, labels, smoothing)
            rows = reference.label_rows(student, y)
            expected = cross_entropy(student, labels, reduction="none", label_smoothing=smoothing)
            expected = torch.where(y.present(), expected, 0)  # torch smooths a row of zeros
            assert torch.allclose(rows, expected, rtol=1e-12)
            got, wanted = (torch.autograd.grad(x.sum(), student)[0] for x in (rows, expected))
            assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("width", [2, 10, 1000, 5000])
def test_dense(width, divergence, labels, temperature):
    student, teacher, y = logits(ROWS, width, 1), logits(ROWS, width, 2), labels_of(labels, ROWS, width)
    settings = {"temperature": temperature, "divergence": divergence}
    agree(fused(student, teacher, y, **settings), two_terms(student, teacher, y, **settings))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize(
    ("kind", "divergence"),
    [("sampled", "forward"), *((k, d) for k in ("ghost", "renormalise") for d in DIVERGENCES)],
)
@pytest.mark.parametrize("width", [10, 1000, 5000])
def test_top_k_and_samples(width, kind, divergence, labels, temperature):
    student, y = logits(ROWS, width, 1), labels_of(labels, ROWS, width)
    target = target_of(kind, logits(ROWS, width, 2), temperature)
    settings = {"temperature": temperature, "divergence": divergence}
    agree(fused(student, target, y, **settings), two_terms(student, target, y, **settings))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("kind", ["dense", "ghost", "sampled"])
def test_masks_smoothing_and_what_masked_rows_hold(kind, labels, smoothing):
    student, teacher, y = logits(ROWS, 700, 1), logits(ROWS, 700, 2), labels_of(labels, ROWS, 700)
    mask = torch.arange(ROWS) % 3 != 0
    target = target_of(kind, teacher, 2.0)
    settings = {"temperature": 2.0, "mask": mask, "smoothing": smoothing}
    expected = two_terms(student, target, y, **settings)
    student[~mask] = torch.nan
    if labels == "hard":
        y[~mask] = 12345
    got = fused(student, target, y, **settings)
    assert (got[2][~mask] == 0).all()
    agree(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["dense", "ghost", "sampled"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_sixteen_bits(labels, kind, dtype):
    student, teacher = logits(ROWS, 1000, 1, dtype=dtype), logits(ROWS, 1000, 2, dtype=dtype)
    target, y = target_of(kind, teacher, 2.0), labels_of(labels, ROWS, 1000)
    expected = two_terms(student, target, y, temperature=2.0)
    agree(fused(student, target, y, temperature=2.0), expected, gradient=1e-2)


@pytest.mark.parametrize("backend", [None, "numba", "torch"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("width", "teacher_width"), [(100, 140), (140, 100)])
def test_widths_that_differ(width, teacher_width, divergence, backend):
    student, teacher = logits(ROWS, width, 1), logits(ROWS, teacher_width, 2)
    y = labels_of("hard", ROWS, width)
    settings = {"temperature": 2.0, "divergence": divergence}
    expected = two_terms(student, teacher, y, **settings)
    agree(fused(student, teacher, y, backend=backend, **settings), expected, gradient=3e-6)


@pytest.mark.parametrize("jump", [20, 500])
def test_a_maximum_far_into_the_row_at_a_high_temperature(jump):
    """The label term's exponentials are relative to the first columns' maximum too, and much steeper than those at T."""
    student, teacher, y = logits(ROWS, 9000, 1), logits(ROWS, 9000, 2), labels_of("hard", ROWS, 9000)
    student[:, 7000] = jump
    y[:10] = 7000
    for target in (teacher, target_of("ghost", teacher, 50.0)):
        agree(fused(student, target, y, temperature=50.0), two_terms(student, target, y, temperature=50.0))


def test_infinite_losses_are_those_of_the_rows_that_have_them():
    student, teacher = logits(3, 20, 1), logits(3, 20, 2)
    student[0, 4] = -torch.inf
    teacher[:, 4] = -torch.inf
    soft, label = distillation_loss(student, teacher, torch.tensor([4, 3, 3]))
    assert soft.isfinite()
    assert label == torch.inf
    teacher = logits(3, 20, 2)
    teacher[1, 7] = -torch.inf  # reverse is infinite there, and its gradient 0: the label's is as without
    student = logits(3, 20, 1).requires_grad_()
    missing = TopK(torch.tensor([[0], [7], [2]]), torch.tensor([[-1.0], [-torch.inf], [-1.0]]), trusted=True)
    for target in (teacher, missing):
        terms = distillation_loss(student, target, torch.tensor([1, 2, 3]), divergence="reverse")
        assert terms.soft == torch.inf
        (gradient,) = torch.autograd.grad(terms.soft + terms.label, student)
        (expected,) = torch.autograd.grad(cross_entropy(student, torch.tensor([1, 2, 3])), student)
        assert torch.allclose(gradient[1], expected[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("inplace", [False, True])
def test_weights_other_than_those_it_was_told(inplace):
    student, teacher, y = logits(ROWS, 300, 1), logits(ROWS, 300, 2), labels_of("hard", ROWS, 300)

    def terms():
        leaf = student.clone().requires_grad_()
        settings = {"temperature": 2.0, "inplace": inplace, "backend": "numba"}
        return leaf, distillation_loss(leaf * 1.0, teacher, y, weights=WEIGHTS, **settings)

    expected = two_terms(student, teacher, y, temperature=2.0)[2]
    leaf, (soft, label) = terms()
    (gradient,) = torch.autograd.grad(3 * (WEIGHTS[0] * soft + WEIGHTS[1] * label), leaf)
    assert relative(gradient, 3 * expected) <= 1e-6
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.7), (-1.0, 2.0)):
        leaf, (soft, label) = terms()
        if inplace:
            with pytest.raises(RuntimeError, match="weights="):
                torch.autograd.grad(weights[0] * soft + weights[1] * label, leaf)
            continue
        (gradient,) = torch.autograd.grad(weights[0] * soft + weights[1] * label, leaf)
        assert relative(gradient, two_terms(student, teacher, y, temperature=2.0, weights=weights)[2]) <= 1e-6
    if not inplace:
        leaf, (soft, label) = terms()
        (alone,) = torch.autograd.grad(soft, leaf, retain_graph=True)
        assert relative(alone, two_terms(student, teacher, y, temperature=2.0, weights=(1, 0))[2]) <= 1e-6
        (alone,) = torch.autograd.grad(label, leaf)
        assert relative(alone, two_terms(student, teacher, y, temperature=2.0, weights=(0, 1))[2]) <= 1e-6


@pytest.mark.parametrize("backend", [None, "numba", "torch"])
def test_each_term_has_a_divisor_of_its_own(backend):
    student, teacher, y = logits(ROWS, 30, 1), logits(ROWS, 30, 2), labels_of("hard", ROWS, 30)
    whole = distillation_loss(student, teacher, y, backend=backend, count=1, label_count=1)
    for soft, label in ((5, 7), (torch.tensor(5), torch.tensor(7.0)), (0, 7), (5, 0)):
        got = distillation_loss(student, teacher, y, backend=backend, count=soft, label_count=label)
        assert torch.allclose(got.soft, whole.soft / soft if soft else torch.zeros(()))
        assert torch.allclose(got.label, whole.label / label if label else torch.zeros(()))
    without = torch.full((ROWS,), -100)
    leaf = student.clone().requires_grad_()
    soft, label = distillation_loss(leaf, teacher, without, backend=backend)
    assert label == 0
    (gradient,) = torch.autograd.grad(soft + label, leaf)
    leaf = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(softmax_kl(leaf, teacher, backend=backend), leaf)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("backend", [None, "numba"])
def test_a_float16_gradient_is_divided_after_the_loss_was_scaled(backend):
    student, teacher = logits(4, 10, 1, dtype=torch.float16), logits(4, 10, 2, dtype=torch.float16)
    leaf, y = student.clone().requires_grad_(), torch.tensor([1, -100, 3, 4])
    soft, label = distillation_loss(leaf, teacher, y, count=1e6, label_count=3e6, backend=backend)
    (gradient,) = torch.autograd.grad((soft + label) * 2.0**16, leaf)
    s = student.double().requires_grad_()
    rows = reference.softmax_kl_rows(s, teacher.double(), 1.0, "forward", 0.5).sum() / 1e6
    rows = rows + reference.label_rows(s, Labels(y, None, 0.0)).sum() / 3e6
    (expected,) = torch.autograd.grad(rows * 2.0**16, s)
    assert relative(gradient, expected) <= 1e-3


@pytest.mark.parametrize("asked", [(0.5, 0.5), (0.25, 0.75)], ids=["as declared", "another sum"])
@pytest.mark.parametrize("form", ["default counts", "counts of the step", "linear", "linear by torch"])
def test_few_labels_among_many_rows_overflow_no_float16(form, asked):
    """Lifted by the rows' count, what is divided by that of the labels would be more than float16 holds."""
    rows, width, scale = (140_000, 10, 256.0) if form == "default counts" else (16, 1000, 256.0)
    student, teacher = (
        logits(rows, width, 1, dtype=torch.float16),
        logits(rows, width, 2, dtype=torch.float16),
    )
    y = torch.full((rows,), -100)
    y[7] = 3
    counts = {} if form == "default counts" else {"count": 1e6, "label_count": 1}
    settings = {"temperature": 2.0, "weights": (0.5, 0.5), **counts}
    if form.startswith("linear"):
        hidden, weight = logits(rows, 32, 3, 1.0, torch.float16), logits(width, 32, 4, 0.2, torch.float16)
        leaves = [x.requires_grad_() for x in (hidden, weight)]
        backend = "torch" if "torch" in form else "numba"
        soft, label = linear_distillation_loss(*leaves, teacher, y, backend=backend, **settings)
        wide = [x.detach().double().requires_grad_() for x in leaves]
        s = wide[0] @ wide[1].t()
    else:
        leaves = [student.requires_grad_()]
        soft, label = distillation_loss(*leaves, teacher, y, backend="numba", **settings)
        s = student.detach().double().requires_grad_()
        wide = [s]
    got = torch.autograd.grad((asked[0] * soft + asked[1] * label) * scale, leaves)
    of_rows = reference.softmax_kl_rows(s, teacher.double(), 2.0, "forward", 0.5).sum()
    of_label = reference.label_rows(s, Labels(y, None, 0.0)).sum()
    exact = asked[0] * of_rows / counts.get("count", rows) + asked[1] * of_label
    for one, expected in zip(got, torch.autograd.grad(exact * scale, wide), strict=True):
        assert relative(one, expected) <= 3e-3


@pytest.mark.parametrize("kind", ["dense", "ghost"])
def test_in_place_and_fresh_are_the_same_bits_with_any_number_of_threads(kind):
    student, teacher, y = logits(64, 3000, 1), logits(64, 3000, 2), labels_of("hard", 64, 3000)
    target, before, results = target_of(kind, teacher, 4.0), torch.get_num_threads(), []
    try:
        for threads, inplace in ((1, False), (2, False), (3, True)):
            torch.set_num_threads(threads)
            leaf = student.clone().requires_grad_()
            soft, label = distillation_loss(leaf * 1.0, target, y, temperature=4.0, inplace=inplace)
            results.append((soft, label, torch.autograd.grad(soft + label, leaf)[0]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


BAD = [
    ({"labels": torch.tensor([0, 10])}, "labels: got 10 in row 1"),
    ({"labels": torch.tensor([0, -1])}, "labels: got -1 in row 1"),
    ({"labels": torch.tensor([0])}, "labels shape"),
    ({"labels": torch.zeros(2, 9)}, "labels shape"),
    ({"labels": torch.tensor([0, 1], dtype=torch.int32)}, "labels dtype"),
    ({"labels": -torch.ones(2, 10)}, "negative probability"),
    ({"labels": torch.full((2, 10), torch.nan)}, "negative probability, NaN"),
    ({"labels": torch.full((2, 10), torch.inf)}, r"NaN or \+inf in row 0; expected finite"),
    ({"label_smoothing": 1.0}, "label_smoothing"),
    ({"weights": (1.0, -1.0)}, "weights"),
    ({"weights": 0.5}, "weights"),
    ({"label_count": -1}, "^label_count: got -1"),
    ({"label_count": torch.tensor([1, 2])}, "^label_count: got shape"),
    ({"count": -1}, "^count: got -1"),
]


@pytest.mark.parametrize("backend", [None, "numba", "torch"])
@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_labels_are_refused(settings, message, backend):
    settings = {"labels": torch.tensor([0, 1]), **settings}
    with pytest.raises(ValueError, match=message):
        distillation_loss(logits(2, 10, 1), logits(2, 10, 2), backend=backend, **settings)


@pytest.mark.parametrize("backend", ["numba"])
def test_a_second_derivative_is_refused(backend):
    leaf = logits(3, 9, 1).requires_grad_()
    soft, label = distillation_loss(leaf * 1.0, logits(3, 9, 2), torch.tensor([1, 2, 3]), backend=backend)
    (gradient,) = torch.autograd.grad(soft + label, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(gradient.sum(), leaf)


def layer_of(rows, width, dtype=torch.float32):
    hidden = logits(rows, 20, 4, scale=1.0).to(dtype).requires_grad_()
    weight = logits(width, 20, 5, scale=0.7).to(dtype).requires_grad_()
    return hidden, weight, logits(1, width, 6)[0].to(dtype).requires_grad_()


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("kind", ["dense", "head", "ghost", "renormalise", "sampled"])
@pytest.mark.parametrize("weights", [WEIGHTS, (0.2, 0.9), (0.0, 1.0)])
def test_the_layer_before_it(weights, kind, labels, backend, monkeypatch):
    """Made for WEIGHTS, in chunks of a few rows, and differentiated with the weights given."""
    from stillhouse.kernels import chunks

    monkeypatch.setattr(chunks, "CHUNK", 900 * 7)
    hidden, weight, bias = layer_of(ROWS, 900)
    teacher = logits(ROWS, 900, 2)
    target = target_of(kind, teacher, 2.0)
    if kind == "head":
        target = TeacherHead(*(x.detach() for x in layer_of(ROWS, 900)))
        target = TeacherHead(target.hidden * 1.3, target.weight, target.bias)
        teacher = target.hidden @ target.weight.T + target.bias
    mask = torch.arange(ROWS) % 5 != 1
    y = labels_of(labels, ROWS, 900)
    divergence = "reverse" if kind == "renormalise" else "forward"
    settings = {"temperature": 2.0, "mask": mask, "divergence": divergence}
    soft, label = linear_distillation_loss(
        hidden,
        weight,
        target,
        y,
        bias=bias,
        weights=WEIGHTS,
        label_smoothing=0.1,
        backend=backend,
        **settings,
    )
    got = torch.autograd.grad(weights[0] * soft + weights[1] * label, (hidden, weight, bias))
    out = (hidden @ weight.T + bias).detach()
    against = teacher if kind == "head" else target
    expected = two_terms(out, against, y, weights=weights, smoothing=0.1, **settings)
    agree((soft.detach(), label.detach(), got[0]), (*expected[:2], expected[2] @ weight.double()), 3e-6, 3e-6)
    assert relative(got[1], expected[2].T @ hidden.double()) <= 3e-6
    assert relative(got[2], expected[2].sum(0)) <= 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_layer_before_it_in_sixteen_bits(dtype):
    hidden, weight, _ = layer_of(ROWS, 900, dtype)
    teacher, y = logits(ROWS, 900, 2, dtype=dtype), labels_of("hard", ROWS, 900)
    soft, label = linear_distillation_loss(hidden, weight, teacher, y, weights=WEIGHTS, temperature=2.0)
    (got,) = torch.autograd.grad((WEIGHTS[0] * soft + WEIGHTS[1] * label) * 1024, weight)
    out = (hidden @ weight.T).detach()
    expected = two_terms(out, teacher, y, temperature=2.0)
    assert relative(got, 1024 * expected[2].T @ hidden.double()) <= 1e-2


@pytest.mark.parametrize("bad", [30, -1])
def test_bad_labels_are_refused_before_the_layer_too(bad):
    hidden, weight, _ = layer_of(4, 30)
    with pytest.raises(ValueError, match=f"labels: got {bad} in row 2"):
        linear_distillation_loss(hidden, weight, logits(4, 30, 2), torch.tensor([0, 1, bad, 2]))
