"""Normalisers of the torch backend, which torch's own sums get wrong where vectors are short."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import logits, relative

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
