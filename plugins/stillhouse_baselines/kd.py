"""Knowledge distillation: Hinton, Vinyals & Dean 2015, arXiv:1503.02531."""

from __future__ import annotations

from pydantic import Field

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
    soft_and_label_terms,
)


class KDConfig(MethodConfig):
    """Settings of KD."""

    temperature: float = Field(4.0, gt=0, description="T of both softmaxes; the loss is multiplied by T^2.")
    alpha: float = Field(0.9, ge=0, le=1, description="Weight of the teacher; 1 - alpha is the labels'.")


class KD(Method):
    """``alpha T^2 KL(teacher || student) + (1 - alpha) CE(labels, student)``.

    Rows without a label have the first term alone. Several labels at once: the same of each class's yes and no.
    """

    api_version = 1
    Config = KDConfig
    supports = CLASS_KINDS | {"multi_label", "different_outputs"}
    config: KDConfig
    conformance = Conformance(minimum={"kl": 0.0})

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        alpha = self.config.alpha
        return soft_and_label_terms(
            student_out.logits,
            targets,
            batch,
            info,
            temperature=self.config.temperature,
            soft_weight=alpha,
            label_weight=1 - alpha,
        )
