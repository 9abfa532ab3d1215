"""Log-softmax whose normaliser is a float64 sum, for the paths that torch's own operators compute.

A float32 sum in as few lanes as AVX2 has is off by 2e-5 over 152,000 entries: equal numbers round alike, and what they are
off by adds up.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """``logits / temperature`` in float32, or in float64 where they are that."""
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax over the last dimension, (..., V) as they come, in float32 or float64; differentiable twice.

    A row of -inf alone, or one that holds NaN or +inf, is NaN.
    """
    x = scaled(logits, temperature)
    below = x - x.detach().amax(-1, keepdim=True)
    return below - below.exp().sum(-1, keepdim=True, dtype=torch.float64).log().to(below.dtype)
