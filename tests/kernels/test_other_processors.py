"""The CPU kernels as machine code of processors that are not here."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import re, sys
import llvmlite.binding as llvm
from stillhouse.kernels.cpu import build
module, _ = build.optimised(sys.argv[1])
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
machine = llvm.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(cpu="generic", features="+neon", opt=3)
text = re.sub('(?m)^target (triple|datalayout) = .*$', '', str(module))
module = llvm.parse_assembly(text)
module.triple, module.data_layout = "aarch64-unknown-linux-gnu", str(machine.target_data)
assembly = machine.emit_assembly(module)
print(len(re.findall(r"\\bfmla\\b.*\\.4s", assembly)), len(re.findall(r"\\bbl\\s+(\\w+)", assembly)),
      " ".join(sorted(set(re.findall(r"\\bbl\\s+(\\w+)", assembly)))))
"""


@pytest.mark.machine_code
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="what it compiles for is not x86")
@pytest.mark.parametrize("kernel", ["dense_labels", "sparse_labels"])
def test_arms_vectors_hold_what_it_computes_in(kernel):
    """Fused multiplications of four float32 each, and no function but the C library's."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kernel], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    multiplications, _, *called = done.stdout.split()
    assert int(multiplications) > 200
    known = {"log", "log1p", "expm1", "exp", "memset", "memcpy", "pow", "exp2", "fmaxf", "fminf"}
    called = [name for name in called if not name.startswith("_ZN10stillhouse")]
    assert set(called) <= known, called
