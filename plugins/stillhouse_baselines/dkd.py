"""Decoupled knowledge distillation: Zhao et al. 2022, CVPR, arXiv:2203.08679."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.api import (
    CLASS_KINDS,
    IGNORE,
    Batch,
    ConfigError,
    LossTerm,
    Method,
    MethodConfig,
    StepInfo,
    StudentOut,
    Targets,
    hookimpl,
    label_loss,
    wide,
)
from stillhouse.kernels import softmax_kl


class DKDConfig(MethodConfig):
    """Settings of DKD."""

    temperature: float = Field(4.0, gt=0, description="T of the softmaxes; the losses are multiplied by T^2.")
    alpha: float = Field(1.0, ge=0, description="Weight of the target class.")
    beta: float = Field(
        2.0, ge=0, description="Weight of the other classes; the authors use 0.5 to 8, by the pair."
    )
    ce: float = Field(1.0, ge=0, description="Weight of cross-entropy with the labels.")


class DKD(Method):
    """``alpha T^2 KL(b_T || b_S) + beta T^2 KL(r_T || r_S) + ce CE``.

    ``b`` is the label's class against all others, ``r`` the softmax over the others alone. Plain KD is alpha = 1 and
    beta = 1 - p_T(label), which differs from row to row. Rows without a label give nothing, and the means are over
    those that have one. The authors' code raises the weight of the first two over the first 20 of 240 epochs; here it
    is the same throughout.
    """

    api_version = 1
    Config = DKDConfig
    requires = frozenset({"logits", "labels"})
    supports = CLASS_KINDS
    config: DKDConfig

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        config, labels = self.config, targets.labels
        if labels is None:
            raise ConfigError(
                f"{info.caller}: got class probabilities or no labels; expected class numbers, whose class is parted from the "
                "others: leave out mixup and label smoothing"
            )
        known = labels != IGNORE if batch.mask is None else (labels != IGNORE) & batch.mask
        target, others = decoupled(student_out.logits, targets.dense, labels, known, config.temperature)
        terms = {
            "target": LossTerm(target / max(info.labelled, 1.0), config.alpha),
            "others": LossTerm(others / max(info.labelled, 1.0), config.beta),
        }
        if config.ce:
            terms["ce"] = LossTerm(label_loss(student_out.logits, targets, batch, info), config.ce)
        return terms


def decoupled(
    student: Tensor, teacher: Tensor, labels: Tensor, known: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """``T^2`` times the two divergences, summed over the rows that are ``known``.

    logits ``(..., C)``, labels and known ``(...)``.
    """
    index = labels[known][:, None]
    own, given = wide(student[known]), wide(teacher[known])
    first = softmax_kl(
        _binary(own, index, temperature),
        _binary(given, index, temperature),
        temperature=temperature,
        reduction="sum",
    )
    rest = [logits.scatter(-1, index, -torch.inf) for logits in (own, given)]
    return first, softmax_kl(*rest, temperature=temperature, reduction="sum")


def _binary(logits: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Logits ``(n, 2)`` of the class at ``index`` and of all others together, at the temperature."""
    others = (logits.scatter(-1, index, -torch.inf) / temperature).logsumexp(-1, keepdim=True) * temperature
    return torch.cat([logits.gather(-1, index), others], -1)
