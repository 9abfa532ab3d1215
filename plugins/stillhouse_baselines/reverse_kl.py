"""Reverse KL: the mode-seeking direction, as in MiniLLM (Gu et al. 2024, arXiv:2306.08543) and GKD (arXiv:2306.13649)."""

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
)
from stillhouse_baselines.divergences import divergence_and_labels


class ReverseKLConfig(MethodConfig):
    """Settings of reverse KL."""

    temperature: float = Field(4.0, gt=0, description="T of both softmaxes; the loss is multiplied by T^2.")
    alpha: float = Field(0.9, ge=0, le=1, description="Weight of the teacher; 1 - alpha is the labels'.")


class ReverseKL(Method):
    """``alpha T^2 KL(student || teacher) + (1 - alpha) CE(labels, student)``, on the data's own inputs.

    Both papers draw sequences from the student as well; here the inputs are those that the trainer hands over, whoever
    made them.
    """

    api_version = 1
    Config = ReverseKLConfig
    supports = CLASS_KINDS | {"different_outputs"}
    config: ReverseKLConfig
    conformance = Conformance(minimum={"kl": 0.0})

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        return divergence_and_labels(
            "kl",
            student_out,
            targets,
            batch,
            info,
            temperature=self.config.temperature,
            alpha=self.config.alpha,
            divergence="reverse",
        )
