"""The bits of a result depend on the numbers alone, not on where the allocator put them."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys

import pytest
import torch
from cases import DIVERGENCES

from stillhouse.kernels import Sampled, TopK, cpu
from stillhouse.kernels.cpu.workers import Workers
from stillhouse.kernels.targets import Labels

ROWS, WIDTH, K = 200, 10, 4
GAPS = (0, 1, 16, 24, 48, 64, 96, 160, 1024)  # float32 between neighbours in memory


def targets(student: torch.Tensor, draw: torch.Generator) -> dict[str, object]:
    """Near the student, where sums of the gradient are small and show how they were added up."""
    logits = student + torch.randn(ROWS, WIDTH, generator=draw) / 2
    log_p, at = logits.log_softmax(-1).topk(K)
    return {
        "dense": logits,
        "top-k": TopK(at, log_p, rest="ghost"),
        "sampled": Sampled(at, log_p.softmax(-1)),
    }


@pytest.mark.parametrize(
    ("kind", "divergence"), [*itertools.product(["dense", "top-k"], DIVERGENCES), ("sampled", "forward")]
)
def test_bits_do_not_depend_on_where_memory_lies(kind, divergence, monkeypatch):
    """Scratch memory right before and right behind the student, the teacher and the gradient."""
    draw = torch.Generator().manual_seed(5)
    student = torch.randn(ROWS, WIDTH, generator=draw)
    target = targets(student, draw)[kind]
    monkeypatch.setattr(cpu, "_workers", Workers())  # no thread of another test has scratch in it
    call(student, target, divergence, torch.empty_like(student))
    need = cpu._workers._local.memory.numel()
    seen = {
        (order, gap): place_and_call(student, target, divergence, order, gap, need)
        for order in itertools.permutations(("scratch", "student", "teacher", "gradient"))
        for gap in GAPS
    }
    results = len(set(seen.values()))
    assert results == 1, f"{results} different results at {len(seen)} places"


def place_and_call(student, target, divergence, order, gap, need) -> bytes:
    sizes = {"scratch": need} | dict.fromkeys(("student", "teacher", "gradient"), ROWS * WIDTH)
    pool = torch.full((sum(sizes.values()) + 5 * gap,), float("nan"))
    at, first = {}, gap
    for name in order:
        at[name] = pool[first : first + sizes[name]]
        first += sizes[name] + gap
    mine = at["student"].view(ROWS, WIDTH).copy_(student)
    gradient = at["gradient"].view(ROWS, WIDTH)
    if isinstance(target, torch.Tensor):
        target = at["teacher"].view(ROWS, WIDTH).copy_(target)
    cpu._workers._local.memory = at["scratch"]
    losses = call(mine, target, divergence, gradient)
    assert cpu._workers._local.memory is at["scratch"], "the scratch that was laid out is the one in use"
    return losses.numpy().tobytes() + gradient.numpy().tobytes()


def call(student, target, divergence, gradient, labels=None) -> torch.Tensor:
    return cpu.softmax_kl_fwd_bwd(
        student, target, temperature=4.0, divergence=divergence, beta=0.3, mask=None,
        scales=(1 / ROWS, 1 / ROWS), out_grad=gradient, labels=labels,
    )[0]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages of memory as Linux does")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "top-k", "sampled"])
def test_nothing_beyond_a_row_is_touched(kind, dtype):
    """Logits and gradient end where the page after is out of bounds; what is asked for ahead must be no access."""
    draw = torch.Generator().manual_seed(5)
    for width in (1, 15, 16, 17, 1000, 2049):
        student = torch.randn(3, width, generator=draw).to(dtype)
        log_p, at = torch.randn(3, width, generator=draw).log_softmax(-1).topk(min(K, width))
        teacher = at_a_border(torch.randn(3, width, generator=draw).to(dtype))
        target = {"dense": teacher, "top-k": TopK(at, log_p), "sampled": Sampled(at, log_p.softmax(-1))}[kind]
        mine, gradient = at_a_border(student), at_a_border(torch.empty_like(student))
        assert call(mine, target, "forward", gradient).isfinite().all()
        assert gradient.isfinite().all()
        soft = at_a_border(torch.rand(3, width, generator=draw))
        for labels in (Labels(torch.tensor([0, -100, width - 1]), None, 0.1), Labels(None, soft, 0.0)):
            mine = at_a_border(student)
            assert call(mine, target, "forward", mine, labels).isfinite().all()
            assert mine.isfinite().all()


def at_a_border(x: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last before a page that must not be touched."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    memory = mmap.mmap(-1, (-(-size // page) + 1) * page)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    border = len(memory) - page
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(whole.data_ptr() + border), ctypes.c_size_t(page), 0) == 0
    return whole[border - size : border].view(x.dtype).view(x.shape).copy_(x)
