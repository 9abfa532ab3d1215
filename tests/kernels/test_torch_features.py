"""The operator inside torch: autograd, autocast, torch.compile, activation checkpointing, tracing."""

from dataclasses import replace

import pytest
import torch
from cases import DIVERGENCES, exact, logits, relative
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from stillhouse.kernels import (
    Sampled,
    TopK,
    distillation_loss,
    linear_distillation_loss,
    linear_softmax_kl,
    ops,
    softmax_kl,
)
from stillhouse.kernels.targets import Labels


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def test_the_operator_passes_torchs_own_checks():
    student, teacher = logits(6, 20, 1), logits(6, 20, 2)
    top_k, y = TopK.from_logits(teacher, 3, temperature=2.0), Labels(torch.arange(6), None, 0.1)
    calls = [
        ops.call_of(teacher, None, 6, 2.0, "forward", 0.5),
        ops.call_of(top_k, None, 1, 2.0, "jsd", 0.5, per_row=True),
        ops.call_of(teacher, None, 6, 2.0, "forward", 0.5, labels=y, weights=(0.3, 0.7), label_count=6),
    ]
    for call in calls:
        for wants in (True, False):
            torch.library.opcheck(torch.ops.stillhouse.softmax_kl.default, (student, *call, wants))


def test_under_compile_as_one_graph():
    weight = logits(16, 30, 3, scale=0.3).requires_grad_()
    hidden, teacher = logits(8, 16, 1), logits(8, 30, 2)
    mask = torch.arange(8) < 6

    def step(w):
        return softmax_kl(hidden @ w, teacher, temperature=2.0, mask=mask) * 3.0

    expected = step(weight)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(weight)
    assert torch.allclose(got, expected)
    assert torch.allclose(*gradient(got, weight), *gradient(expected, weight), rtol=1e-5, atol=1e-7)


HALF = torch.full((2, 2), 0.5)
WRONG = {
    "an index too large": (lambda i: TopK(i + 28, HALF.log()), "TopK.indices: got 30"),
    "an index below 0": (lambda i: Sampled(i - 1, HALF), "Sampled.indices: got -1"),
    "a repeated index": (lambda i: TopK(i * 0, HALF.log()), "a repeated index"),
    "probabilities for logs": (lambda i: TopK(i, HALF), "TopK.log_probs"),
    "weights that do not sum": (lambda i: Sampled(i, HALF * 3), "Sampled.weights"),
}


@pytest.mark.parametrize("what", WRONG)
def test_values_are_refused_under_compile_as_without_it(what):
    """A compiled graph holds no branch on values: the operator looks at them when it runs."""
    make, message = WRONG[what]
    student = logits(2, 30, 1).requires_grad_()
    indices = torch.tensor([[0, 2], [1, 2]])

    def step(s, i):
        return softmax_kl(s, make(i))

    program = torch.compile(step, fullgraph=True, backend="aot_eager")
    messages = set()
    for run in (step, program):
        with pytest.raises(ValueError, match=message) as refusal:
            run(student, indices)
        messages.add(str(refusal.value))
    assert len(messages) == 1


@pytest.mark.parametrize("what", ["an index too large", "a repeated index"])
def test_values_of_a_renormalised_reverse_are_refused_under_compile(what):
    """It reads the student at the k entries alone, which must not happen before they are looked at."""
    student, index = logits(2, 30, 1).requires_grad_(), 30 if what == "an index too large" else 0
    indices = torch.tensor([[0, 2], [0, index]])

    def step(s, i):
        return softmax_kl(s, TopK(i, HALF.log(), "renormalise"), divergence="reverse")

    with pytest.raises(ValueError, match=r"TopK.indices: got"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(student, indices)


def test_samples_may_be_drawn_in_a_compiled_graph():
    student, teacher = logits(4, 30, 1).requires_grad_(), logits(4, 30, 2)
    program = torch.compile(
        lambda s, t: softmax_kl(s, Sampled.from_logits(t, 4)), fullgraph=True, backend="aot_eager"
    )
    assert program(student, teacher).isfinite()


def test_a_count_is_looked_at_under_compile():
    student, teacher = logits(2, 30, 1).requires_grad_(), logits(2, 30, 2)
    program = torch.compile(
        lambda s, count: softmax_kl(s, teacher, count=count), fullgraph=True, backend="aot_eager"
    )
    assert torch.allclose(program(student, torch.tensor(4.0)), softmax_kl(student, teacher, count=4.0))
    for wrong in (-1.0, torch.nan):
        with pytest.raises(ValueError, match="count: got"):
            program(student, torch.tensor(wrong))


@pytest.mark.slow
def test_under_compile_with_inductor():
    weight, hidden, teacher = logits(16, 30, 3).requires_grad_(), logits(8, 16, 1), logits(8, 30, 2)

    def step(w):
        return softmax_kl(hidden @ w, teacher) * 3.0

    expected = step(weight)
    got = torch.compile(step)(weight)
    assert torch.allclose(got, expected)
    assert torch.allclose(*gradient(got, weight), *gradient(expected, weight), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant):
    weight, hidden, teacher = logits(16, 30, 3).requires_grad_(), logits(8, 16, 1), logits(8, 30, 2)
    expected = softmax_kl(hidden @ weight, teacher)
    got = checkpoint(lambda w: softmax_kl(hidden @ w, teacher), weight, use_reentrant=reentrant)
    assert torch.equal(got, expected)
    assert torch.equal(*gradient_by_backward(got, weight), *gradient(expected, weight))


def gradient_by_backward(loss, leaf):
    leaf.grad = None
    loss.backward()
    return (leaf.grad,)


def test_under_autocast():
    weight, hidden, teacher = logits(16, 30, 3).requires_grad_(), logits(8, 16, 1), logits(8, 30, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = hidden @ weight
        assert product.dtype == torch.bfloat16
        got = softmax_kl(product, teacher)
        fused = linear_softmax_kl(hidden, weight.t(), teacher)
    assert got.dtype == fused.dtype == torch.float32
    rows, _ = exact(product, teacher)
    assert abs(got.item() - rows.mean().item()) <= 1e-6 * rows.mean().item()
    assert abs(fused.item() - rows.mean().item()) <= 1e-6 * rows.mean().item()
    (one,) = gradient(got, weight)
    (two,) = gradient(fused, weight)
    assert one.dtype == two.dtype == torch.float32
    assert relative(two, one) <= 1e-2


@pytest.mark.parametrize("call", ["softmax_kl", "linear_softmax_kl"])
def test_second_derivatives_raise(call):
    student, teacher = logits(4, 9, 1).requires_grad_(), logits(4, 5, 2)
    weight = logits(5, 9, 3)
    loss = (
        softmax_kl(student @ weight.t(), teacher, backend="numba")
        if call == "softmax_kl"
        else linear_softmax_kl(student, weight, teacher)
    )
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative.*backend='torch'"):
        first.sum().backward(retain_graph=True)
    # asked for one input, a graph that ends before it counts as "unused": zero, in a Hessian
    with pytest.raises(RuntimeError, match=r"second derivative.*backend='torch'"):
        torch.autograd.grad(first.sum(), student, allow_unused=True)


@pytest.mark.parametrize("call", ["softmax_kl", "linear_softmax_kl"])
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_raises_instead_of_giving_zero(call, grad):
    student, teacher, weight = logits(4, 9, 1).requires_grad_(grad), logits(4, 5, 2), logits(5, 9, 3)

    def loss(x):
        if call == "softmax_kl":
            return softmax_kl(x @ weight.t(), teacher)
        return linear_softmax_kl(x, weight, teacher)

    with pytest.raises(RuntimeError, match=r"forward-mode derivative.*backend='torch'"):
        torch.func.jvp(loss, (student,), (torch.ones(4, 9),))


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("kind", ["dense", "top-k", "rest"])
def test_no_derivative_of_any_kind_reaches_the_target(kind, backend):
    student, teacher = logits(4, 9, 1), logits(4, 9, 2)
    top_k = TopK.from_logits(teacher, 3)
    value = {"dense": teacher, "top-k": top_k.log_probs, "rest": top_k.log_rest}[kind]

    def loss(s, value):
        target = {
            "dense": lambda: value,
            "top-k": lambda: replace(top_k, log_probs=value),
            "rest": lambda: replace(top_k, log_rest=value),
        }[kind]()
        return softmax_kl(s, target, backend=backend)

    asked = value.clone().requires_grad_()
    loss(student.clone().requires_grad_(), asked).backward()
    assert asked.grad is None
    assert not loss(student, asked).requires_grad
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        assert forward_ad.unpack_dual(loss(student, dual)).tangent is None
    if backend == "torch":
        assert torch.func.jvp(lambda v: loss(student, v), (value,), (torch.ones_like(value),))[1] == 0
        nested = torch.func.grad(lambda v: torch.func.grad(loss)(student, v).pow(2).sum())(value)
        assert not nested.any()


def test_the_torch_backend_has_second_derivatives():
    student, teacher = logits(4, 9, 1).requires_grad_(), logits(4, 9, 2)
    (first,) = torch.autograd.grad(softmax_kl(student, teacher, backend="torch"), student, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), student)
    assert second.abs().max() > 0


@pytest.mark.parametrize("call", ["softmax_kl", "linear_softmax_kl"])
def test_backward_twice_gives_the_same_gradient(call):
    student, teacher, weight = logits(4, 9, 1).requires_grad_(), logits(4, 5, 2), logits(5, 9, 3)
    loss = (
        softmax_kl(student @ weight.t(), teacher)
        if call == "softmax_kl"
        else linear_softmax_kl(student, weight, teacher)
    )
    loss = loss * 0.5
    (one,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = one.clone()
    (two,) = torch.autograd.grad(loss, student)
    assert torch.equal(one, kept)
    assert torch.equal(two, kept)


def test_in_place_gives_the_same_gradient_and_tells_who_saved_the_logits():
    weight, hidden, teacher = logits(16, 30, 3).requires_grad_(), logits(8, 16, 1), logits(8, 30, 2)
    for backend in ("numba", "torch"):
        product = hidden @ weight
        loss = softmax_kl(product, teacher, inplace=True, backend=backend)
        expected = softmax_kl(hidden @ weight, teacher, backend=backend)
        assert torch.equal(loss, expected)
        assert torch.equal(*gradient(loss, weight), *gradient(expected, weight))
    product = hidden @ weight
    saved = product.exp()
    saved_too = product.sigmoid() * product  # multiplication saves the logits
    softmax_kl(product, teacher, inplace=True, backend="numba").backward(retain_graph=True)
    saved.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved_too.sum().backward()


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "top-k", "sampled"])
def test_in_place_is_the_same_for_every_target(kind, dtype, divergence):
    """The rows are read before they are overwritten: what aliases is the caller's memory."""
    if kind == "sampled" and divergence != "forward":
        pytest.skip("samples are for the forward divergence")
    student, teacher = logits(8, 5000, 1, dtype=dtype), logits(8, 5000, 2)
    draws = torch.Generator().manual_seed(0)
    made = {
        "dense": lambda: teacher,
        "top-k": lambda: TopK.from_logits(teacher, 7),
        "sampled": lambda: Sampled.from_logits(teacher, 7, generator=draws),
    }
    target = made[kind]()
    fresh, over = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = softmax_kl(fresh, target, divergence=divergence)
    made = over.clone()
    got = softmax_kl(made, target, divergence=divergence, inplace=True)
    assert torch.equal(got, expected)
    assert torch.equal(*gradient(got, over), *gradient(expected, fresh))
    assert not torch.equal(made, student)


@pytest.mark.parametrize("first", ["student", "teacher"])
def test_in_place_spares_rows_that_are_also_the_target(first):
    """Each position against the next one, in one tensor: a gradient must not be read as a teacher's logits."""
    weight, hidden = logits(16, 30, 3).requires_grad_(), logits(9, 16, 1)
    for backend in ("numba", "torch"):
        both = hidden @ weight
        student, teacher = (both[:-1], both[1:]) if first == "student" else (both[1:], both[:-1])
        expected = softmax_kl(student, teacher.detach().clone(), backend=backend)
        assert torch.equal(softmax_kl(student, teacher, inplace=True, backend=backend), expected)


def test_in_place_takes_logits_with_a_negative_bit():
    weight, hidden, teacher = logits(16, 30, 3).requires_grad_(), logits(8, 16, 1), logits(8, 30, 2)
    got = softmax_kl(torch._neg_view(hidden @ weight), teacher, inplace=True)
    expected = softmax_kl(-(hidden @ weight), teacher)
    assert torch.equal(got, expected)
    assert torch.equal(*gradient(got, weight), *gradient(expected, weight))


def test_no_gradient_is_computed_where_none_is_wanted():
    student, teacher = logits(8, 30, 1), logits(8, 30, 2)
    before = student.clone()
    loss = softmax_kl(student, teacher, inplace=True)
    assert not loss.requires_grad
    assert torch.equal(student, before)
    with torch.inference_mode():
        assert torch.equal(softmax_kl(student, teacher), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("width", [3, 17, 100, 1000, 5000])
def test_a_loss_is_the_same_bits_with_and_without_a_gradient(width, divergence, dtype):
    teacher = logits(100, width, 2, dtype=dtype)
    for student in (logits(100, width, 1, dtype=dtype), (teacher + logits(100, width, 3) / 10).to(dtype)):
        settings = {"divergence": divergence, "reduction": "none"}
        alone = softmax_kl(student, teacher, **settings)
        assert torch.equal(alone, softmax_kl(student.requires_grad_(), teacher, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("target", ["dense", "top-k", "sampled"])
def test_no_valid_row_at_all_gives_zero(target, dtype):
    teacher = logits(4, 17, 2)
    against = {"top-k": TopK.from_logits, "sampled": Sampled.from_logits}.get(target, lambda x, k: x)(
        teacher, 5
    )
    for nothing in (
        {"mask": torch.zeros(4, dtype=torch.bool)}, {"count": 0}, {"count": torch.tensor(0)},
        {"count": torch.tensor(0.0)},
    ):  # fmt: skip
        student = logits(4, 17, 1, dtype=dtype).requires_grad_()
        loss = softmax_kl(student, against, **nothing)
        loss.backward()
        assert loss == 0
        assert torch.equal(student.grad, torch.zeros_like(student)), nothing


def test_the_target_gets_no_gradient():
    student, teacher = logits(8, 30, 1).requires_grad_(), logits(8, 30, 2).requires_grad_()
    for backend in ("numba", "torch"):
        softmax_kl(student, teacher, backend=backend).backward()
        assert teacher.grad is None


def test_what_torch_func_asks_for():
    student, teacher = logits(8, 9, 1).reshape(4, 2, 9), logits(8, 9, 2).reshape(4, 2, 9)
    y = torch.arange(8).reshape(4, 2)

    def both(s, t, y):
        return sum(distillation_loss(s, t, y, backend="torch"))

    expected = torch.stack([both(*each) for each in zip(student, teacher, y, strict=True)])
    assert torch.allclose(torch.func.vmap(both)(student, teacher, y), expected)
    first = torch.func.vmap(torch.func.grad(both))(student, teacher, y)
    leaf = student.clone().requires_grad_()
    sum(both(*each) for each in zip(leaf, teacher, y, strict=True)).backward()
    assert torch.allclose(first, leaf.grad)
    with pytest.raises(RuntimeError, match=r"torch\.func.*backend='torch'"):
        torch.func.grad(softmax_kl)(student, teacher)


@pytest.mark.parametrize("backend", [None, "numba", "torch"])
@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("kind", ["dense", "top-k", "sampled"])
def test_what_was_made_in_inference_mode_is_taken_by_every_path(kind, rows, backend):
    """A teacher's step: as good as one under no_grad, whatever the size of the last batch."""
    made = {"dense": lambda t: t.clone(), "top-k": lambda t: TopK.from_logits(t, 8)}
    made["sampled"] = lambda t: Sampled.from_logits(t, 8, generator=torch.Generator().manual_seed(0))
    teacher, found = logits(rows, 1000, 2), []
    for mode in (torch.no_grad, torch.inference_mode):
        student = logits(rows, 1000, 1).requires_grad_()
        hidden, weight = logits(rows, 4, 3).requires_grad_(), logits(1000, 4, 4).requires_grad_()
        with mode():
            target, mask, y = made[kind](teacher), torch.arange(rows) % 4 != 0, torch.arange(rows)
            soft = teacher.softmax(-1)
        for labels in (y, soft):
            sum(distillation_loss(student, target, labels, mask=mask, backend=backend)).backward()
            sum(
                linear_distillation_loss(hidden, weight, target, labels, mask=mask, backend=backend)
            ).backward()
        found.append((student.grad, hidden.grad, weight.grad))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_lazy_negation_is_read_as_what_it_stands_for(backend):
    def negative(x):
        return torch._neg_view(-x)  # as of a conjugate's imaginary part

    student, teacher = logits(8, 30, 1), logits(8, 30, 2)
    y, kept = teacher.softmax(-1), TopK.from_logits(teacher, 4)
    lazy = replace(kept, log_probs=negative(kept.log_probs), log_rest=negative(kept.log_rest))
    for target, same in ((teacher, negative(teacher)), (kept, lazy)):
        leaves = [student.clone().requires_grad_() for _ in range(2)]
        plain = distillation_loss(leaves[0], target, y, backend=backend)
        got = distillation_loss(negative(leaves[1]), same, negative(y), backend=backend)
        assert torch.equal(torch.stack(got), torch.stack(plain))
        sum(plain).backward()
        sum(got).backward()
        assert torch.equal(leaves[1].grad, leaves[0].grad)


@pytest.mark.parametrize("wrong", [-0.01, torch.nan])
def test_soft_labels_that_are_none_give_no_number_under_compile(wrong):
    """There they are not looked at: NaN, as on a GPU."""
    student, teacher = logits(8, 30, 1), logits(8, 30, 2)
    y = teacher.softmax(-1)
    compiled = torch.compile(lambda s, y: distillation_loss(s, teacher, y).label, backend="aot_eager")
    assert compiled(student, y).isfinite()
    y[3, 4] = wrong
    assert compiled(student, y).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gradient_that_was_handed_out_is_the_callers(dtype):
    leaf, teacher = logits(8, 30, 1, dtype=dtype).requires_grad_(), logits(8, 30, 2, dtype=dtype)
    loss = softmax_kl(leaf, teacher, backend="numba")
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    before = first.clone()
    first.mul_(0.5)
    loss.backward()
    assert torch.equal(leaf.grad, before)
