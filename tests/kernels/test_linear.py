"""The fused last layer against the same layer and loss apart."""

import re

import pytest
import torch
from cases import logits, relative
from test_processes import allocated

from stillhouse.kernels import Sampled, TeacherHead, TopK, chunks, linear_softmax_kl, softmax_kl


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 7 * 50)  # 7 rows of 50 at a time


def layer(dtype=torch.float32):
    hidden, weight, bias = logits(40, 16, 1, 1.0), logits(50, 16, 2, 1.0), logits(1, 50, 3, 1.0)[0]
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]


def targets():
    teacher = logits(40, 50, 4)
    return {
        "dense": teacher,
        "top-k": TopK.from_logits(teacher, 5, temperature=2.0),
        "renormalised": TopK.from_logits(teacher, 5, temperature=2.0, rest="renormalise"),
        "sampled": Sampled.from_logits(
            teacher, 5, temperature=2.0, generator=torch.Generator().manual_seed(0)
        ),
    }


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("kind", ["dense", "top-k", "renormalised", "sampled"])
def test_agrees_with_the_parts(kind, divergence, reduction):
    if kind == "sampled" and divergence != "forward":
        pytest.skip("samples are for the forward divergence")
    inputs, target = layer(), targets()[kind]
    settings = {
        "temperature": 2.0, "divergence": divergence, "reduction": reduction, "mask": torch.arange(40) % 5 != 0
    }  # fmt: skip
    upstream = torch.rand(40) if reduction == "none" else torch.tensor(0.7)
    hidden, weight, bias = inputs
    got = linear_softmax_kl(hidden, weight, target, bias=bias, **settings)
    mine = torch.autograd.grad((got * upstream).sum(), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = softmax_kl(torch.nn.functional.linear(*exact), target, **settings)
    theirs = torch.autograd.grad((expected * upstream).sum(), exact)
    assert got.shape == expected.shape
    assert relative(got, expected) <= 2e-6
    for one, two in zip(mine, theirs, strict=True):
        assert relative(one, two) <= 3e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype):
    inputs, target = layer(dtype), targets()["dense"].to(dtype)
    got = linear_softmax_kl(*inputs[:2], target, bias=inputs[2])
    mine = torch.autograd.grad(got * 0.5, inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    theirs = torch.autograd.grad(0.5 * softmax_kl(torch.nn.functional.linear(*exact), target.double()), exact)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for one, two in zip(mine, theirs, strict=True):
        assert one.dtype == dtype
        assert relative(one, two) <= tolerance


def test_a_teacher_of_hidden_states():
    hidden, weight, _ = layer()
    states, head, bias = logits(40, 8, 5, 1.0), logits(60, 8, 6, 1.0), logits(1, 60, 7)[0]
    got = linear_softmax_kl(hidden, weight, TeacherHead(states, head, bias))
    expected = softmax_kl(hidden @ weight.t(), torch.nn.functional.linear(states, head, bias))
    assert torch.allclose(got, expected, rtol=1e-5)
    for one, two in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (got, expected)), strict=True):
        assert relative(one, two) <= 3e-6


def test_only_the_gradients_that_are_wanted():
    hidden, weight, bias = (x.detach() for x in layer())
    target = targets()["dense"]
    weight.requires_grad_()
    linear_softmax_kl(hidden, weight, target, bias=bias).backward()
    assert hidden.grad is None
    assert weight.grad is not None
    assert not linear_softmax_kl(hidden, weight.detach(), target, bias=bias).requires_grad


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradient_is_computed_where_none_is_wanted(reduction, without, backend, monkeypatch):
    monkeypatch.setattr(chunks, "_accumulate", None)
    hidden, weight, bias = layer()
    target, settings = targets()["dense"], {"reduction": reduction, "backend": backend}
    with without():
        got = linear_softmax_kl(hidden, weight, target, bias=bias, **settings)
        expected = softmax_kl(torch.nn.functional.linear(hidden, weight, bias), target, **settings)
    assert torch.allclose(got, expected, rtol=1e-5)


def test_leading_dimensions_and_no_rows():
    hidden, weight, _ = layer()
    target = targets()["dense"]
    flat = linear_softmax_kl(hidden, weight, target, reduction="none")
    shaped = linear_softmax_kl(hidden.reshape(4, 10, 16), weight, target.reshape(4, 10, 50), reduction="none")
    assert torch.equal(shaped.reshape(-1), flat)
    assert linear_softmax_kl(hidden[:0], weight, target[:0]).item() == 0


@pytest.mark.parametrize(
    ("dtype", "backend", "head", "most"),
    [
        (torch.float32, None, False, 2.2),
        (torch.float32, None, True, 3.2),
        (torch.bfloat16, None, True, 6.2),
        (torch.float16, None, True, 5.2),
        (torch.float32, "torch", False, 28.8),
    ],
)
def test_no_more_is_held_than_the_chunk_at_hand(dtype, backend, head, most, monkeypatch):
    """In multiples of a chunk's logits, which are as many as weights. The torch backend keeps what autograd does."""
    rows, width, size = 4 * 64, 4096, 64
    monkeypatch.setattr(chunks, "CHUNK", 64 * width)
    hidden, weight, states, other = (
        torch.randn(n, size, dtype=dtype).requires_grad_() for n in (rows, width, rows, width)
    )
    target = TeacherHead(states, other) if head else torch.randn(rows, width, dtype=dtype)

    def run():
        linear_softmax_kl(hidden, weight, target, backend=backend).backward()
        # at the end: the profiler may or may not see what goes that was there before
        hidden.grad = weight.grad = None

    assert allocated(run) <= most * 64 * width * hidden.element_size()


@pytest.mark.slow
def test_memory_stays_below_a_tenth_of_the_unfused_path(monkeypatch):
    monkeypatch.undo()
    rows, width, size = 4096, 32000, 512
    hidden, weight = (
        torch.randn(rows, size).requires_grad_(),
        (torch.randn(width, size) / 22).requires_grad_(),
    )
    teacher = torch.randn(rows, width)

    def step(loss):
        def run():
            hidden.grad = weight.grad = None
            loss().backward()

        return run

    # beyond the gradients: those of the step before are given back first, which is as much as they take
    unfused = allocated(step(lambda: softmax_kl(hidden @ weight.t(), teacher)))
    fused = allocated(step(lambda: linear_softmax_kl(hidden, weight, teacher)))
    assert fused <= 0.1 * unfused


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_float16_is_divided_by_the_count_after_the_scaler_has_lifted_it(backend):
    """1/count times a small gradient is nothing in float16, and a sum over many rows can be more than it holds."""
    inputs, teacher = layer(torch.float16), logits(40, 50, 4)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    scale, count = 2.0**15, 2.0**18
    scaled = linear_softmax_kl(*inputs[:2], teacher, bias=inputs[2], count=count, backend=backend) * scale
    exact = linear_softmax_kl(*wide[:2], teacher, bias=wide[2], count=count)
    for got, expected in zip(
        torch.autograd.grad(scaled, inputs), torch.autograd.grad(exact, wide), strict=True
    ):
        assert relative(got.double() / scale, expected) <= 2e-3
    hidden = torch.full((4096, 1), 30.0, dtype=torch.float16)
    weight = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    against = torch.tensor([[9.0, -9.0]]).expand(4096, 2)
    (one_sided,) = torch.autograd.grad(linear_softmax_kl(hidden, weight, against, backend=backend), weight)
    assert torch.allclose(one_sided.float(), torch.tensor([[-15.0], [15.0]]), rtol=1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_a_masked_row_holds_reaches_no_gradient(value):
    hidden, weight, bias = (
        logits(6, 8, 1),
        logits(20, 8, 3).requires_grad_(),
        logits(1, 20, 4)[0].requires_grad_(),
    )
    teacher, mask = logits(6, 20, 2), torch.tensor([True, False, True, True, False, True])
    spoilt = hidden.masked_fill(~mask[:, None], value).requires_grad_()
    expected = linear_softmax_kl(hidden.requires_grad_(), weight, teacher, bias=bias, mask=mask)
    wanted = torch.autograd.grad(expected, (hidden, weight, bias))
    loss = linear_softmax_kl(spoilt, weight, teacher, bias=bias, mask=mask)
    for got, want in zip(torch.autograd.grad(loss, (spoilt, weight, bias)), wanted, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_refused_row_of_a_later_chunk_can_be_found(backend):
    hidden, weight, _ = (x.detach() for x in layer())
    hidden[33] = torch.nan
    with pytest.raises(ValueError, match="flattened hidden states") as raised:
        linear_softmax_kl(hidden, weight, targets()["dense"], backend=backend)
    within, first = map(
        int, re.search(r"in row (\d+) .* counted from row (\d+) of", str(raised.value)).groups()
    )
    assert within + first == 33
    assert first > 0
