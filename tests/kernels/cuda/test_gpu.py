"""On a GPU: the same checks as on the interpreter, graphs and streams. Skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest
import torch

from stillhouse.kernels import cuda, distillation_loss
from stillhouse.kernels.reference import softmax_kl_rows
from stillhouse.kernels.targets import Sampled, TopK

USABLE, WHY = cuda.available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not USABLE, reason=f"needs a GPU: {WHY}")]
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def pair(rows, v, dtype):
    made = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(rows, v, generator=made) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def compute(student, target, divergence, out=None, **options):
    out = torch.empty_like(student) if out is None else out
    loss = cuda.softmax_kl_fwd_bwd(
        student, target, temperature=2.0, divergence=divergence, beta=0.3, out_grad=out, **options
    )
    return loss[0], out


@pytest.mark.parametrize("v", [2, 10, 100, 1000, 4096, 32000, 50257, 128256, 262144])
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("kind", ["dense", "ghost", "renormalise", "sampled"])
def test_matches_float64(v, dtype, divergence, kind):
    if kind == "renormalise" and divergence == "reverse":
        pytest.skip("the student is restricted to the k entries first")
    student, teacher = pair(5, v, dtype)
    target = teacher
    if kind == "sampled":
        target = Sampled.from_logits(teacher, 8, temperature=2.0)
    elif kind != "dense":
        target = TopK.from_logits(teacher, min(8, v - 1), rest=kind, temperature=2.0)
    wide = student.double().requires_grad_()
    expected = softmax_kl_rows(wide, target.double() if kind == "dense" else target, 2.0, divergence, 0.3)
    expected.sum().backward()
    if kind == "dense":
        there = target.cuda()
    elif kind == "sampled":
        there = Sampled(target.indices.cuda(), target.weights.cuda(), 2.0)
    else:
        rest = None if target.log_rest is None else target.log_rest.cuda()
        there = TopK(target.indices.cuda(), target.log_probs.cuda(), kind, 2.0, log_rest=rest)
    loss, grad = compute(student.cuda(), there, divergence)
    assert torch.allclose(loss.cpu().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert (grad.cpu().double() - wide.grad).norm() <= LIMITS[dtype] * wide.grad.norm() + 1e-6


@pytest.mark.parametrize("kind", ["dense", "top-k", "sampled"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_both_terms_match_float64(smoothing, kind):
    """By way of the public function, as training calls it; weights that it was not told take one more pass."""
    student, teacher = pair(64, 4096, torch.float32)
    target, there = teacher, teacher.cuda()
    if kind == "top-k":
        target = TopK.from_logits(teacher, 8, temperature=2.0)
        there = TopK.from_logits(teacher.cuda(), 8, temperature=2.0)
    elif kind == "sampled":
        target = Sampled.from_logits(teacher, 8, temperature=2.0)
        there = Sampled(target.indices.cuda(), target.weights.cuda(), 2.0)
    labels = torch.arange(64)
    labels[::5] = -100
    for weights in ((0.9, 0.1), (0.2, 0.8)):
        ours, exact = student.cuda().requires_grad_(), student.double().requires_grad_()
        settings = {"temperature": 2.0, "label_smoothing": smoothing, "weights": (0.9, 0.1)}
        got = distillation_loss(ours, there, labels.cuda(), backend="cuda", **settings)
        expected = distillation_loss(exact, target, labels, backend="torch", **settings)
        for terms in (got, expected):
            (weights[0] * terms.soft + weights[1] * terms.label).backward()
        assert torch.allclose(torch.stack(got).cpu().double(), torch.stack(expected), rtol=1e-5)
        assert (ours.grad.cpu().double() - exact.grad).norm() <= 1e-5 * exact.grad.norm()


@pytest.mark.parametrize("v", [100, 32000])
def test_a_loss_alone_allocates_no_gradient(v):
    student, teacher = (t.cuda() for t in pair(64, v, torch.float32))
    whole, _ = compute(student, teacher, "forward")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    alone = cuda.softmax_kl_fwd_bwd(
        student, teacher, temperature=2.0, divergence="forward", beta=0.3, out_grad=None
    )[0]
    assert torch.equal(alone, whole)
    assert torch.cuda.max_memory_allocated() - before < student.numel() * 4


def test_two_runs_give_the_same_bits():
    student, teacher = (t.cuda() for t in pair(64, 128256, torch.bfloat16))
    first, second = compute(student, teacher, "forward"), compute(student, teacher, "forward")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_graph_replays_it():
    student, teacher = (t.cuda() for t in pair(64, 32000, torch.bfloat16))
    out = torch.empty_like(student)
    expected, _ = compute(student, teacher, "forward", out)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, _ = compute(student, teacher, "forward", out)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss, expected)
    assert out.abs().sum() > 0


def test_runs_on_the_current_stream_without_waiting():
    student, teacher = (t.cuda() for t in pair(8, 4096, torch.float32))
    expected, _ = compute(student, teacher, "forward")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, _ = compute(student, teacher, "forward")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(loss, expected)
