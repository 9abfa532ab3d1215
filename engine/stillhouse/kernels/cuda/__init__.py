"""The softmax divergences on NVIDIA GPUs: Numba-CUDA kernels for compute capability 8.0 and later.

Importing this package needs neither numba-cuda nor a GPU; :func:`available` says whether the kernels can run. See
docs/kernels-cuda.md for the mapping of shapes to kernels and for what has been checked.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from stillhouse.kernels.targets import Labels, Target

__all__ = ["available", "softmax_kl_fwd_bwd"]

EXTRA = 'install the extra: pip install "stillhouse[cuda]"'
OLDEST = (8, 0)


def available() -> tuple[bool, str]:
    """Whether the kernels can run on this machine, and why."""
    missing = _missing()
    if missing:
        return False, f"{missing} is not installed; {EXTRA}"
    import torch

    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    cc = torch.cuda.get_device_capability()
    if cc < OLDEST:
        return False, f"compute capability {cc[0]}.{cc[1]}; the kernels need {OLDEST[0]}.{OLDEST[1]} or later"
    return True, f"{torch.cuda.get_device_name()}, compute capability {cc[0]}.{cc[1]}"


def identity(device: int) -> str:
    """Changes with the device, its driver, torch, and these kernels and their compiler."""
    import hashlib

    import torch
    from cuda.bindings import driver

    from stillhouse.kernels.cuda.build import fingerprint

    what = (
        torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), driver.cuDriverGetVersion()[1],
        torch.__version__, fingerprint(),
    )  # fmt: skip
    return hashlib.sha256(repr(what).encode()).hexdigest()[:24]


def softmax_kl_fwd_bwd(
    student: Tensor,
    target: Target,
    *,
    temperature: float,
    divergence: str,
    beta: float,
    mask: Tensor | None = None,
    scales: tuple[Tensor | float, Tensor | float] = (1.0, 0.0),
    out_grad: Tensor | None = None,
    labels: Labels | None = None,
) -> Tensor:
    """Losses of every row, float32 (1, N), or both terms (2, N); the gradient of their sums times ``scales`` to ``out_grad``.

    Runs on torch's current stream and never waits for the device, so it can be captured into a CUDA graph once it
    has run outside of one with the same settings (which loads kernel and constants). For the same reason it does not look at the indices of a ``TopK`` or
    ``Sampled``, nor at labels: one outside of [0, V) makes that loss of its row NaN, with a gradient of zero.

    Args:
        student: logits (N, V), float32, bfloat16 or float16, on a CUDA device.
        target: teacher logits (N, Vt) of the student's dtype, or a ``TopK`` or ``Sampled`` with (N, k) tensors
            (``log_rest``: (N,), taken for a ghost's log-probability as it is).
        temperature: divides the logits; the loss is multiplied by its square.
        divergence: "forward", "reverse" or "jsd"; ``beta`` is the teacher's share in the latter's mixture.
        beta: between 0 and 1, exclusive.
        mask: bool (N,); rows where it is False have loss and gradient zero, whatever they hold.
        scales: factors of the two gradients, numbers or 0-d tensors on the device.
        out_grad: (N, V) of the student's dtype; may be ``student`` itself. None: losses only, and no
            such memory.
        labels: class indices (N,), of which -100 is none, and their smoothing; probabilities are not for these kernels.

    Raises:
        ImportError: numba-cuda is missing.
        ValueError: a dtype or device that the kernels do not take.
    """
    missing = _missing()
    if missing:
        raise ImportError(f"the CUDA kernels need {missing}, which is not installed; {EXTRA}")
    from stillhouse.kernels.cuda.launch import run

    return run(student, target, temperature, divergence, beta, mask, scales, out_grad, labels)


def _missing() -> str | None:
    for package, module in (("numba-cuda", "numba_cuda"), ("cuda-core", "cuda")):
        if importlib.util.find_spec(module) is None:
            return package
    return None
