"""Losses with the engine's reduction: a sum over the rows that count, divided by ``count``.

``count`` is what the mean divides by: the rows of the whole update, over all of its micro-batches and ranks. A hook
finds it in ``info.rows`` (losses on every row) and ``info.labelled`` (losses on labels). Losses against a teacher's
softmax are ``stillhouse.kernels.softmax_kl``, which takes the same ``count``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.contract.batch import IGNORE, Batch
from stillhouse.contract.context import StepInfo
from stillhouse.contract.head import Head
from stillhouse.contract.outputs import LossTerm, Targets
from stillhouse.errors import ConfigError
from stillhouse.kernels import Sampled, TeacherHead, TopK, linear_softmax_kl, softmax_kl


def cross_entropy(logits: Tensor, labels: Tensor, *, count: float, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy: a scalar, the sum over the labelled rows divided by ``count``.

    logits
        ``(..., C)``; computed in float32 whatever comes in (float64 stays).
    labels
        Class numbers ``(...)`` with ``-100`` where there is none, or probabilities ``(..., C)`` with a row of zeros
        where there is none.
    mask
        Bool ``(...)``; False rows count nowhere.

    A row without a label, or masked, gives no loss and no gradient, whatever its logits hold. Of a Head the rows with a
    label alone are multiplied out.
    """
    if isinstance(logits, Head) and not logits.multiplied:
        return _head_cross_entropy(logits, labels, count, mask)
    wide = logits if logits.dtype.itemsize == 8 else logits.float()
    flat = wide.reshape(-1, logits.shape[-1])
    if labels.is_floating_point():
        soft = labels.reshape(-1, labels.shape[-1]).to(flat.dtype)
        if mask is not None:
            kept = mask.reshape(-1)
            flat, soft = flat[kept], soft[kept]
        return F.cross_entropy(flat, soft, reduction="sum") / max(count, 1.0)
    index = labels.reshape(-1)
    if mask is not None:
        index = index.where(mask.reshape(-1), index.new_full((), IGNORE))
    if mask is not None or count != index.numel():
        # torch's backward multiplies an ignored row by 0, and NaN times 0 is NaN: put 0 in before.
        flat = flat.where((index != IGNORE)[:, None], flat.new_zeros(()))
    return F.cross_entropy(flat, index, reduction="sum", ignore_index=IGNORE) / max(count, 1.0)


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, *, count: float, mask: Tensor | None = None
) -> Tensor:
    """Of several labels at once: a scalar, the mean over classes, summed over rows and divided by ``count``.

    logits ``(B, C)``, labels ``(B, C)`` between 0 and 1, mask ``(B,)``.
    """
    own, labels = _kept(logits.float(), mask), labels.float()
    return _over(F.binary_cross_entropy_with_logits(own, labels, reduction="none").mean(-1), count, mask)


def regression_loss(outputs: Tensor, labels: Tensor, *, count: float, mask: Tensor | None = None) -> Tensor:
    """Squared error: a scalar, the mean over outputs, summed over rows and divided by ``count``.

    outputs ``(B, D)`` or ``(B,)``, labels of the same number of elements; rows where mask ``(B,)`` is
    False give no loss and no gradient, whatever they hold.
    """
    error = outputs.float().reshape(len(outputs), -1) - labels.float().reshape(len(labels), -1)
    return _over(_kept(error, mask).square().mean(-1), count, None)


def binary_kl(
    logits: Tensor, teacher: Tensor, *, temperature: float, count: float, mask: Tensor | None = None
) -> Tensor:
    """``T^2 KL`` of each class's own yes and no, teacher first: the mean over classes, summed over rows, by ``count``.

    logits and teacher ``(B, C)``, mask ``(B,)``; the multi-label form of Hinton et al. 2015 (Yang et al. 2023,
    arXiv:2308.06453, equation 4).
    """
    own = _kept(logits.float(), mask) / temperature
    given = _kept(teacher.detach().float(), mask) / temperature
    p = given.sigmoid()
    kl = p * (F.logsigmoid(given) - F.logsigmoid(own)) + (1 - p) * (F.logsigmoid(-given) - F.logsigmoid(-own))
    return temperature**2 * _over(kl.mean(-1), count, mask)


def label_loss(logits: Tensor, targets: Targets, batch: Batch, info: StepInfo) -> Tensor:
    """The loss on labels that the task's kind has: cross-entropy, binary cross-entropy or squared error.

    Raises ConfigError where the targets hold no labels.
    """
    if targets.probabilities is not None:
        return cross_entropy(logits, targets.probabilities, count=info.labelled, mask=batch.mask)
    if targets.labels is None:
        raise ConfigError("a loss on labels got a batch without labels; expected labels in the split")
    if info.kind.labels == "numbers":
        return regression_loss(logits, targets.labels, count=info.labelled, mask=batch.mask)
    if info.kind.labels == "flags":
        return binary_cross_entropy(logits, targets.labels, count=info.labelled, mask=batch.mask)
    return cross_entropy(logits, targets.labels, count=info.labelled, mask=batch.mask)


def soft_loss(
    logits: Tensor, targets: Targets, batch: Batch, info: StepInfo, *, temperature: float = 1.0
) -> Tensor:
    """The loss on the teacher's outputs that the task's kind has, the mean over the update's rows.

    Class kinds: ``T^2 KL(teacher || student)`` by the fused kernel, for dense, top-k and sampled targets alike.
    Several labels at once: the same for each class's yes and no. Regression and embeddings: squared error, T unused.
    """
    if info.kind.labels == "classes":
        if isinstance(logits, Head) and not logits.multiplied:
            return _head_kl(logits, targets.soft, batch.mask, info.rows, temperature)
        return softmax_kl(logits, targets.soft, temperature=temperature, mask=batch.mask, count=info.rows)
    if info.kind.labels == "flags":
        return binary_kl(logits, targets.dense, temperature=temperature, count=info.rows, mask=batch.mask)
    return regression_loss(logits, targets.dense, count=info.rows, mask=batch.mask)


def soft_and_label_terms(
    logits: Tensor,
    targets: Targets,
    batch: Batch,
    info: StepInfo,
    *,
    temperature: float,
    soft_weight: float,
    label_weight: float,
) -> dict[str, LossTerm]:
    """The two terms of most methods: ``kl``, the soft loss at T, and ``ce``, the loss on labels.

    A term of weight 0 is left out, as is ``ce`` where there are no labels.
    """
    terms = {}
    if soft_weight:
        terms["kl"] = LossTerm(soft_loss(logits, targets, batch, info, temperature=temperature), soft_weight)
    if label_weight and targets.has_labels:
        terms["ce"] = LossTerm(label_loss(logits, targets, batch, info), label_weight)
    return terms


def _head_kl(head: Head, target: Any, mask: Tensor | None, count: float, temperature: float) -> Tensor:
    """``softmax_kl`` of the rows that count, a few multiplied out at a time."""
    if isinstance(target, Head):
        target = TeacherHead(target.hidden, target.weight, target.bias)
    hidden = head.hidden
    if mask is not None:
        rows = mask.reshape(-1).nonzero()[:, 0]
        hidden, target = _of_rows(hidden, rows), _target_rows(target, rows)
    if not hidden.numel():
        return _nothing(head)
    loss: Tensor = linear_softmax_kl(
        hidden, head.weight, target, bias=head.bias, temperature=temperature, count=count
    )
    return loss


def _head_cross_entropy(head: Head, labels: Tensor, count: float, mask: Tensor | None) -> Tensor:
    known = labels.sum(-1) > 0 if labels.is_floating_point() else labels != IGNORE
    rows = (known if mask is None else known & mask).reshape(-1).nonzero()[:, 0]
    if not len(rows):
        return _nothing(head)
    logits = F.linear(_of_rows(head.hidden, rows), head.weight, head.bias)
    own = labels.reshape(-1, labels.shape[-1]) if labels.is_floating_point() else labels.reshape(-1)
    return cross_entropy(logits, own[rows], count=count)


def _nothing(head: Head) -> Tensor:
    """0, in the graph of all that the logits would be made of."""
    parts = [head.hidden.sum(), head.weight.sum(), *(() if head.bias is None else (head.bias.sum(),))]
    zero: Tensor = torch.stack([part.float() for part in parts]).nan_to_num(0.0, 0.0, 0.0).sum() * 0.0
    return zero


def _of_rows(values: Tensor, rows: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])[rows]


def _target_rows(target: Any, rows: Tensor) -> Any:
    if isinstance(target, TeacherHead):
        return TeacherHead(_of_rows(target.hidden, rows), target.weight, target.bias)
    if isinstance(target, TopK):
        rest = None if target.log_rest is None else target.log_rest.reshape(-1)[rows]
        return replace(
            target,
            indices=_of_rows(target.indices, rows),
            log_probs=_of_rows(target.log_probs, rows),
            log_rest=rest,
        )
    if isinstance(target, Sampled):
        return replace(target, indices=_of_rows(target.indices, rows), weights=_of_rows(target.weights, rows))
    return _of_rows(target, rows)


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros in the rows that don't count: a derivative there is then 0, and not 0 times what they hold."""
    return values if mask is None else values.where(mask[:, None], values.new_zeros(()))


def _over(per_row: Tensor, count: float, mask: Tensor | None) -> Tensor:
    kept = per_row if mask is None else per_row.where(mask, per_row.new_zeros(()))
    return kept.sum() / max(count, 1.0)
