"""Losses against labels, with the engine's reduction: a sum over valid rows divided by the update's.

Losses against a teacher's outputs are ``stillhouse.kernels.softmax_kl``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stillhouse.contract.batch import IGNORE
from stillhouse.contract.context import StepInfo
from stillhouse.errors import ConfigError


def cross_entropy(logits: Tensor, labels: Tensor, step: StepInfo, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy: a scalar, the mean over the update's labelled rows.

    logits
        ``(..., C)``; computed in float32 whatever comes in.
    labels
        Class indices ``(...)`` with ``-100`` where there is none, or probabilities ``(..., C)``.
    mask
        Bool ``(...)``; False rows count nowhere.

    A row without a label, or masked, gives no loss and no gradient, whatever its logits hold.
    """
    flat = logits.reshape(-1, logits.shape[-1]).float()
    if labels.is_floating_point():
        kept = None if mask is None else mask.reshape(-1)
        soft = labels.reshape(-1, labels.shape[-1]).float()
        if kept is not None:
            flat, soft = flat[kept], soft[kept]
        return F.cross_entropy(flat, soft, reduction="sum") / max(step.rows, 1.0)
    index = labels.reshape(-1)
    if mask is not None:
        index = index.where(mask.reshape(-1), index.new_full((), IGNORE))
    if mask is not None or step.labelled != step.rows:
        # torch's backward multiplies an ignored row by 0, and NaN times 0 is NaN: put 0 in before.
        flat = flat.where((index != IGNORE)[:, None], flat.new_zeros(()))
    return F.cross_entropy(flat, index, reduction="sum", ignore_index=IGNORE) / max(step.labelled, 1.0)


def regression_loss(outputs: Tensor, labels: Tensor, step: StepInfo, mask: Tensor | None = None) -> Tensor:
    """Squared error: a scalar, the mean over outputs and over the update's rows.

    outputs ``(B, D)`` or ``(B,)``, labels of the same number of elements; rows where mask ``(B,)`` is
    False give no loss and no gradient, whatever they hold.
    """
    error = outputs.float().reshape(len(outputs), -1) - labels.float().reshape(len(labels), -1)
    if mask is not None:
        error = error.where(mask[:, None], error.new_zeros(()))
    return step.mean(error.square().mean(-1))


def label_loss(logits: Tensor, labels: Tensor | None, step: StepInfo, mask: Tensor | None = None) -> Tensor:
    """The loss that fits the labels: squared error for float targets, else cross-entropy.

    Class probabilities (a label transform made them) are told from regression targets by the rank
    and width: probabilities have the logits' shape and more than one column.
    """
    if labels is None:
        raise ConfigError("a loss on labels got a batch without labels; expected labels in the split")
    if not labels.is_floating_point() or (labels.shape == logits.shape and logits.shape[-1] > 1):
        return cross_entropy(logits, labels, step, mask)
    return regression_loss(logits, labels, step, mask)
