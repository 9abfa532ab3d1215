"""Numba's CUDA simulator, the kernels' Python run as it stands, agrees with float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="the extra stillhouse[cuda] is not installed")
LIMITS = {"f32": 2e-6, "bf16": 1e-2, "f16": 2e-3}


def test_the_simulator_agrees_with_float64():
    script = Path(__file__).with_name("simulate.py")
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for v, dtype, divergence, kind, loss, grad in lines:
        print(
            f"simulator {kind:7} {divergence:7} {dtype:4} V={v:>3}: loss {float(loss):.1e}, gradient {float(grad):.1e}"
        )
        assert float(loss) < 2e-6
        assert float(grad) < LIMITS[dtype]
