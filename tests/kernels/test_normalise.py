"""Normalisers of the torch backend, which torch's own sums get wrong where vectors are short."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DIVERGENCES, exact, fused, logits, relative

from stillhouse.kernels import Sampled, TopK, softmax_kl
from stillhouse.kernels.normalise import log_softmax

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": ""}
PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from cases import exact, fused, logits, relative
from stillhouse.kernels import TopK
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
student, teacher = logits(2, 151_936, 1), logits(2, 152_064, 2)
for divergence in ("forward", "reverse", "jsd"):
    settings = dict(divergence=divergence, temperature=1.0)
    rows, gradient = fused(student, teacher, backend="torch", **settings)
    rows_exact, gradient_exact = exact(student, teacher, **settings)
    assert relative(rows, rows_exact) <= 1e-6, (divergence, relative(rows, rows_exact))
    assert relative(gradient, gradient_exact) <= 3e-6, (divergence, relative(gradient, gradient_exact))
kept = TopK.from_logits(teacher, 8, temperature=1.0)
log_t = teacher.double().log_softmax(-1)
assert relative(kept.log_probs, log_t.gather(-1, kept.indices)) <= 2e-7
assert (kept.log_rest - log_t.scatter(-1, kept.indices, -torch.inf).logsumexp(-1)).abs().max() <= 5e-7
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="holds torch to x86's AVX2")
def test_a_wide_row_is_normalised_where_torch_has_no_avx512():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **AVX2},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def test_what_has_no_distribution_is_not_given_one():
    x = logits(4, 9, 1)
    x[0], x[1, 2], x[2, 3] = -torch.inf, torch.inf, torch.nan
    got = log_softmax(x)
    assert got[:3].isnan().any(-1).all()
    assert relative(got[3], x[3].double().log_softmax(-1)) <= 1e-7
    x[3, 4] = -torch.inf
    assert log_softmax(x)[3, 4] == -torch.inf


def test_its_derivatives_are_those_of_the_formula():
    x = logits(3, 7, 1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: log_softmax(x, 2.0), x)
    assert torch.autograd.gradgradcheck(lambda x: log_softmax(x, 2.0), x)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_common_offset_takes_no_digits(temperature):
    """What is left of 1e5 + x after a division by 3 in float32 is off by 4e-3."""
    student, teacher = logits(16, 1000, 1) + 1e5, logits(16, 1000, 2) + 1e5
    kept = TopK.from_logits(teacher, 1000, temperature=temperature)
    log_t = (teacher.double() / temperature).log_softmax(-1)
    assert (kept.log_probs - log_t.gather(-1, kept.indices)).abs().max() <= 2e-6
    rows, gradient = exact(student, teacher, temperature=temperature)
    for target in (teacher, kept):
        for got, expected in zip(
            fused(student, target, temperature=temperature, backend="torch"), (rows, gradient), strict=True
        ):
            assert relative(got, expected) <= 2e-6
    drawn = Sampled.from_logits(
        teacher[:1], 200_000, temperature=temperature, generator=torch.Generator().manual_seed(0)
    )
    near = Sampled.from_logits(
        teacher[:1] - 1e5, 200_000, temperature=temperature, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(drawn.indices, near.indices)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [100.0, 1e5, 1e6])
@pytest.mark.parametrize("kind", ["dense", "renormalise"])
def test_flat_rows_are_known_as_well_as_others(temperature, divergence, kind):
    """Their log-probabilities differ by less than float32 tells two numbers near -7 apart."""
    student, teacher = logits(16, 1000, 1), logits(16, 1000, 2)
    target = teacher if kind == "dense" else TopK.from_logits(teacher, 64, rest=kind)
    settings = {"temperature": temperature, "divergence": divergence}
    rows, gradient = exact(student, target, **settings)
    got_rows, got = fused(student, target, backend="torch", **settings)
    assert relative(got_rows, rows) <= 1e-6
    assert relative(got, gradient) <= 1e-6


def test_a_teacher_in_float64_keeps_its_digits_whatever_the_size_of_the_call():
    student, teacher = logits(64, 1000, 1), logits(64, 1000, 2).double()
    for rows in (4, 64):
        for backend in (None, "torch", "numba"):
            got = softmax_kl(student[:rows], teacher[:rows] + 1e6, backend=backend)
            assert relative(got, exact(student[:rows], teacher[:rows] + 1e6)[0].mean()) <= 1e-6
