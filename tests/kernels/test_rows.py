"""A row is what it is alone: its neighbours, a mask, threads and writing in place change no bit of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import DIVERGENCES, logits

from stillhouse.kernels import Sampled, TopK, cpu
from stillhouse.kernels.cpu import workers

ROWS = 11
MASKS = {
    "none": None,
    "last": [True] * 10 + [False],
    "first": [False] + [True] * 10,
    "last ones": [True] * 4 + [False] * 7,
    "every other": [True, False] * 5 + [True],
    "all but one": [False] * 5 + [True] + [False] * 5,
    "all": [False] * 11,
}


def target_of(kind, teacher):
    if kind == "dense":
        return teacher
    if kind == "sampled":
        return Sampled.from_logits(teacher.float(), 5, generator=torch.Generator().manual_seed(3))
    top_k = TopK.from_logits(teacher.float(), min(5, teacher.shape[1] - 1))
    # a row whose reverse divergence is infinite: its gradient is defined as zero, and written apart
    top_k.log_probs[6, 1] = -math.inf
    return top_k if kind == "ghost" else replace(top_k, rest="renormalise", log_rest=None)


def row_of(target, r):
    if isinstance(target, torch.Tensor):
        return target[r : r + 1]
    if isinstance(target, Sampled):
        return replace(target, indices=target.indices[r : r + 1], weights=target.weights[r : r + 1])
    rest = None if target.log_rest is None else target.log_rest[r : r + 1]
    return replace(
        target, indices=target.indices[r : r + 1], log_probs=target.log_probs[r : r + 1], log_rest=rest
    )


def call(student, target, mask, out, divergence):
    losses, _ = cpu.softmax_kl_fwd_bwd(
        student,
        target,
        temperature=1.0,
        divergence=divergence,
        beta=0.3,
        mask=mask,
        scales=(0.5, 0.0),
        out_grad=out,
    )
    return losses[0]


@pytest.fixture
def threads(monkeypatch):
    """Sets their number, which then holds for small calls too."""
    monkeypatch.setattr(workers, "SERIAL", 0)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [9, 1000, 2048, 2049])
@pytest.mark.parametrize(
    ("kind", "divergence"),
    [*itertools.product(["dense", "ghost", "renormalise"], DIVERGENCES), ("sampled", "forward")],
)
def test_a_row_is_the_same_alone_and_among_others(kind, divergence, width, dtype, threads):
    """Up to 2,048 columns a row against a top k or samples is written while the next is read."""
    student, teacher = logits(ROWS, width, 1, dtype=dtype), logits(ROWS, width, 2, dtype=dtype)
    target = target_of(kind, teacher)
    losses, gradients = torch.empty(ROWS), torch.full_like(student, math.nan)
    for r in range(ROWS):
        losses[r] = call(student[r : r + 1], row_of(target, r), None, gradients[r : r + 1], divergence)[0]
    for name, kept in MASKS.items():
        mask = None if kept is None else torch.tensor(kept)
        counts = torch.ones(ROWS, dtype=torch.bool) if mask is None else mask
        for number in (1, 3):
            threads(number)
            for inplace in (False, True):
                given = student.clone()
                out = given if inplace else torch.full_like(student, math.nan)
                got = call(given, target, mask, out, divergence)
                where = f"mask {name}, {number} threads, inplace {inplace}"
                assert torch.equal(got, torch.where(counts, losses, 0.0)), where
                assert torch.equal(out, torch.where(counts[:, None], gradients, 0.0)), where
            assert torch.equal(call(student, target, mask, None, divergence), got), f"loss alone, mask {name}"
