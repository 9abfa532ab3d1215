"""What holds for every divergence, for any logits."""

import torch
from cases import exact, fused, logits
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stillhouse.kernels import Sampled, TopK, softmax_kl

DIVERGENCE = st.sampled_from(("forward", "reverse", "jsd"))
TEMPERATURE = st.sampled_from((0.05, 0.5, 1.0, 4.0, 100.0))


@st.composite
def pairs(draw):
    shape = (draw(st.integers(1, 4)), draw(st.integers(2, 40)))
    value = st.floats(-20, 20, width=32)
    return tuple(torch.from_numpy(draw(arrays("float32", shape, elements=value)).copy()) for _ in range(2))


@settings(max_examples=150, deadline=None)
@given(pairs(), DIVERGENCE, TEMPERATURE)
def test_agrees_with_the_specification_and_is_not_negative(pair, divergence, temperature):
    rows, gradient = fused(*pair, divergence=divergence, temperature=temperature)
    rows_exact, gradient_exact = exact(*pair, divergence=divergence, temperature=temperature)
    assert (rows >= 0).all()
    of_loss, of_gradient = rounding(*pair, divergence, temperature)
    assert (rows - rows_exact).norm() <= 2e-6 * max(
        rows_exact.norm().item(), 1e-12 * temperature**2
    ) + of_loss.norm()
    allowed = 1e-6 * max(gradient_exact.abs().max().item(), 1e-2 * temperature) + of_gradient / len(rows)
    assert ((gradient - gradient_exact).abs() <= allowed).all()


def rounding(student, teacher, divergence, temperature):
    """What half a unit in the last place of float32, 2^-24, leaves unknown of (each loss, each entry's gradient).

    A logit less the row's maximum is known to 2^-24 of itself, and so log p is to 2^-24 |log p|: a term p phi(x) whose
    x = log(s / t) is not small, and which cannot be had from x and one side alone, changes by p times that.
    The reverse gradient is T s (x - KL): x, and a KL as large as the loss that is returned, are known to 2^-24 of
    themselves, also where their difference is nearly nothing.
    """
    unit = 2.0**-24
    log_s, log_t = (x.double().div(temperature).log_softmax(-1) for x in (student, teacher))
    s, t, x = log_s.exp(), log_t.exp(), log_s - log_t
    if divergence == "reverse":
        s, t, x, log_s, log_t = t, s, -x, log_t, log_s
    changes = unit * (s * log_s.abs() + t * (x * log_t).abs()) * (x.abs() >= 0.75)
    of_loss = temperature**2 * changes.sum(-1)
    if divergence != "reverse":
        return of_loss, torch.zeros_like(s)
    kl = (t * -x).sum(-1, keepdim=True)
    return of_loss, unit * temperature * t * (x.abs() + kl)


@settings(max_examples=60, deadline=None)
@given(pairs(), DIVERGENCE, TEMPERATURE)
def test_zero_for_equal_distributions(pair, divergence, temperature):
    rows, gradient = fused(pair[0], pair[0].clone(), divergence=divergence, temperature=temperature)
    assert rows.abs().max() <= 1e-12 * temperature**2
    assert gradient.abs().max() <= 1e-6 * temperature


@settings(max_examples=60, deadline=None)
@given(pairs(), DIVERGENCE)
def test_positive_for_distributions_that_differ(pair, divergence):
    rows, _ = fused(*pair, divergence=divergence)
    apart = (pair[0].double().softmax(-1) - pair[1].double().softmax(-1)).abs().sum(-1) > 1e-3
    assert (rows[apart] > 0).all()


@settings(max_examples=60, deadline=None)
@given(pairs(), DIVERGENCE, st.integers(-64, 64), st.integers(-64, 64))
def test_a_constant_added_to_a_row_changes_nothing(pair, divergence, one, two):
    student, teacher = (torch.round(x * 64) / 64 for x in pair)  # so that the sums are exact
    rows, gradient = fused(student, teacher, divergence=divergence)
    rows_moved, gradient_moved = fused(student + one, teacher + two, divergence=divergence)
    assert torch.allclose(rows, rows_moved, rtol=1e-6, atol=1e-9)
    assert torch.allclose(gradient, gradient_moved, rtol=1e-5, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(pairs(), DIVERGENCE, st.randoms(use_true_random=False))
def test_a_permutation_of_the_vocabulary_permutes_the_gradient(pair, divergence, random):
    order = list(range(pair[0].shape[1]))
    random.shuffle(order)
    rows, gradient = fused(*pair, divergence=divergence)
    rows_permuted, gradient_permuted = fused(*(x[:, order] for x in pair), divergence=divergence)
    assert torch.allclose(rows, rows_permuted, rtol=1e-5, atol=1e-9)
    assert torch.allclose(gradient[:, order], gradient_permuted, rtol=1e-5, atol=2e-8)


def test_the_mean_over_samples_tends_to_the_dense_gradient():
    student, teacher = logits(1, 30, 1), logits(1, 30, 2, scale=1.0)  # each entry is drawn often
    _, dense = exact(student, teacher)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [fused(student, Sampled.from_logits(teacher, 4, generator=generator))[1] for _ in range(2000)]
    )
    error = draws.std(0) / len(draws) ** 0.5
    z = ((draws.mean(0) - dense) / error.clamp(min=1e-7)).abs()
    assert z.max() < 4.5
    assert z.mean() < 1.2


def test_the_mean_over_samples_is_the_loss_plus_the_teachers_entropy():
    student, teacher = logits(1, 30, 1), logits(1, 30, 2)
    log_t = teacher.double().log_softmax(-1)
    expected = exact(student, teacher)[0] - (log_t.exp() * log_t).sum()
    sample = Sampled.from_logits(teacher.expand(20_000, -1), 1, generator=torch.Generator().manual_seed(0))
    rows = softmax_kl(student.expand(20_000, -1), sample, reduction="none").double()
    assert abs(rows.mean() - expected) < 4 * rows.std() / len(rows) ** 0.5


@settings(max_examples=60, deadline=None)
@given(pairs(), DIVERGENCE)
def test_top_k_of_the_whole_vocabulary_is_dense(pair, divergence):
    width = pair[0].shape[1]
    rows, gradient = fused(*pair, divergence=divergence)
    _, of_gradient = rounding(*pair, divergence, 1.0)  # log-probabilities are float32, and known to as much
    for rest in ("ghost", "renormalise"):
        target = TopK.from_logits(pair[1].double(), width, rest=rest)
        rows_k, gradient_k = fused(pair[0], target, divergence=divergence)
        assert torch.allclose(rows, rows_k, rtol=2e-6, atol=1e-9)
        allowed = 1e-7 + 1e-5 * gradient.abs() + of_gradient / len(rows)
        assert ((gradient - gradient_k).abs() <= allowed).all()
