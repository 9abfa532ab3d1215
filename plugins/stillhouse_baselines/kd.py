"""Knowledge distillation: Hinton, Vinyals & Dean 2015, arXiv:1503.02531."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from stillhouse.api import (
    Batch,
    Conformance,
    LossTerm,
    Method,
    MethodConfig,
    StepInfo,
    StudentOut,
    Targets,
    hookimpl,
)
from stillhouse.kernels import distillation_loss, softmax_kl


class KDConfig(MethodConfig):
    """Settings of KD."""

    temperature: float = Field(4.0, gt=0, description="T of both softmaxes; the loss is multiplied by T^2.")
    alpha: float = Field(0.9, ge=0, le=1, description="Weight of the teacher; 1 - alpha is the labels'.")


class KD(Method):
    """``alpha T^2 KL(teacher || student) + (1 - alpha) CE(labels, student)``.

    Rows without a label have the first term alone.
    """

    api_version = 1
    Config = KDConfig
    config: KDConfig
    conformance = Conformance(minimum={"kl": 0.0})

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, step: StepInfo
    ) -> dict[str, LossTerm]:
        alpha, labels = self.config.alpha, targets.labels
        settings: dict[str, Any] = {
            "temperature": self.config.temperature, "mask": batch.mask, "count": step.rows,
        }  # fmt: skip
        if labels is None or alpha == 1:
            return {"kl": LossTerm(softmax_kl(student_out.logits, targets.soft, **settings), alpha)}
        labelled = step.rows if labels.is_floating_point() else step.labelled
        kl, ce = distillation_loss(
            student_out.logits,
            targets.soft,
            labels,
            weights=(alpha, 1 - alpha),
            label_count=labelled,
            **settings,
        )
        return {"kl": LossTerm(kl, alpha), "ce": LossTerm(ce, 1 - alpha)}
