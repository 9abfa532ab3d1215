"""Which path computes: CUDA tensors the Numba-CUDA kernel, CPU tensors the Numba CPU kernel, else torch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from stillhouse.kernels.errors import fail

BACKENDS = ("torch", "numba", "cuda")


def choose(student: Tensor, backend: str | None) -> str:
    """The backend for these logits; a named one is taken at its word or refused."""
    device, dtype = student.device.type, student.dtype
    if backend is None:
        return _default(device, dtype)
    if backend not in BACKENDS:
        raise fail("backend", repr(backend), f"None or one of {', '.join(BACKENDS)}", "leave it at None")
    if backend == "torch":
        return backend
    wanted = "cpu" if backend == "numba" else "cuda"
    if device != wanted:
        raise fail(
            f"backend={backend!r}", f"logits on {device}", f"logits on {wanted}", "leave backend at None"
        )
    if dtype == torch.float64:
        raise fail(
            f"backend={backend!r}", "float64 logits", "float32, bfloat16 or float16", "backend='torch'"
        )
    if backend == "cuda" and not cuda_available()[0]:
        raise fail(
            "backend='cuda'", cuda_available()[1], "a CUDA driver and the extra 'cuda'", "backend='torch'"
        )
    return backend


def _default(device: str, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "torch"
    if device == "cpu":
        return "numba"
    return "cuda" if device == "cuda" and cuda_available()[0] else "torch"


@lru_cache(maxsize=1)
def cuda_available() -> tuple[bool, str]:
    """Whether the Numba-CUDA kernels can run here, and why not."""
    try:
        from stillhouse.kernels import cuda

        available, why = cuda.available()
    except (ImportError, AttributeError) as error:
        return False, f"stillhouse.kernels.cuda cannot be imported ({error})"
    return bool(available), str(why)


def explain(device: str | torch.device) -> tuple[str, str]:
    """The backend in use for logits on ``device`` in float32 and 16-bit types, and why it is that one."""
    kind = torch.device(device).type
    if kind == "cpu":
        from stillhouse.kernels.workers import openmp

        whose = "torch's own" if openmp() else "of a pool, since this torch has no GOMP_parallel"
        threads = f"{torch.get_num_threads()} threads, {whose}"
        return "numba", f"CPU tensors: the Numba kernel, {threads}; float64 takes torch"
    if kind == "cuda":
        available, why = cuda_available()
        return ("cuda", f"CUDA tensors: {why}") if available else ("torch", f"no CUDA kernel: {why}")
    return "torch", f"no kernel for {kind} tensors: the plain torch path"
