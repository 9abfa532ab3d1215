"""Sparse logit sampling: random sampling KD, Anshumann et al. 2025, ACL, arXiv:2503.16870."""

from __future__ import annotations

from pydantic import Field

from stillhouse.api import (
    CLASS_KINDS,
    Batch,
    LossTerm,
    Method,
    MethodConfig,
    StepInfo,
    StudentOut,
    Targets,
    hookimpl,
    kept,
    label_loss,
)
from stillhouse.kernels import Sampled, softmax_kl


class RSKDConfig(MethodConfig):
    """Settings of RS-KD."""

    draws: int = Field(50, gt=0, description="Classes drawn for each row, with replacement.")
    alpha: float = Field(0.9, ge=0, le=1, description="Weight of the teacher; 1 - alpha is the labels'.")


class RSKD(Method):
    """``alpha CE(drawn classes, student) + (1 - alpha) CE(labels, student)``: classes drawn from the teacher's softmax.

    Its mean over draws is KL(teacher || student) plus the teacher's entropy, and the mean of its gradients that KL's
    gradient, which a top k is biased for. The paper draws from ``p^t`` with importance weights; this is its t = 1,
    the setting of its experiments. Where the teacher's outputs are kept as draws already, those are used.
    """

    api_version = 1
    Config = RSKDConfig
    supports = CLASS_KINDS | {"different_outputs"}
    config: RSKDConfig

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        config, logits, drawn = self.config, student_out.logits, targets.soft
        if not isinstance(drawn, Sampled):
            drawn = Sampled.from_logits(kept(targets.dense, batch.mask), config.draws)
        sampled = softmax_kl(logits, drawn, mask=batch.mask, count=info.rows)
        terms = {"sampled": LossTerm(sampled, config.alpha)}
        if config.alpha < 1 and targets.has_labels:
            terms["ce"] = LossTerm(label_loss(logits, targets, batch, info), 1 - config.alpha)
        return terms
