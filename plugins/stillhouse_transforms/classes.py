"""Class indices as class probabilities, so that a loss on them keeps the mean over labelled rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stillhouse.api import IGNORE, ConfigError, StepInfo


def probabilities(labels: Tensor, classes: int, step: StepInfo, who: str) -> Tensor:
    """``(..., classes)`` in float32 from indices ``(...)`` or from probabilities, which are given back.

    A row without a label is all zeros and so gives no loss. A loss on probabilities divides by the update's rows,
    one on indices by its labelled rows: the others are scaled by the quotient, which is 1 where all have a label.
    """
    if labels.is_floating_point():
        if labels.shape[-1] != classes or labels.dim() < 2:
            raise ConfigError(
                f"{who}: got float labels of shape {tuple(labels.shape)}; expected class labels: it has no meaning "
                "for regression, leave it out"
            )
        return labels
    known = labels != IGNORE
    hot = F.one_hot(labels.where(known, labels.new_zeros(())), classes).float()
    scale = step.rows / step.labelled if step.labelled else 1.0
    return hot * (known * scale)[..., None]
