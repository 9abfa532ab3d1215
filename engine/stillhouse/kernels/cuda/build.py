"""From a kernel's specification to PTX and to a cubin on disk. Needs numba-cuda, and neither a driver nor a GPU."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stillhouse.kernels import cache, series
from stillhouse.kernels.cuda.plan import Spec

ENTRY = "stillhouse_softmax_kl"
# threads of a multiprocessor that registers must suffice for, 64 each of the first: of a plain kernel, of a jsd or one with labels, of
# a jsd with labels; and blocks at most, which some devices have no more of
RESIDENT, BLOCKS = (1024, 640, 512), 24
_COMPILING = threading.Lock()


def module_of(target: str) -> Any:
    """Where the kernel for such a target is, and its Numba signature."""
    from stillhouse.kernels.cuda import dense, sparse

    return dense if target == "dense" else sparse


@contextmanager
def _architecture(cc: tuple[int, int]) -> Iterator[None]:
    """Numba asks the driver what to compile device functions for; here the answer is given, GPU or not."""
    from numba.cuda import dispatcher

    asked: Any = dispatcher
    before = asked.get_current_device
    asked.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
    try:
        yield
    finally:
        asked.get_current_device = before


def compile_ptx(spec: Spec, cc: tuple[int, int]) -> str:
    """PTX of one kernel, its entry point renamed to ``ENTRY``: Numba's name counts up with every compilation."""
    from numba import cuda, types

    with _COMPILING, _architecture(cc):
        module = module_of(spec.target)
        compiler: Any = cuda
        text, _ = compiler.compile(
            module.kernel_of(spec),
            types.void(*module.SIGNATURE),
            device=False,
            cc=cc,
            abi="numba",
            launch_bounds=(spec.threads, _resident_blocks(spec)),
        )
    name = re.search(r"\.visible \.entry (\w+)\(", text)
    assert name is not None, "Numba's PTX has no entry point"
    text = text.replace(name[1], ENTRY)
    text = re.sub(r"^\.common \.global[^\n]*NumbaEnv[^\n]*\n", "", text, flags=re.MULTILINE)
    # the assembler unrolls no loop either: see intrinsics.uncounted
    return text.replace("\n{", '\n.pragma "nounroll";\n{', 1)


def _resident_blocks(spec: Spec) -> int:
    return min(RESIDENT[(spec.divergence == "jsd") + spec.labels] // spec.threads, BLOCKS)


def cubin(spec: Spec, cc: tuple[int, int]) -> bytes:
    """Machine code for one device, from the cache on disk or compiled and put there."""
    name = f"cuda-{spec.name}-sm{cc[0]}{cc[1]}-{fingerprint()}.cubin"
    code = cache.read(name)
    if code is None:
        code = assemble(compile_ptx(spec, cc), cc)
        cache.write(name, code)
    return code


def assemble(text: str, cc: tuple[int, int]) -> bytes:
    """PTX to machine code by nvJitLink, which comes with the ``cuda`` extra."""
    from cuda.core import Program, ProgramOptions

    program = Program(text, "ptx", ProgramOptions(arch=f"sm_{cc[0]}{cc[1]}"))
    code = program.compile("cubin").code
    assert isinstance(code, bytes)
    return code


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """Of these sources and the tools that compile them: a change in either misses the cache."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    digest.update(Path(series.__file__).read_bytes())
    for package in ("numba", "numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink"):
        digest.update(f"{package} {_version(package)}".encode())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
