"""Generalised Jensen-Shannon divergence: GKD, Agarwal et al. 2024, ICLR, arXiv:2306.13649."""

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


class JSDConfig(MethodConfig):
    """Settings of the generalised JSD."""

    temperature: float = Field(1.0, gt=0, description="T of both softmaxes; the loss is multiplied by T^2.")
    beta: float = Field(0.5, ge=0.01, le=0.99, description="Part of the teacher in the mixture.")
    alpha: float = Field(0.9, ge=0, le=1, description="Weight of the teacher; 1 - alpha is the labels'.")


class JSD(Method):
    """``alpha T^2 (beta KL(p || m) + (1 - beta) KL(q || m)) + (1 - alpha) CE``, m = beta p + (1 - beta) q.

    p is the teacher's softmax, q the student's. GKD multiplies by no T^2 and draws sequences from the student as well;
    here the scale is that of every method, and the inputs are those that the trainer hands over, whoever made them.
    """

    api_version = 1
    Config = JSDConfig
    supports = CLASS_KINDS | {"different_outputs"}
    config: JSDConfig
    conformance = Conformance(minimum={"jsd": 0.0})

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        return divergence_and_labels(
            "jsd",
            student_out,
            targets,
            batch,
            info,
            temperature=self.config.temperature,
            alpha=self.config.alpha,
            divergence="jsd",
            beta=self.config.beta,
        )
