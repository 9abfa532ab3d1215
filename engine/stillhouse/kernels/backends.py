"""Which path computes: CUDA tensors the Numba-CUDA kernel, CPU tensors the Numba CPU kernel, else torch.

What was not asked for by name falls back to torch where it can't be had, with one warning.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from stillhouse.kernels.errors import fail, require, warn

BACKENDS = ("torch", "numba", "cuda")


def choose(student: Tensor, backend: str | None, kernel: str = "dense") -> str:
    """The backend for these logits; a named one is taken at its word or refused. ``kernel``: of the CPU, see ``cpu.build``."""
    device, dtype = student.device.type, student.dtype
    if backend is None:
        return _default(student, kernel)
    known = f"None or one of {', '.join(BACKENDS)}"
    require(backend in BACKENDS, "backend", repr(backend), known, "leave it at None")
    if backend == "torch":
        return backend
    name, wanted = f"backend={backend!r}", "cpu" if backend == "numba" else "cuda"
    require(device == wanted, name, f"logits on {device}", f"logits on {wanted}", "leave backend at None")
    types = "float32, bfloat16 or float16"
    require(dtype != torch.float64, name, "float64 logits", types, "backend='torch'")
    if backend == "numba" and not torch.compiler.is_compiling() and (why := cpu_failure(kernel)) is not None:
        raise fail(name, why, "a CPU kernel that can be compiled or loaded", "backend='torch'")
    if backend == "cuda" and not cuda_available()[0]:
        raise fail(name, cuda_available()[1], "a CUDA driver and the extra 'cuda'", "backend='torch'")
    return backend


def _default(student: Tensor, kernel: str) -> str:
    device = student.device
    if student.dtype == torch.float64:
        return "torch"
    if device.type == "cpu":
        return "numba" if _cpu_works(kernel) else "torch"
    if device.type != "cuda" or not cuda_available()[0]:
        return "torch"
    return "cuda" if _cuda_works(device.index) else "torch"


@torch.compiler.assume_constant_result  # type: ignore[no-untyped-call]
def _cpu_works(kernel: str) -> bool:  # asked where a graph is traced, and not within it
    why = cpu_failure(kernel)
    if why is not None:
        _say_failed(why)
    return why is None


@torch.compiler.assume_constant_result  # type: ignore[no-untyped-call]
def _cuda_works(device: int | None) -> bool:
    return cuda_failure(torch.cuda.current_device() if device is None else device) is None


@lru_cache(maxsize=8)
def cpu_failure(kernel: str) -> str | None:
    """Why this process has no such CPU kernel; loads or compiles it the first time."""
    try:
        from stillhouse.kernels.cpu.build import entry

        entry(kernel)
    except Exception as error:  # noqa: BLE001 whatever a compiler throws, there is a way on
        return f"{type(error).__name__}: {error}"
    return None


@lru_cache(maxsize=8)
def _say_failed(why: str) -> None:
    """Once, also where several kernels fail for one reason."""
    fix = "install the numba that stillhouse was tested with (pip install -U stillhouse), or pass backend='torch' to be rid of this warning"
    warn(
        "stillhouse's CPU kernels can't be compiled or loaded here, so torch computes in their place, at many times their cost: "
        + (why if "Fix: " in why else f"{why}. Fix: {fix}")
    )


@lru_cache(maxsize=1)
def cuda_available() -> tuple[bool, str]:
    """Whether the Numba-CUDA kernels can run here, and why not."""
    try:
        from stillhouse.kernels import cuda

        available, why = cuda.available()
    except (ImportError, AttributeError) as error:
        return False, f"stillhouse.kernels.cuda cannot be imported ({error})"
    return bool(available), str(why)


PASSED = b"passed"


@lru_cache(maxsize=64)
def cuda_failure(device: int) -> str | None:
    """Why the CUDA kernels are not used on this device, warned about once: they have to pass the self-check there first.

    Its verdict is kept on disk, for this device, driver and version of the kernels; but not that of an exception, which may be of
    this process alone (no memory left, say).
    """
    from stillhouse.kernels import cache

    kept, name = _kept_verdict(device)
    verdict, lasts = _cuda_verdict(device) if kept is None else (kept, True)
    if kept is None and lasts:
        cache.write(name, verdict)
    if verdict == PASSED:
        return None
    why = verdict.decode(errors="replace")
    again = f"delete {cache.folder() / name}" if lasts else "start again"
    warn(
        f"stillhouse's CUDA kernel is not used on device {device}, and torch computes in its place: its self-check there said "
        f"'{why}'. Fix: update the driver and the extra 'cuda', then {again}; `stillhouse doctor "
        "--kernels` shows all of the check"
    )
    return why


def _kept_verdict(device: int) -> tuple[bytes | None, str]:
    """What was kept of the device's check, and its name in the cache."""
    from stillhouse.kernels import cache
    from stillhouse.kernels.cuda import identity

    name = f"cuda-check-{identity(device)}"
    return cache.read(name), name


def _cuda_verdict(device: int) -> tuple[bytes, bool]:
    """(The verdict, whether it holds for other processes too)."""
    from stillhouse.kernels.selfcheck import MEASURED, check

    try:
        failed = [(name, detail) for name, passed, detail in check(f"cuda:{device}", "cuda") if not passed]
    except Exception as error:  # noqa: BLE001 as above
        failed = [(type(error).__name__, str(error))]
    measured = [case for case in failed if case[1].startswith(MEASURED)]
    said = measured or failed
    return ": ".join(said[0]).encode() if said else PASSED, bool(measured) or not failed


def warmup(say: Callable[[str], None]) -> bool:
    """Load or compile every CPU kernel, and keep it on disk; ``say`` is told about each. False where one has failed."""
    from stillhouse.kernels.cpu.build import ENTRIES

    worked = True
    for kernel in ENTRIES:
        start = time.perf_counter()
        why = cpu_failure(kernel)
        worked = worked and why is None
        say(f"{kernel}: {why or f'ready after {time.perf_counter() - start:.1f} s'}")
    return worked


def explain(device: str | torch.device, *, certain: bool = False) -> tuple[str, str]:
    """The backend in use for logits on ``device`` in float32 and 16-bit types, and why it is that one.

    Of CPU kernels that were not compiled yet, and CUDA kernels that were not checked yet, it says so; ``certain`` does that to know.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        try:
            from stillhouse.kernels.cpu.build import ENTRIES, kept
            from stillhouse.kernels.cpu.workers import openmp
        except ImportError as error:
            return "torch", f"the CPU kernels can't be imported: {error}"
        there = [name for name in ENTRIES if certain or kept(name)]
        failed = [why for why in map(cpu_failure, there) if why is not None]
        if failed:
            return "torch", f"the CPU kernels can't be compiled or loaded: {failed[0]}"
        missing = ", ".join(sorted(ENTRIES.keys() - set(there)))
        later = f"; not compiled yet: {missing} (`stillhouse warmup`)" if missing else ""
        own = f"{torch.get_num_threads()} threads, torch's own"
        threads = own if openmp() else "one thread, since this torch has no GOMP_parallel"
        return "numba", f"CPU tensors: the Numba kernel, {threads}; float64 and small calls take torch{later}"
    if kind == "cuda":
        return _explain_cuda(torch.device(device).index, certain)
    return "torch", f"no kernel for {kind} tensors: the plain torch path"


def _explain_cuda(index: int | None, certain: bool) -> tuple[str, str]:
    available, why = cuda_available()
    if not available:
        return "torch", f"no CUDA kernel: {why}"
    device = torch.cuda.current_device() if index is None else index
    failure = cuda_failure(device) if certain else None
    kept = _kept_verdict(device)[0]
    if failure is None and kept is not None and kept != PASSED:
        failure = kept.decode(errors="replace")
    if failure is not None:
        return "torch", f"the CUDA kernel has failed its self-check: {failure}"
    later = "" if certain or kept is not None else "; not checked yet, which the first call does"
    return "cuda", f"CUDA tensors: {why}{later}"
