"""Knowledge distillation: Hinton, Vinyals & Dean 2015, arXiv:1503.02531."""

from __future__ import annotations

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
    cross_entropy,
    hookimpl,
)
from stillhouse.kernels import softmax_kl


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
        kl = softmax_kl(
            student_out.logits,
            targets.soft,
            temperature=self.config.temperature,
            mask=batch.mask,
            count=step.rows,
        )
        terms = {"kl": LossTerm(kl, self.config.alpha)}
        if targets.labels is not None and self.config.alpha < 1:
            ce = cross_entropy(student_out.logits, targets.labels, step, batch.mask)
            terms["ce"] = LossTerm(ce, 1 - self.config.alpha)
        return terms
