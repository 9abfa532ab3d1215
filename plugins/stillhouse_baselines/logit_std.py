"""Logit standardisation: Sun et al. 2024, CVPR, arXiv:2403.01427."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from stillhouse.api import (
    CLASS_KINDS,
    Batch,
    Conformance,
    LossTerm,
    Method,
    MethodConfig,
    StepInfo,
    StudentOut,
    Targets,
    hookimpl,
    kept,
    label_loss,
    wide,
)
from stillhouse.kernels import softmax_kl


class LogitStdConfig(MethodConfig):
    """Settings of logit standardisation."""

    temperature: float = Field(2.0, gt=0, description="T of both softmaxes; the loss is multiplied by T^2.")
    weight: float = Field(9.0, ge=0, description="Weight of the divergence.")
    ce: float = Field(1.0, ge=0, description="Weight of cross-entropy with the labels.")


class LogitStd(Method):
    """``weight T^2 KL(softmax(z(t) / T) || softmax(z(s) / T)) + ce CE``, z(x) = (x - mean(x)) / (std(x) + 1e-7).

    mean and standard deviation (that of a sample, over C - 1) are each row's over its classes, as in the authors' code
    and torchdistill: the student has to match the teacher's order and shape, and not its range.
    """

    api_version = 1
    Config = LogitStdConfig
    supports = CLASS_KINDS
    config: LogitStdConfig
    conformance = Conformance(minimum={"kl": 0.0})

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        config, mask = self.config, batch.mask
        own, given = (standardised(kept(logits, mask)) for logits in (student_out.logits, targets.dense))
        kl = softmax_kl(own, given, temperature=config.temperature, mask=mask, count=info.rows)
        terms = {"kl": LossTerm(kl, config.weight)}
        if config.ce and targets.has_labels:
            terms["ce"] = LossTerm(label_loss(student_out.logits, targets, batch, info), config.ce)
        return terms


def standardised(logits: Tensor) -> Tensor:
    """Each row of ``(..., C)`` with mean 0 and standard deviation 1."""
    logits = wide(logits)
    centred = logits - logits.mean(-1, keepdim=True)
    return centred / (logits.std(-1, keepdim=True) + 1e-7)
