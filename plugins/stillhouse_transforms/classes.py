"""Class numbers as class probabilities."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stillhouse.api import IGNORE


def probabilities(labels: Tensor | None, given: Tensor | None, classes: int) -> Tensor | None:
    """``(..., classes)`` in float32: those that are ``given``, else from class numbers ``(...)``; None without either.

    A row without a label is all zeros, and so gives no loss.
    """
    if given is not None or labels is None:
        return given
    known = labels != IGNORE
    return F.one_hot(labels.where(known, labels.new_zeros(())), classes).float() * known[..., None]
