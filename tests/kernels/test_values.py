"""Every path against the one specification, in value and gradient."""

import math
from dataclasses import replace

import pytest
import torch
from cases import DIVERGENCES, TEMPERATURES, exact, fused, logits, relative
from torch.nn.functional import kl_div

from stillhouse.kernels import Sampled, TopK, reference, softmax_kl
from stillhouse.kernels.series import jsd_apart

WIDTHS = (2, 10, 100, 1000, 4096, 32000, 50257, 151936)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("width", WIDTHS)
def test_float32_agrees_with_float64(width, temperature, divergence):
    rows = 64 if width <= 1000 else 4
    student, teacher = logits(rows, width, 1), logits(rows, width, 2)
    settings = {"temperature": temperature, "divergence": divergence}
    rows_exact, gradient_exact = exact(student, teacher, **settings)
    rows_fused, gradient_fused = fused(student, teacher, **settings)
    assert relative(rows_fused, rows_exact) <= 1e-6
    # A saturated Jensen-Shannon loss has a gradient of zero but for rounding; it is compared with the logits' scale.
    floor = 1e-6 * temperature if divergence == "jsd" else 0.0
    assert relative(gradient_fused, gradient_exact, floor) <= 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_specification_is_the_textbook_formula(temperature):
    student, teacher = logits(6, 50, 1, dtype=torch.float64), logits(6, 50, 2, dtype=torch.float64)
    log_s, log_t = (x.div(temperature).log_softmax(-1) for x in (student, teacher))
    log_m = torch.logaddexp(
        log_t + torch.tensor(0.3).double().log(), log_s + torch.tensor(0.7).double().log()
    )

    def kl(log_p, log_q):
        return kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * temperature**2

    expected = {
        "forward": kl(log_t, log_s),
        "reverse": kl(log_s, log_t),
        "jsd": 0.3 * kl(log_t, log_m) + 0.7 * kl(log_s, log_m),
    }
    for divergence, rows in expected.items():
        got = reference.softmax_kl_rows(student, teacher, temperature, divergence, 0.3)
        assert torch.allclose(got, rows, rtol=1e-6, atol=1e-12), divergence


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("target", ["dense", "ghost", "renormalise"])
def test_the_specification_passes_gradcheck(divergence, target):
    student, teacher = logits(3, 7, 1, dtype=torch.float64), logits(3, 7, 2, dtype=torch.float64)
    against = teacher if target == "dense" else TopK.from_logits(teacher, 3, temperature=2.0, rest=target)
    mask = torch.tensor([True, False, True])
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: softmax_kl(
                s, against, temperature=2.0, divergence=divergence, beta=0.3, mask=mask, reduction=r
            ),
            student.requires_grad_(),
        )


def test_the_specification_passes_gradcheck_for_samples():
    student, teacher = logits(3, 7, 1, dtype=torch.float64), logits(3, 7, 2, dtype=torch.float64)
    against = Sampled.from_logits(teacher, 5, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda s: softmax_kl(s, against), student.requires_grad_())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [2, 10, 1000, 32000])
def test_sixteen_bit_gradients_are_within_one_percent(dtype, divergence, width):
    student, teacher = logits(16, width, 1, dtype=dtype), logits(16, width, 2, dtype=dtype)
    rows_exact, gradient_exact = exact(student, teacher, divergence=divergence)
    rows_fused, gradient_fused = fused(student, teacher, divergence=divergence)
    assert relative(rows_fused, rows_exact) <= 1e-6
    assert relative(gradient_fused, gradient_exact) <= 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_gradients_are_rounded_to_nearest(dtype):
    student, teacher = logits(16, 1000, 1, dtype=dtype), logits(16, 1000, 2, dtype=dtype)
    _, narrow = fused(student, teacher, reduction="sum")
    _, wide = fused(student.float(), teacher.float(), reduction="sum")
    info = torch.finfo(dtype)
    allowed = (wide.abs() * info.eps / 2).clamp(
        min=info.smallest_normal * info.eps / 2
    )  # half a unit in the last place
    assert ((narrow - wide).abs() <= 1.001 * allowed).all()
    off = narrow - wide
    assert 0.45 < (off > 0).sum() / (off != 0).sum() < 0.55  # neither up nor down


@pytest.mark.parametrize("temperature", [1.0, 4.0, 100.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("width", [10, 1000, 32000])
def test_nearly_equal_distributions_keep_their_loss_and_gradient(width, divergence, temperature):
    teacher = logits(16, width, 2)
    student = teacher + 1e-3 * logits(16, width, 1)
    settings = {"divergence": divergence, "temperature": temperature}
    rows_exact, gradient_exact = exact(student, teacher, **settings)
    rows_fused, gradient_fused = fused(student, teacher, **settings)
    assert relative(rows_fused, rows_exact) <= 1e-4
    assert relative(gradient_fused, gradient_exact) <= 1e-4


PAIRS = {  # logits of the teacher from the student's, from noise, and from the temperature
    "near and elsewhere": lambda s, noise, t: s + t * noise / 30 + 3 * t,
    "nearly equal, elsewhere": lambda s, noise, t: s + noise * 1e-3 + t,
    "apart": lambda s, noise, t: noise,
    "half apart": lambda s, noise, t: s + t * noise / 6,
    "near": lambda s, noise, t: s + t * noise / 30,
    "nearly equal": lambda s, noise, t: s + noise * 1e-4,
    "opposed": lambda s, noise, t: -s,
}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("width", [3, 100, 700, 5000])
@pytest.mark.parametrize(
    ("divergence", "beta"),
    [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.01)],
)
def test_closed_forms_begin_where_they_lose_nothing(divergence, beta, width, temperature):
    """Rows from those that a series is summed for to those that differ too much to need one, each by itself."""
    rows = 256
    teacher = logits(rows, width, 1, scale=4.0 * temperature)
    noise = torch.linspace(0.2, 2.0, rows)[:, None] * temperature
    student = (
        teacher + noise * logits(rows, width, 2, scale=1.0) + logits(rows, 1, 3, scale=3.0 * temperature)
    )
    # what exponentials are relative to differs by this, and so do the normalisers
    student[:, :64] -= torch.linspace(0, 8, rows)[:, None] * temperature
    apart = [x.double().div(temperature).softmax(-1) for x in (student, teacher)]
    size = (apart[0] - apart[1]).abs().sum(-1)
    assert size.min() < 0.3
    begin = jsd_apart(beta) if divergence == "jsd" else 0.5
    assert ((size > begin / 2) & (size < begin)).sum() >= 10
    assert ((size > begin) & (size < begin * 1.3)).sum() >= 2
    settings = {"temperature": temperature, "divergence": divergence, "beta": beta}
    rows_exact, gradient_exact = exact(student, teacher, **settings)
    rows_fused, gradient_fused = fused(student, teacher, **settings)
    some = size > 0.2  # below, a jsd's few entries may cancel
    assert ((rows_fused - rows_exact) / rows_exact).abs()[some].max() <= 1e-6
    wrong = (gradient_fused - gradient_exact).norm(dim=-1) / gradient_exact.norm(dim=-1)
    assert wrong[some].max() <= 1e-6


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("width", [300, 2048])
def test_jsd_of_rows_whose_sides_share_a_peak_and_differ_in_a_flat_tail(beta, width):
    """What the peak adds to a sum, and takes away from it again, must not be what the equal numbers of the tail are added to."""
    of = torch.Generator().manual_seed(3)
    student, teacher = torch.zeros(2, 4000, width)
    for side in (student, teacher):
        side[:, 0] = 14 * torch.rand(4000, generator=of)
    apart = [x.double().softmax(-1) for x in (student, teacher)]
    differ = (apart[0] - apart[1]).abs().sum(-1) >= jsd_apart(beta)
    student, teacher = student[differ], teacher[differ]
    assert len(student) > 300
    rows_exact, gradient_exact = exact(student, teacher, divergence="jsd", beta=beta)
    rows_fused, gradient_fused = fused(student, teacher, divergence="jsd", beta=beta)
    assert ((rows_fused - rows_exact) / rows_exact).abs().max() <= 1e-6
    wrong = (gradient_fused - gradient_exact).norm(dim=-1) / gradient_exact.norm(dim=-1)
    assert wrong.max() <= 1e-6


@pytest.mark.parametrize(
    ("width", "beta", "student", "teacher"),
    [
        (1000, 0.7, (6.530681610107422, 1.0662868022918701), (13.604265213012695, 5.546928882598877)),
        (128, 0.7, (4.557050704956055, 2.8505263328552246), (7.508949279785156, 2.260716199874878)),
        (2049, 0.5, (10.136242866516113, 6.1317291259765625), (14.487923622131348, 6.440001964569092)),
    ],
)
def test_jsd_of_the_worst_rows_that_were_found(width, beta, student, teacher):
    """Of a peak and a flat tail, whose numbers round alike; above 1e-6, as the documentation says."""

    def row(peak, tail):
        x = torch.full((1, width), tail)
        x[0, 0] = peak
        return x

    rows_exact, _ = exact(row(*student), row(*teacher), divergence="jsd", beta=beta)
    rows_fused, _ = fused(row(*student), row(*teacher), divergence="jsd", beta=beta)
    assert abs(rows_fused / rows_exact - 1).item() <= 2.5e-6


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.5, 0.99])
def test_a_jsd_of_sides_that_differ_is_a_fifth_of_the_most_that_it_can_be(beta):
    student, teacher = logits(4096, 8, 1), logits(4096, 8, 2)
    size = (student.double().softmax(-1) - teacher.double().softmax(-1)).abs().sum(-1)
    rows, _ = exact(student, teacher, divergence="jsd", beta=beta)
    most = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    differ = size >= jsd_apart(beta)
    assert 0 < differ.sum() < 4096
    assert rows[differ].min() >= most / 5
    assert rows.max() <= most


def smoothed(rows, width, place, most):
    """One entry above all others, which are equal."""
    x = torch.zeros(rows, width)
    x[:, place] = torch.linspace(0.1, most, rows)
    return x


def striped(rows, width, every, most):
    x = torch.zeros(rows, width)
    x[:, ::every] = torch.linspace(0.1, most, rows)[:, None]
    return x


ALIKE = {  # (student, teacher) of little but equal numbers
    "label smoothing": lambda rows, width: (logits(rows, width, 1), smoothed(rows, width, 5, 12.0)),
    "no agreement": lambda rows, width: (smoothed(rows, width, -1, 8.0), smoothed(rows, width, 5, 12.0)),
    "agreement": lambda rows, width: (
        smoothed(rows, width, 5, 12.0) + smoothed(rows, width, 7, 3.0) + smoothed(rows, width, 5, 0.3),
        smoothed(rows, width, 5, 12.0),
    ),
    "two values": lambda rows, width: (striped(rows, width, 2, 3.0), striped(rows, width, 3, 4.0)),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("width", [1000, 2048, 32000])
@pytest.mark.parametrize("alike", ALIKE)
def test_equal_logits_are_as_exact_as_others(alike, width, divergence):
    """What equal numbers round to in a sum is equal too, and does not average out."""
    student, teacher = ALIKE[alike](64, width)
    rows_exact, gradient_exact = exact(student, teacher, divergence=divergence)
    rows_fused, gradient_fused = fused(student, teacher, divergence=divergence)
    assert ((rows_fused - rows_exact) / rows_exact)[8:].abs().max() <= 1e-6  # the first rows nearly agree
    wrong = (gradient_fused - gradient_exact).norm(dim=-1) / gradient_exact.norm(dim=-1)
    assert wrong[8:].max() <= 1e-6


@pytest.mark.parametrize("width", [16, 100, 256, 513, 1025, 5000])
@pytest.mark.parametrize("tail", [0, 40, 600])
def test_rows_that_differ_are_told_from_rows_that_agree(width, tail):
    """Also where the end of the vocabulary, which is read first, holds next to nothing."""
    from stillhouse.kernels.cpu.dense import apart

    def asked(student, teacher, enough):
        scratch = torch.zeros(2, -(-width // 16) * 16)
        scratch[0, :width], scratch[1, :width] = student, teacher
        of = (side.data_ptr() for side in scratch)
        return apart(enough, width, *of, float(student.double().sum()), float(teacher.double().sum()))

    for seed in range(5):
        teacher = logits(1, width, seed)[0].exp()
        teacher[width - min(tail, width // 2) :] = 1e-9
        other = teacher * (1.5 * logits(1, width, seed + 9, scale=1.0)[0]).exp()
        near = teacher * (0.05 * logits(1, width, seed + 9, scale=1.0)[0]).exp()
        size = float((other / other.sum() - teacher / teacher.sum()).abs().sum())
        assert asked(other, 7 * teacher, 0.99 * size), (seed, size)
        assert not asked(other, 7 * teacher, 1.01 * size), (seed, size)
        assert not asked(near, 7 * teacher, 0.5)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("temperature", [0.5, 4.0, 100.0])
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_jsd_at_other_mixtures(beta, temperature, pair):
    student = logits(16, 1000, 1)  # no multiple of sixteen: lanes without an entry take part in nothing
    teacher = PAIRS[pair](student, logits(16, 1000, 2), temperature)
    settings = {"divergence": "jsd", "beta": beta, "temperature": temperature}
    rows_exact, gradient_exact = exact(student, teacher, **settings)
    rows_fused, gradient_fused = fused(student, teacher, **settings)
    assert relative(rows_fused, rows_exact) <= 1e-6
    assert relative(gradient_fused, gradient_exact) <= 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rest", ["ghost", "renormalise"])
@pytest.mark.parametrize("k", [1, 8, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_agrees_with_the_specification(divergence, rest, k, dtype):
    student, teacher = logits(16, 300, 1, dtype=dtype), logits(16, 300, 2)
    target = TopK.from_logits(teacher, k, temperature=2.0, rest=rest)
    if divergence == "reverse" and rest == "renormalise" and k == 1:
        pytest.skip("a distribution over one entry has neither loss nor gradient")
    rows_exact, gradient_exact = exact(student, target, temperature=2.0, divergence=divergence)
    rows_fused, gradient_fused = fused(student, target, temperature=2.0, divergence=divergence)
    assert relative(rows_fused, rows_exact) <= 2e-6
    assert relative(gradient_fused, gradient_exact) <= (1e-2 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rest", ["ghost", "renormalise"])
@pytest.mark.parametrize(("k", "temperature"), [(3, 2.0), (17, 4.0), (50, 2.0), (50, 4.0), (100, 100.0)])
def test_lanes_without_an_entry_take_part_in_nothing(k, temperature, rest, divergence):
    """K is no multiple of sixteen: of rows that agree, what stood in the lanes left over made rows that do not."""
    teacher = logits(256, 100, 2)
    student = teacher + logits(256, 100, 1, scale=0.1)
    target = TopK.from_logits(teacher, k, temperature=temperature, rest=rest)
    settings = {"temperature": temperature, "divergence": divergence}
    rows_exact, gradient_exact = exact(student, target, **settings)
    rows_fused, gradient_fused = fused(student, target, **settings)
    assert relative(rows_fused, rows_exact) <= 2e-6
    assert relative(gradient_fused, gradient_exact) <= 1e-6


def test_lanes_without_an_entry_do_not_overflow():
    """A power of 1e9, to which what stands for -inf was raised too: valid logits were refused."""
    target = TopK.from_logits(logits(4, 100, 2), 5, temperature=1e4, rest="renormalise")
    assert softmax_kl(logits(4, 100, 1), target, temperature=1e-5).isfinite()


def test_many_entries_are_summed_as_exactly_as_few():
    """All of a row that nearly agrees: its normaliser's rounding is most of what its loss is off by."""
    teacher = logits(256, 2048, 2, scale=2.0)
    student = teacher + logits(256, 2048, 1, scale=0.001)
    target = TopK.from_logits(teacher, 2048, temperature=100.0)
    settings = {"temperature": 100.0, "divergence": "reverse"}
    rows_exact, _ = exact(student, target, **settings)
    rows_fused, _ = fused(student, target, **settings)
    assert relative(rows_fused, rows_exact) <= 3e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("scale", [10.0, 40.0])
def test_a_ghost_of_a_peaked_teacher_keeps_its_mass(scale, divergence):
    """1 less a sum of float32 numbers is 0 where the k entries hold all but 1e-7, and reverse was then +inf."""
    student, teacher = logits(64, 300, 1), logits(64, 300, 2, scale=scale)
    target = TopK.from_logits(teacher, 16)
    log_t = teacher.double().log_softmax(-1)
    expected = log_t.scatter(-1, target.indices, -torch.inf).logsumexp(-1)
    assert (expected < -17).any(), "less than float32 can tell from nothing"
    assert relative(target.log_rest, expected) <= 1e-6
    rows_exact, gradient_exact = exact(student, replace(target, log_rest=expected), divergence=divergence)
    rows_fused, gradient_fused = fused(student, target, divergence=divergence)
    assert rows_exact.isfinite().all()
    assert relative(rows_fused, rows_exact) <= 2e-6
    assert relative(gradient_fused, gradient_exact) <= 2e-6


@pytest.mark.parametrize("known", [True, False], ids=["log_rest", "no log_rest"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("width", "k", "scale"), [(3, 1, 3.0), (100, 8, 3.0), (1000, 64, 10.0)])
def test_a_ghost_whose_student_has_less_than_float32_holds(width, k, scale, divergence, known):
    """exp(student) outside the k entries is 0 in float32 there, and log 0 made the loss of finite logits +inf."""
    teacher = logits(256, width, 2, scale=scale)
    student = teacher + 0.1 * logits(256, width, 1, scale=scale)
    settings = {"temperature": 0.05, "divergence": divergence}
    target = TopK.from_logits(teacher, k, temperature=0.05)
    target = target if known else replace(target, log_rest=None)
    rows_exact, gradient_exact = exact(student, target, **settings)
    rows_fused, gradient_fused = fused(student, target, **settings)
    finite = rows_exact.isfinite()
    assert finite.all() or (divergence == "reverse" and not known)
    assert torch.equal(rows_fused.isfinite(), finite)
    assert relative(rows_fused[finite], rows_exact[finite]) <= 2e-6
    assert relative(gradient_fused[finite], gradient_exact[finite]) <= 2e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("noise", [0.003, 0.02])
def test_a_ghost_that_nearly_agrees_keeps_its_loss(noise, divergence):
    """Two outcomes, of which the ghost has most: its part is summed as a series where the sides are close."""
    teacher = logits(64, 100, 1, scale=1.0)
    student = teacher + noise * logits(64, 100, 2, scale=1.0)
    target = TopK.from_logits(teacher, 1)
    rows_exact, _ = exact(student, target, divergence=divergence)
    rows_fused, _ = fused(student, target, divergence=divergence)
    assert relative(rows_fused, rows_exact) <= 1e-4


@pytest.mark.parametrize("log_rest", [-50.0, -800.0])
def test_a_mass_below_every_float32_is_a_mass(log_rest):
    student = torch.tensor([[0.0, -100.0, -120.0]])
    target = TopK(torch.tensor([[0]]), torch.tensor([[0.0]]), log_rest=torch.tensor([log_rest]))
    expected, _ = exact(student, target)
    assert (fused(student, target)[0] - expected).abs() <= 2e-6 * expected + 1e-45


@pytest.mark.parametrize("known", [True, False], ids=["log_rest", "no log_rest"])
@pytest.mark.parametrize("width", [1000, 32000])
def test_a_top_k_gradient_sums_to_zero_though_its_teacher_does_not_sum_to_one(width, known):
    """Rounded log-probabilities; at T = 100 what they are off by is as large as the gradient."""
    student, teacher = logits(64, width, 1), logits(64, width, 2)
    target = TopK.from_logits(teacher, 8, temperature=100.0)
    target = target if known else replace(target, log_rest=None)
    _, gradient_exact = exact(student, target, temperature=100.0)
    _, gradient = fused(student, target, temperature=100.0)
    assert relative(gradient, gradient_exact) <= 2e-6
    assert gradient.sum(-1).abs().max() <= 1e-6 * gradient.abs().sum(-1).max()


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_without_its_mass_a_ghost_has_what_the_entries_leave(backend):
    student, teacher = logits(16, 300, 1), logits(16, 300, 2)
    target = TopK.from_logits(teacher.double(), 16)
    rows, gradient = fused(student, target, divergence="reverse", backend=backend)
    rows_left, gradient_left = fused(
        student, replace(target, log_rest=None), divergence="reverse", backend=backend
    )
    assert relative(rows_left, rows) <= 2e-6
    assert relative(gradient_left, gradient) <= 2e-6


def test_samples_agree_with_the_specification():
    student, teacher = logits(16, 300, 1), logits(16, 300, 2)
    target = Sampled.from_logits(teacher, 64, generator=torch.Generator().manual_seed(0))
    rows_exact, gradient_exact = exact(student, target)
    rows_fused, gradient_fused = fused(student, target)
    assert relative(rows_fused, rows_exact) <= 1e-6
    assert relative(gradient_fused, gradient_exact) <= 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rising_logits_move_the_reference(divergence):
    """A row whose maximum comes late, far above its beginning, in float32's exponent range."""
    student, teacher = logits(3, 9000, 1), logits(3, 9000, 2)
    student[:, 8000:] += 200
    teacher[:, 4000:] += 300
    student[1, :300] = teacher[1, :300] = -torch.inf
    rows_exact, gradient_exact = exact(student, teacher, divergence=divergence)
    rows_fused, gradient_fused = fused(student, teacher, divergence=divergence)
    finite = rows_exact.isfinite()
    assert torch.equal(finite, rows_fused.isfinite())
    assert relative(rows_fused[finite], rows_exact[finite]) <= 1e-6
    assert relative(gradient_fused, gradient_exact, 1e-6) <= 1e-6


@pytest.mark.parametrize("masked", ["both", "student"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filled", [-1e8, -1e9, -1e12])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_a_row_that_begins_with_a_large_number_for_minus_infinity(filled, temperature, dtype, masked):
    """The first reference, which a float32 cannot be added to and keep the digits of a logit."""
    student, teacher = logits(3, 5000, 1) + 20, logits(3, 5000, 2) + 20
    for row, width in enumerate((64, 2048, 4500)):
        student[row, :width] = filled
        teacher[row, : width if masked == "both" else 0] = filled
    student, teacher = student.to(dtype), teacher.to(dtype)
    targets = [teacher, TopK.from_logits(teacher, 8, temperature=temperature)]
    if masked == "both":
        targets.append(Sampled.from_logits(teacher, 8, temperature=temperature))
    for target in targets:
        rows_exact, gradient_exact = exact(student, target, temperature=temperature)
        rows_fused, gradient_fused = fused(student, target, temperature=temperature)
        assert relative(rows_fused, rows_exact) <= 1e-6
        assert relative(gradient_fused, gradient_exact, 1e-6) <= (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("width", [10, 100, 3000])
@pytest.mark.parametrize("raised", [0.25, 1.0])
def test_rows_that_agree_but_for_an_unlikely_entry_keep_their_gradient(raised, width, divergence, dtype):
    """Everywhere else it is what a normaliser differs by, times a probability: less than a normaliser's rounding."""
    student = logits(4, width, 1, dtype=dtype)
    teacher = student.clone()
    teacher.scatter_(1, student.argmin(-1, keepdim=True), student.amin(-1, keepdim=True) + raised)
    _, gradient_exact = exact(student, teacher, divergence=divergence)
    _, gradient_fused = fused(student, teacher, divergence=divergence)
    for got, expected, row in zip(gradient_fused, gradient_exact, student, strict=True):
        if dtype == torch.float32:
            assert relative(got, expected) <= 1e-4
        else:
            assert fits_in_16_bits(got, expected, row)


def fits_in_16_bits(got, expected, row):
    """Of the mean of four rows: to a hundredth, or to a normaliser's rounding, which is as much as all of it here, see the docs."""
    rounding = 2.0**-23 * row.double().softmax(-1).norm() / 4
    return (got - expected).norm() <= max(1e-2 * expected.norm(), rounding)


@pytest.mark.parametrize("without", [-1e4, -1e9, -torch.inf])
def test_a_student_that_rules_out_an_unlikely_entry_has_the_16_bit_gradient_that_the_docs_say(without):
    """The loss is not small, and the gradient is."""
    teacher = logits(4, 100, 1)
    teacher[:, 5] = -10
    student = teacher.clone()
    student[:, 5] = without
    _, gradient_exact = exact(student.bfloat16(), teacher.bfloat16())
    _, gradient_fused = fused(student.bfloat16(), teacher.bfloat16())
    for got, expected, row in zip(gradient_fused, gradient_exact, student, strict=True):
        assert fits_in_16_bits(got, expected, row)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("level", [-1e9, -1e20, 1e28])
def test_a_row_that_is_one_large_number(level, divergence):
    """It is a uniform distribution; a float64 has no room for a logit beside the difference of the references."""
    flat, other = torch.full((4, 50), level), logits(4, 50, 1)
    for student, teacher in ((other, flat), (flat, other)):
        rows_exact, gradient_exact = exact(student, teacher, divergence=divergence)
        rows_fused, gradient_fused = fused(student, teacher, divergence=divergence)
        assert relative(rows_fused, rows_exact) <= 1e-6
        assert relative(gradient_fused, gradient_exact) <= 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("first", "then"), [((0.0, 0.0), (6.0, 7.0)), ((0.0, 0.0), (9.0, 6.0))])
def test_references_that_rise_apart_are_no_agreement(first, then, divergence):
    """How far the sides are apart was known relative to the references before."""
    student, teacher = (torch.full((1, 9 * 2048), high) for high in then)
    student[:, :2048], teacher[:, :2048] = first
    _, gradient_exact = exact(student, teacher, divergence=divergence)
    _, gradient_fused = fused(student, teacher, divergence=divergence)
    assert relative(gradient_fused, gradient_exact) <= 1e-4


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("scale", "noise", "temperature", "held_at", "k"),
    [(10.0, 1e-5, 1.0, 1.0, 2000), (10.0, 1e-5, 1.0, 1.0, 64), (1.0, 1e-4, 4.0, 1.0, 2000), (3.0, 1e-3, 20.0, 20.0, 64)],
)  # fmt: skip
def test_a_renormalised_top_k_that_nearly_agrees(scale, noise, temperature, held_at, k, divergence):
    """A normaliser that is added in float32 to a logarithm of 20 costs a thousandth of what is left."""
    teacher = logits(4, 2000, 1, scale=scale)
    student = teacher + noise * logits(4, 2000, 2, scale=scale)
    target = TopK.from_logits(teacher, k, temperature=held_at, rest="renormalise")
    settings = {"temperature": temperature, "divergence": divergence}
    rows_exact, gradient_exact = exact(student, target, **settings)
    rows_fused, gradient_fused = fused(student, target, **settings)
    assert relative(rows_fused, rows_exact) <= 1e-6
    assert relative(gradient_fused, gradient_exact) <= 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("precise", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("held_at", "temperature"),
    [(1.0, 0.05), (1.0, 1.0), (20.0, 1.0), (100.0, 0.5), (100.0, 0.05), (1.0, 100.0)],
)
@pytest.mark.parametrize("k", [1, 3, 64])
def test_a_renormalised_top_k_at_another_temperature(k, held_at, temperature, precise, divergence):
    """Log-probabilities far below 0 are taken to a power: what they are relative to the largest is what counts."""
    teacher = logits(8, 5000, 1)
    target = TopK.from_logits(
        teacher.double() if precise else teacher, k, temperature=held_at, rest="renormalise"
    )
    settings = {"temperature": temperature, "divergence": divergence}
    student = logits(8, 5000, 2)
    rows_exact, gradient_exact = exact(student, target, **settings)
    rows_fused, gradient_fused = fused(student, target, **settings)
    assert relative(rows_fused, rows_exact) <= 1e-6
    assert relative(gradient_fused, gradient_exact, 1e-6) <= 1e-6


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_student_with_nothing_outside_the_k_entries_has_a_gradient(backend):
    """As a dense row has: s - t, beside a loss that is infinite."""
    student = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf, -torch.inf]], requires_grad=True)
    target = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3]]).log())
    loss = softmax_kl(student, target, backend=backend)
    loss.backward()
    kept = student.detach()[0, :2].softmax(-1) - torch.tensor([0.5, 0.3])
    assert loss == torch.inf
    assert torch.allclose(student.grad, torch.cat([kept, torch.zeros(3)]), atol=1e-7)


def test_a_rest_that_a_large_number_stands_for_is_none():
    teacher = logits(3, 10, 1)
    teacher[:, 3:] = torch.finfo(torch.float32).min
    target = TopK.from_logits(teacher, 3)
    loss = softmax_kl(logits(3, 10, 2), target, divergence="reverse", reduction="none")
    assert (loss == torch.inf).all()  # the student has mass where the teacher has none


def test_a_mass_that_only_the_teacher_has_is_no_rounding():
    student, teacher = torch.tensor([[100.0, 0.0]]), torch.tensor([[9.4, 0.0]])
    rows_exact, _ = exact(student, teacher, divergence="jsd", beta=0.99)
    rows_fused, _ = fused(student, teacher, divergence="jsd", beta=0.99)
    assert relative(rows_fused, rows_exact) <= 1e-6


def test_what_neither_side_has_mass_for_is_no_outcome():
    """Its logarithm is finite on one side, and 0 times infinity was NaN."""
    student, teacher = torch.tensor([[0.0, 0.5, 1.0, -1.0, -1000.0]]), torch.zeros(1, 5)
    teacher[0, 4] = -torch.inf
    rows_exact, gradient_exact = exact(student, teacher, divergence="reverse")
    for target in (teacher, TopK.from_logits(teacher, 4)):
        rows_fused, gradient_fused = fused(student, target, divergence="reverse")
        assert relative(rows_fused, rows_exact) <= 1e-6
        assert relative(gradient_fused, gradient_exact) <= 1e-6


@pytest.mark.parametrize("draws", [64, 4096])
def test_repeated_draws_add_up(draws):
    student, teacher = logits(4, 2000, 1), logits(4, 2000, 2, scale=10.0)
    target = Sampled.from_logits(teacher, draws, generator=torch.Generator().manual_seed(3))
    _, gradient_exact = exact(student, target)
    _, gradient_fused = fused(student, target)
    assert relative(gradient_fused, gradient_exact) <= 1e-6


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_minus_infinity_is_an_entry_without_mass(backend, divergence):
    student, teacher = logits(4, 40, 1), logits(4, 40, 2)
    teacher[0, 3] = -torch.inf
    student[1, 5] = -torch.inf
    student[2, 7] = teacher[2, 7] = -torch.inf
    rows_exact, gradient_exact = exact(student, teacher, divergence=divergence)
    rows_fused, gradient_fused = fused(student, teacher, divergence=divergence, backend=backend)
    finite = rows_exact.isfinite()
    infinite_row = {"forward": 1, "reverse": 0, "jsd": None}[divergence]
    assert [i for i in range(4) if not finite[i]] == ([] if infinite_row is None else [infinite_row])
    assert torch.equal(rows_fused.isposinf(), ~finite)
    assert relative(rows_fused[finite], rows_exact[finite]) <= 1e-6
    assert gradient_fused.isfinite().all()
    assert relative(gradient_fused, gradient_exact) <= 1e-6


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_all_reductions_and_counts(backend):
    student, teacher = logits(12, 9, 1).reshape(3, 4, 9), logits(12, 9, 2).reshape(3, 4, 9)
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    rows = softmax_kl(student, teacher, mask=mask, reduction="none", backend=backend)
    assert rows.shape == (3, 4)
    assert rows[~mask].abs().max() == 0
    total = rows.sum()
    valid = mask.sum()
    for settings, expected in (
        ({"reduction": "sum"}, total),
        ({}, total / valid),
        ({"count": 7}, total / 7),
        ({"count": 2.5}, total / 2.5),
        ({"count": torch.tensor(7)}, total / 7),
        ({"count": torch.tensor(0)}, torch.tensor(0.0)),
        ({"count": 0}, torch.tensor(0.0)),
    ):
        got = softmax_kl(student, teacher, mask=mask, backend=backend, **settings)
        assert torch.allclose(got, expected, rtol=1e-6), settings


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_of_every_reduction(backend, dtype):
    student, teacher = logits(12, 9, 1, dtype=dtype), logits(12, 9, 2, dtype=dtype)
    _rows, mean = exact(student, teacher)
    weights = torch.rand(12, generator=torch.Generator().manual_seed(0))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    for settings, weight in (({}, 1.0), ({"reduction": "sum"}, 12.0), ({"count": torch.tensor(6.0)}, 2.0)):
        s = student.clone().requires_grad_()
        (softmax_kl(s, teacher, backend=backend, **settings) * 0.25).backward()
        assert relative(s.grad, mean * weight * 0.25) <= tolerance
    s = student.clone().requires_grad_()
    (softmax_kl(s, teacher, reduction="none", backend=backend) * weights).sum().backward()
    assert relative(s.grad, mean * 12 * weights[:, None]) <= tolerance


def test_layouts_do_not_matter():
    student, teacher = logits(12, 40, 1), logits(12, 40, 2)
    expected_rows, expected = fused(student, teacher)
    for layout in (
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x, x], 1)[:, :40],
        lambda x: torch.stack([x, x], 1)[:, 0],
    ):
        s = layout(student).detach().requires_grad_()
        loss = softmax_kl(s, layout(teacher), backend="numba")
        (gradient,) = torch.autograd.grad(loss, s)
        assert torch.equal(gradient.double(), expected)
    shaped = student.reshape(3, 4, 40).requires_grad_()
    (gradient,) = torch.autograd.grad(softmax_kl(shaped, teacher.reshape(3, 4, 40), backend="numba"), shaped)
    assert torch.equal(gradient.double().reshape(12, 40), expected)
    one = softmax_kl(student[0], teacher[0], reduction="none")
    assert one.shape == ()
    assert torch.allclose(one.double(), expected_rows[0])


def test_an_expanded_teacher_is_read_by_its_stride():
    student, teacher = logits(12, 40, 1), logits(1, 40, 2)
    rows, gradient = fused(student, teacher.expand(12, 40))
    rows_copied, gradient_copied = fused(student, teacher.repeat(12, 1))
    assert torch.equal(rows, rows_copied)
    assert torch.equal(gradient, gradient_copied)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_no_rows_at_all_is_zero(backend):
    student = torch.zeros(0, 5, requires_grad=True)
    loss = softmax_kl(student, torch.zeros(0, 5), backend=backend)
    assert loss.item() == 0
    loss.backward()
    assert student.grad.shape == (0, 5)


def test_mixed_dtypes():
    student, teacher = logits(8, 100, 1), logits(8, 100, 2)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rows, gradient = fused(student, teacher.to(dtype))
        rows_exact, gradient_exact = exact(student, teacher.to(dtype))
        assert relative(rows, rows_exact) <= 1e-6
        assert relative(gradient, gradient_exact) <= 1e-6
