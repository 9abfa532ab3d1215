"""Log-softmax whose normaliser is a float64 sum, for the paths that torch's own operators compute.

A float32 sum in as few lanes as AVX2 has is off by 2e-5 over 152,000 entries: equal numbers round alike, and what they are
off by adds up.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """What the specification computes in: float64 on a CPU, since flat rows (a large T) differ by less than float32 tells."""
    return x.double() if x.device.type == "cpu" or x.dtype == torch.float64 else x.float()


def single(x: Tensor) -> Tensor:
    """Logits in float32; of float64 relative to the row's largest, so that a common offset takes no digits."""
    return (x - x.amax(-1, keepdim=True)).float() if x.dtype == torch.float64 else x.float()


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax over the last dimension, (..., V) as they come, in float32 or float64; differentiable twice.

    A row of -inf alone, or one that holds NaN or +inf, is NaN.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    below = (x - x.detach().amax(-1, keepdim=True)) / temperature
    return below - below.exp().sum(-1, keepdim=True, dtype=torch.float64).log().to(below.dtype)
