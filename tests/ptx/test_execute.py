"""The compiled PTX, executed, gives the loss and the gradient of the specification in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from stillhouse.kernels.reference import _divergence
from stillhouse.kernels.targets import Sampled, TopK

from .harness import TORCH, expected, logits, relative, run

TEMPERATURES = (0.05, 0.5, 1.0, 4.0, 100.0)
WIDTHS = (10, 100, 1000, 4096, 32000, 50257, 128256, 262144)
LOSS = 1e-6
GRADIENT = {"f32": 1e-6, "bf16": 1e-2, "f16": 1e-2}
SUBNORMAL = {"f32": 0.0, "bf16": 0.0, "f16": 2.0**-25}  # what float16 rounds the smallest gradients by
ROUNDINGS = 8  # an approximate ex2 is off by up to 2^-22, and so is lg2: four each
NEARLY_EQUAL = 1e-4  # a loss at T = 100, where k log-probabilities that were rounded nearly agree
ULP = 2.0**-24  # what float32 rounds by, relative


def rows_for(v):
    return 5 if v <= 1024 else 2 if v <= 32000 else 1


def target_of(kind, teacher, temperature, k=16):
    if kind == "dense":
        return teacher
    k = min(k, teacher.shape[-1] - 1)
    if kind == "sampled":
        draw = torch.Generator().manual_seed(1)
        return Sampled.from_logits(teacher.float(), k, temperature=temperature, generator=draw)
    return TopK.from_logits(teacher.float(), k, rest=kind, temperature=temperature)


def conditioning(student, target, loss, temperature, divergence):
    """What a gradient is the difference of: it can't be had better than some roundings of this.

    Of forward and jsd these are probabilities times T; of reverse logarithms, T s (x - KL) with x = log s/t, which nearly
    agree where the student has nearly all of its mass on one entry.
    """
    log_s = (student.double() / temperature).log_softmax(-1)
    if isinstance(target, TopK) and target.rest == "renormalise" and divergence == "reverse":
        log_s = log_s.gather(-1, target.indices).log_softmax(-1)  # what the teacher lacks is dropped
    terms = 2 * log_s.exp()
    if divergence == "reverse":
        kl = loss[:, None] / temperature**2
        x = 2 * kl
        if isinstance(target, torch.Tensor):
            x = (log_s - (target.double() / temperature).log_softmax(-1)).abs()
        terms = terms + log_s.exp() * (x + kl)
    return temperature * float(terms[loss.isfinite()].norm())


def gradient_fits(grad, want, student, teacher, loss, temperature, divergence, limit=1e-6):
    """To some digits, or, of forward, to the rounding of the probabilities that it is the difference of."""
    known = conditioning(student, teacher, loss, temperature, divergence) if divergence == "forward" else 0.0
    return float((grad - want).norm()) <= max(limit * float(want.norm()), ROUNDINGS * ULP * known)


def check(v, dtype, divergence, kind="dense", temperatures=TEMPERATURES, **options):
    """(worst loss error, worst gradient error at T of 1 to 4) over temperatures; raises where either is too large."""
    worst_loss = worst_grad = 0.0
    for temperature in temperatures:
        student, teacher = logits(rows_for(v), v, dtype)
        target = target_of(kind, teacher, temperature)
        got = run(student, target, temperature=temperature, divergence=divergence, **options)
        loss, grad = expected(student, target, temperature=temperature, divergence=divergence)
        finite = loss.isfinite()
        assert torch.equal(got.loss.isfinite(), finite)
        by_loss = relative(got.loss[finite], loss[finite])
        wrong, right = float((got.grad - grad).norm()), float(grad.norm())
        known = conditioning(student, target, loss, temperature, divergence)
        case = (v, dtype, divergence, kind, temperature, by_loss, wrong, right, known)
        assert by_loss <= (NEARLY_EQUAL if temperature == 100 and kind != "dense" else LOSS), case
        stored = GRADIENT[dtype] * right + SUBNORMAL[dtype] * grad.numel() ** 0.5
        assert wrong <= max(stored, ROUNDINGS * ULP * known), case
        worst_loss = max(worst_loss, by_loss if temperature < 100 else 0)
        worst_grad = max(worst_grad, wrong / right if 1 <= temperature < 100 else 0)
    return worst_loss, worst_grad


FAST = [
    (10, "f32", "forward", "dense"),
    (100, "bf16", "forward", "dense"),
    (1000, "bf16", "forward", "dense"),
    (1001, "f32", "forward", "dense"),
    (1001, "bf16", "reverse", "dense"),
    (1001, "f32", "jsd", "dense"),
    (1000, "f32", "jsd", "dense"),
    (4096, "f32", "forward", "dense"),
    (4096, "f32", "reverse", "ghost"),
    (32000, "bf16", "forward", "dense"),
    (32000, "bf16", "forward", "sampled"),
    (50257, "f32", "reverse", "dense"),
    (50257, "bf16", "forward", "dense"),
    (128256, "f16", "jsd", "dense"),
    (262144, "bf16", "forward", "dense"),
]


@pytest.mark.parametrize(("v", "dtype", "divergence", "kind"), FAST)
def test_values_and_gradients_match_float64(v, dtype, divergence, kind, figure):
    temperatures = TEMPERATURES if v <= 50257 else (0.05, 4.0)
    loss, grad = check(v, dtype, divergence, kind, temperatures)
    figure(
        f"values {kind:11} {divergence:7} {dtype:4} V={v:6}: loss {loss:.1e}, gradient {grad:.1e} off float64"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "ghost", "renormalise", "sampled"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("v", WIDTHS)
def test_every_variant_matches_float64(v, dtype, divergence, kind, figure):
    if kind == "sampled" and divergence != "forward":
        pytest.skip("sampled labels have one loss, the cross-entropy")
    if kind == "renormalise" and divergence == "reverse":
        pytest.skip("the student is restricted to the k entries first, which makes it a dense row")
    loss, grad = check(v, dtype, divergence, kind, TEMPERATURES if v <= 4096 else (0.05, 1.0, 100.0))
    figure(
        f"values {kind:11} {divergence:7} {dtype:4} V={v:6}: loss {loss:.1e}, gradient {grad:.1e} off float64"
    )


@pytest.mark.parametrize(
    ("dtype", "kind"), [("bf16", "dense"), pytest.param("f32", "ghost", marks=pytest.mark.slow)]
)
def test_two_passes_on_an_older_device(dtype, kind):
    check(128256, dtype, "forward", kind, (1.0,), cc=(8, 0), inplace=True)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["reverse", "jsd"])
def test_three_passes_on_an_older_device(divergence):
    check(128256, "f32", divergence, "dense", (1.0,), cc=(8, 0), inplace=True)


@pytest.mark.parametrize("v", [1000, 4096])
def test_masked_rows_are_zero_whatever_they_hold(v):
    student, teacher = logits(3, v)
    student[1, ::3], student[1, 5], teacher[1] = float("nan"), float("inf"), float("nan")
    mask = torch.tensor([True, False, True])
    got = run(student, teacher, mask=mask)
    loss, grad = expected(student, teacher, mask=mask)
    assert got.loss[1] == 0
    assert (got.grad[1] == 0).all()
    assert relative(got.loss, loss) < LOSS
    assert relative(got.grad, grad) < 2e-6
    nothing = run(student, teacher, mask=torch.zeros(3, dtype=torch.bool))
    assert (nothing.loss == 0).all()
    assert (nothing.grad == 0).all()


@pytest.mark.parametrize("v", [1000, 4096])
def test_identical_rows_lose_nothing(v):
    student, _ = logits(2, v)
    got = run(student, student.clone())
    assert (got.loss.abs() <= 1e-9).all()
    assert (got.grad.abs() <= 1e-9).all()


@pytest.mark.parametrize(("temperature", "shift"), [(1.0, 0.0), (4.0, 0.0), (100.0, 0.0), (4.0, 1000.0)])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("v", [10, 1000, 4096])
def test_nearly_identical_rows_keep_their_digits(v, divergence, temperature, shift, figure):
    """Also where one side's logits all lie elsewhere."""
    student, teacher = logits(2, v, near=1e-3)
    teacher = teacher + shift
    settings = {"divergence": divergence, "temperature": temperature}
    loss, grad = expected(student, teacher, **settings)
    got, worst = (run(student, teacher, jitter=jitter, **settings) for jitter in (False, True))
    figure(
        f"nearly identical {divergence:7} T={temperature:<5} V={v} shift={shift}: loss {relative(got.loss, loss):.1e}, gradient "
        f"{relative(got.grad, grad):.1e} off; with every approximation off by its bound "
        f"{relative(worst.loss, loss):.1e}, {relative(worst.grad, grad):.1e}"
    )
    alone = run(student, teacher, gradient=False, **settings).loss
    assert relative(got.loss, loss) < LOSS
    assert relative(alone, loss) < LOSS
    assert relative(worst.loss, loss) < 2e-6
    assert gradient_fits(got.grad, grad, student, teacher, loss, temperature, divergence)
    assert gradient_fits(worst.grad, grad, student, teacher, loss, temperature, divergence, 2e-6)


@pytest.mark.parametrize(
    ("divergence", "beta"), [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]
)
@pytest.mark.parametrize("v", [10, 100, 1001])
def test_rows_near_and_apart_agree_alike(v, divergence, beta, figure):
    """From rows that nearly agree to rows that do not, some of a batch either side; the teacher's logits lie elsewhere."""
    student, other = logits(12, v)
    apart = torch.tensor([0.03, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 1.5, 2.0, 2.5, 3.0])[:, None]
    teacher = student + apart * other / 3 * 4 + 10
    student[:, 3:5] = teacher[:, 3:5] = -float("inf")
    settings = {"divergence": divergence, "temperature": 4.0, "beta": beta}
    loss, grad = expected(student, teacher, **settings)
    got = run(student, teacher, **settings)
    off = [relative(got.loss[i], loss[i]) for i in range(12)]
    fits = [
        gradient_fits(
            got.grad[i],
            grad[i],
            student[i : i + 1],
            teacher[i : i + 1],
            loss[i : i + 1],
            4.0,
            divergence,
            2e-6,
        )
        for i in range(12)
    ]
    wrong = [relative(got.grad[i], grad[i]) for i in range(12)]
    figure(
        f"from near to apart {divergence:7} beta={beta} V={v}: loss {max(off):.1e}, gradient {max(wrong):.1e}"
    )
    assert max(off) < 2e-6
    assert all(fits)


@pytest.mark.parametrize(
    ("v", "dtype", "cc"),
    [
        (40, "f32", (9, 0)),
        (300, "f32", (9, 0)),
        (3000, "f32", (9, 0)),
        (300, "bf16", (9, 0)),
        (18000, "f32", (9, 0)),  # a cluster
        pytest.param(18000, "f32", (8, 0), marks=pytest.mark.slow),  # unstaged
    ],
)
@pytest.mark.parametrize("lacking", ["of another width", "minus infinity"])
def test_jsd_of_rows_that_agree_but_for_what_the_student_lacks(v, dtype, cc, lacking, figure):
    """The KL is infinite there and the JSD as good as zero."""
    student, teacher = logits(2, v, near=1e-3)
    if lacking == "minus infinity":
        student[:, 3], teacher[:, 3] = -float("inf"), -12.0
    else:
        teacher = torch.cat([teacher, torch.full((2, 5), -12.0)], -1)
    student, teacher = student.to(TORCH[dtype]), teacher.to(TORCH[dtype])
    for beta in (0.01, 0.5, 0.99):
        settings = {"divergence": "jsd", "beta": beta}
        got = run(student, teacher, cc=cc, **settings)
        alone = run(student, teacher, cc=cc, gradient=False, **settings)
        loss, grad = expected(student, teacher, **settings)
        figure(
            f"jsd, the student lacks an entry, {lacking}, {dtype} V={v} beta={beta}: loss {relative(got.loss, loss):.1e}, "
            f"gradient {relative(got.grad, grad):.1e} off"
        )
        assert relative(got.loss, loss) < LOSS
        assert relative(alone.loss, loss) < LOSS
        assert relative(got.grad, grad) < GRADIENT[dtype]


@pytest.mark.parametrize("faint", [-1e4, -74.0])
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("v", [10, 100, 1000, 4096])
def test_kl_of_rows_that_agree_but_for_an_entry_without_mass(v, divergence, faint):
    """-1e4 on one side, -inf on the other: neither has mass there, and 0 times infinity must not tell them apart.

    The second number leaves some 1e-36 to the one side, which makes the loss infinite, however little it is.
    """
    one, other = logits(2, v, near=1e-3)
    one[0, 3], other[:, 3] = -float("inf"), faint
    one[1, 3] = faint
    student, teacher = (one, other) if divergence == "forward" else (other, one)
    got = run(student, teacher, divergence=divergence)
    loss, grad = expected(student, teacher, divergence=divergence)
    finite = loss.isfinite()
    assert torch.equal(got.loss.isfinite(), finite)
    assert relative(got.loss[finite], loss[finite]) < LOSS
    rows = [x[finite] for x in (got.grad, grad, student, teacher, loss)]
    assert gradient_fits(*rows, 1.0, divergence)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("v", [10, 1000, 4096])
def test_a_row_that_is_one_large_number(v, divergence):
    """A uniform distribution, whose maximum has no room for the logarithm of a normaliser."""
    other, flat = logits(2, v)[0], torch.full((2, v), -1e9)
    for student, teacher in ((other, flat), (flat, other)):
        got = run(student, teacher, divergence=divergence)
        loss, grad = expected(student, teacher, divergence=divergence)
        assert relative(got.loss, loss) < LOSS
        assert relative(got.grad, grad) < 2e-6


@pytest.mark.parametrize("v", [100, 1000, 4096])
def test_a_kl_is_infinite_however_little_the_other_side_lacks(v):
    """The smallest probability there is does not tell the row apart, and its loss is infinite all the same."""
    student, teacher = torch.zeros(2, v), torch.zeros(2, v)
    teacher[:, 3], student[0, 3] = -87.0, -float("inf")
    got = run(student, teacher)
    loss, _ = expected(student, teacher)
    assert got.loss.tolist()[0] == float("inf")
    assert relative(got.loss[1], loss[1]) < LOSS


@pytest.mark.parametrize("v", [10, 1000])
def test_what_is_left_of_a_saturated_jsd_keeps_its_digits(v):
    """Each row's gradient, down to a millionth of the logits' scale, by its own size."""
    student, teacher = logits(6, v)
    got = run(student, teacher, divergence="jsd", temperature=0.3)
    _, grad = expected(student, teacher, divergence="jsd", temperature=0.3)
    assert max(relative(got.grad[i], grad[i]) for i in range(6)) < 4e-6


@pytest.mark.parametrize("v", [1000, 4096])
def test_approximations_off_by_their_bound_change_little(v, figure):
    student, teacher = logits(2, v)
    got = run(student, teacher, jitter=True)
    loss, grad = expected(student, teacher)
    figure(f"ex2, lg2, rcp off by their bounds, V={v}: loss {relative(got.loss, loss):.1e}, "
           f"gradient {relative(got.grad, grad):.1e}")  # fmt: skip
    assert relative(got.loss, loss) < 2e-6
    assert relative(got.grad, grad) < 2e-6


@pytest.mark.parametrize("v", [10, 1000, 4096])
def test_entries_of_minus_infinity(v):
    student, teacher = logits(2, v)
    teacher[:, 3:7] = -float("inf")
    student[0, 5:7] = teacher[0, 5:7]
    got = run(student, teacher)
    loss, grad = expected(student, teacher)
    assert relative(got.loss, loss) < LOSS
    assert relative(got.grad, grad) < 2e-6
    # the teacher has mass there: an infinite loss, and still a finite gradient
    student[1, 8] = -float("inf")
    got = run(student, teacher)
    assert got.loss[1] == float("inf")
    assert got.grad.isfinite().all()


@pytest.mark.parametrize("rest", ["ghost", "renormalise"])
@pytest.mark.parametrize("divergence", ["forward", "jsd"])
def test_a_top_k_entry_that_the_student_lacks(divergence, rest):
    student, teacher = logits(2, 4096)
    target = target_of(rest, teacher, 1.0)
    student[1, target.indices[1, 2]] = -float("inf")
    got = run(student, target, divergence=divergence)
    loss, grad = expected(student, target, divergence=divergence)
    assert got.loss.isinf().tolist() == [False, divergence == "forward"]
    assert relative(got.loss[loss.isfinite()], loss[loss.isfinite()]) < LOSS
    assert got.grad.isfinite().all()
    assert relative(got.grad, grad) < 2e-6


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("v", [10, 1000, 4096])
def test_a_row_of_minus_infinity_alone_is_nan(v, divergence, side):
    pair = logits(2, v)
    pair[side][1] = -float("inf")
    got = run(*pair, divergence=divergence)
    assert got.loss.isnan().tolist() == [False, True]
    assert got.grad[0].isfinite().all()


@pytest.mark.parametrize("divergence", ["forward", "jsd"])
@pytest.mark.parametrize("widths", [(1000, 990), (990, 1000)])
def test_vocabularies_of_different_width(widths, divergence):
    student, teacher = logits(3, 1000)
    student, teacher = student[:, : widths[0]].contiguous(), teacher[:, : widths[1]].contiguous()
    got = run(student, teacher, divergence=divergence)
    loss, grad = expected(student, teacher, divergence=divergence)
    assert relative(got.loss, loss) < LOSS
    assert relative(got.grad, grad) < 4e-6


@pytest.mark.parametrize("v", [1000, 4095])
@pytest.mark.parametrize("shift", [(4, 4, 4), (4, 8, 0), (0, 0, 12)])
def test_tensors_that_start_between_boundaries(v, shift):
    student, teacher = logits(3, v)
    got = run(student, teacher, shift=shift)
    loss, grad = expected(student, teacher)
    assert relative(got.loss, loss) < LOSS
    assert relative(got.grad, grad) < 2e-6


@pytest.mark.parametrize("v", [1000, 4096])
def test_in_place_with_a_factor_that_lies_in_memory(v):
    student, teacher = logits(2, v)
    got = run(student, teacher, scales=torch.tensor([0.25, 3.0]), factors=(0.5, 0.0), inplace=True)
    loss, grad = expected(student, teacher, scales=(0.125, 0.0))
    assert relative(got.loss, loss) < LOSS
    assert relative(got.grad, grad) < 2e-6


LABELLED = [
    (10, "f32", "forward", "dense", (9, 0)),
    (1000, "bf16", "forward", "dense", (9, 0)),
    (1001, "f32", "jsd", "dense", (9, 0)),
    (4096, "f32", "reverse", "dense", (9, 0)),
    (50257, "bf16", "forward", "dense", (9, 0)),  # a cluster
    (50257, "bf16", "forward", "dense", (8, 0)),  # unstaged
    (4096, "f32", "forward", "ghost", (9, 0)),
    (4096, "bf16", "jsd", "ghost", (9, 0)),
    (4096, "f32", "reverse", "ghost", (9, 0)),
    (1001, "f32", "forward", "renormalise", (9, 0)),
    (4096, "f32", "forward", "sampled", (9, 0)),
    (50257, "bf16", "forward", "sampled", (9, 0)),
]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("v", "dtype", "divergence", "kind", "cc"), LABELLED)
def test_both_terms_match_float64(v, dtype, divergence, kind, cc, smoothing, figure):
    """In place; of five rows one has no label, one is masked, and one's label is an entry of the target."""
    student, teacher = logits(5, v, dtype)
    target = target_of(kind, teacher, 2.0)
    labels, mask = torch.tensor([3, -100, v - 1, 7 % v, 0]), torch.tensor([True, True, True, False, True])
    if kind != "dense":
        labels[4] = target.indices[4, 1]
    settings = {
        "temperature": 2.0,
        "divergence": divergence,
        "mask": mask,
        "labels": labels,
        "smoothing": smoothing,
    }
    loss, label, grad = expected(student, target, scales=(0.7, 0.3), **settings)
    student[3], labels[3] = float("nan"), 12345678
    got = run(student, target, factors=(0.7, 0.3), cc=cc, inplace=True, **settings)
    alone = run(student, target, cc=cc, gradient=False, **settings)
    figure(
        f"both terms {kind:11} {divergence:7} {dtype:4} V={v:6} sm_{cc[0]}{cc[1]} smoothing {smoothing}: loss "
        f"{relative(got.loss, loss):.1e}, label {relative(got.label, label):.1e}, gradient {relative(got.grad, grad):.1e} off"
    )
    assert relative(got.loss, loss) < LOSS
    assert relative(got.label, label) < LOSS
    assert relative(got.grad, grad) < (2e-6 if dtype == "f32" else GRADIENT[dtype])
    assert (got.grad[3] == 0).all()
    assert torch.equal(alone.label, got.label)


@pytest.mark.parametrize("kind", ["dense", "ghost", "sampled"])
@pytest.mark.parametrize("bad", [-1, 4096, 2**40])
def test_a_label_out_of_range_makes_its_term_nan_and_touches_nothing(bad, kind):
    student, teacher = logits(3, 4096)
    target, labels = target_of(kind, teacher, 1.0), torch.tensor([1, bad, 2])
    got = run(student, target, labels=labels)
    without = run(student, target, labels=torch.tensor([1, -100, 2]))
    assert got.label.isnan().tolist() == [False, True, False]
    assert torch.equal(got.loss, without.loss)
    assert torch.equal(got.grad, without.grad)


@pytest.mark.parametrize("kind", ["dense", "ghost"])
def test_an_infinite_reverse_loss_leaves_the_label_its_gradient(kind):
    student, teacher = logits(2, 4096)
    if kind == "dense":
        teacher[1, 5] = -float("inf")
        target = teacher
    else:
        target = TopK.from_logits(teacher, 16)
        target.log_probs[1, 2] = -float("inf")
    labels = torch.tensor([3, 4])
    got = run(student, target, divergence="reverse", labels=labels)
    _, label, _ = expected(student, target, divergence="reverse", labels=labels)
    wide = student.double().requires_grad_()
    torch.nn.functional.cross_entropy(wide, labels, reduction="sum").backward()
    assert got.loss.isinf().tolist() == [False, True]
    assert relative(got.label, label) < LOSS
    assert relative(got.grad[1], wide.grad[1]) < 2e-6


@pytest.mark.parametrize("where", ["the label", "another entry"])
def test_a_logit_of_minus_infinity_under_a_label(where):
    """The cross-entropy is infinite if it is the label's own, or if smoothing gives every entry a share."""
    student, teacher = logits(1, 1000)
    student[0, 3] = teacher[0, 3] = -float("inf")
    labels = torch.tensor([3 if where == "the label" else 5])
    for smoothing in (0.0, 0.1):
        _, label, grad = expected(student, teacher, labels=labels, smoothing=smoothing)
        got = run(student, teacher, labels=labels, smoothing=smoothing)
        assert torch.equal(got.label.isinf(), label.isinf())
        assert relative(got.grad, grad) < 2e-6
        if label.isfinite().all():
            assert relative(got.label, label) < LOSS


@pytest.mark.parametrize(
    ("v", "dtype", "divergence", "kind"),
    [
        (10, "f32", "forward", "dense"),
        (1000, "bf16", "jsd", "dense"),
        (4096, "f32", "reverse", "dense"),
        (32000, "bf16", "forward", "dense"),
        (4096, "f32", "jsd", "ghost"),
        (4096, "f32", "forward", "sampled"),
    ],
)
def test_a_loss_alone_writes_nothing_else(v, dtype, divergence, kind):
    student, teacher = logits(2, v, dtype)
    teacher[0, 3] = -float("inf")  # an infinite loss under reverse
    target = target_of(kind, teacher, 1.0)
    mask = torch.tensor([True, False])
    whole = run(student, target, divergence=divergence, mask=mask)
    alone = run(student, target, divergence=divergence, mask=mask, gradient=False)
    assert torch.equal(alone.loss, whole.loss)
    assert torch.equal(alone.grad, student), "the student's logits are as they were"
    assert alone.counts.bytes_written == 2 * 4, "two losses"


def test_a_draw_of_weight_0_may_stand_on_an_impossible_entry():
    student, _ = logits(2, 100)
    student[:, 5] = -float("inf")
    target = Sampled(torch.tensor([[5, 7, 9], [5, 1, 2]]), torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.25, 0.75]]))
    got = run(student, target)
    loss, grad = expected(student, target)
    assert relative(got.loss, loss) < LOSS
    assert relative(got.grad, grad) < GRADIENT["f32"]


def test_repeated_draws_add_up_in_place():
    student, teacher = logits(2, 4096)
    target = Sampled.from_logits(teacher, 64, temperature=0.5, generator=torch.Generator().manual_seed(0))
    assert any(len(set(row.tolist())) < 64 for row in target.indices)
    got = run(student, target, temperature=0.5, inplace=True)
    loss, grad = expected(student, target, temperature=0.5)
    assert relative(got.loss, loss) < LOSS
    assert relative(got.grad, grad) < 2e-6


BAD = [-1, -(2**33), "V", 2**32 + 5, 2**40]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("v", "dtype", "divergence", "kind"),
    [
        (4096, "f32", "forward", "ghost"),
        (4096, "f32", "reverse", "ghost"),
        (4096, "f32", "jsd", "ghost"),
        (4096, "f32", "forward", "sampled"),
        pytest.param(50257, "f32", "reverse", "ghost", marks=pytest.mark.slow),  # a cluster
    ],
)
def test_an_index_out_of_range_makes_its_row_nan_and_touches_nothing(v, dtype, divergence, kind, bad):
    """Nobody looks at the indices of a trusted target on the host; the interpreter stops at an access out of bounds."""
    student, teacher = logits(3, v, dtype)
    target = target_of(kind, teacher, 1.0)
    right = run(student, target, divergence=divergence)
    target.indices[1, 3] = v if bad == "V" else bad
    got = run(student, target, divergence=divergence, inplace=True)
    assert got.loss.isnan().tolist() == [False, True, False]
    assert (got.grad[1] == 0).all(), "no gradient for that row"
    assert torch.equal(got.loss[::2], right.loss[::2])
    assert torch.equal(got.grad[::2], right.grad[::2])
    assert run(student, target, divergence=divergence, gradient=False).loss.isnan()[1]


def with_a_faint_ghost(rows, k, log_rest, seed=2):
    """A teacher whose top k hold all of the mass but exp(log_rest)."""
    made = torch.Generator().manual_seed(seed)
    log_probs = (3 * torch.randn(rows, k, generator=made)).log_softmax(-1)
    indices = torch.stack([torch.randperm(4096, generator=made)[:k] for _ in range(rows)])
    return TopK(indices, log_probs, trusted=True, temperature=2.0, log_rest=torch.full((rows,), log_rest))


@pytest.mark.parametrize("log_rest", [math.log(1e-12), -200.0])  # exp(-200) is zero in float32
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_a_ghost_has_the_logarithm_it_is_given(divergence, log_rest, figure):
    student, _ = logits(2, 4096)
    target = with_a_faint_ghost(2, 16, log_rest)
    got = run(student, target, temperature=2.0, divergence=divergence, beta=0.3)

    wide = student.double().requires_grad_()
    log_s = (wide / 2).log_softmax(-1)
    others = log_s.scatter(-1, target.indices, -float("inf")).logsumexp(-1, keepdim=True)
    outcomes = torch.cat([log_s.gather(-1, target.indices), others], -1)
    log_t = torch.cat([target.log_probs, target.log_rest[:, None]], -1).double()
    loss = 4 * _divergence(outcomes, log_t, divergence, 0.3)
    loss.sum().backward()
    figure(
        f"ghost of exp({log_rest:.0f}) {divergence:7} f32 V=4096: loss {relative(got.loss, loss.detach()):.1e}, "
        f"gradient {relative(got.grad, wide.grad):.1e} off float64"
    )
    assert got.loss.isfinite().all()
    assert relative(got.loss, loss.detach()) < LOSS
    assert relative(got.grad, wide.grad) < 1e-6


@pytest.mark.parametrize("rest", ["ghost", "renormalise"])
@pytest.mark.parametrize("v", [1000, 4096])
def test_a_top_k_gradient_sums_to_zero(v, rest, figure):
    """Where both sides are nearly flat and agree, a normaliser's error is as large as the gradient."""
    other, teacher = logits(2, v)
    student = teacher + 0.1 * other
    target = target_of(rest, teacher, 100.0)
    got = run(student, target, temperature=100.0)
    _, grad = expected(student, target, temperature=100.0)
    off = float((got.grad.double().sum(-1).abs() / got.grad.double().abs().sum(-1)).max())
    figure(
        f"top-k {rest} at T = 100, V={v}: gradient sums to {off:.1e} of its size, {relative(got.grad, grad):.1e} off float64"
    )
    assert off < 1e-6
    assert relative(got.grad, grad) < 2e-4


def test_a_ghost_without_a_logarithm_has_what_the_entries_leave():
    student, teacher = logits(2, 4096)
    target = TopK.from_logits(teacher, 16)
    rest = (1 - target.log_probs.double().exp().sum(-1)).log()
    given = run(student, replace(target, log_rest=rest), divergence="reverse")
    taken = run(student, replace(target, log_rest=None), divergence="reverse")
    assert torch.equal(given.loss, taken.loss)
    assert torch.equal(given.grad, taken.grad)
