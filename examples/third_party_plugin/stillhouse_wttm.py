"""Weighted transformed teacher matching (Zheng & Yang, ICLR 2024, arXiv:2402.11148)."""

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
    hookimpl,
    label_loss,
)
from stillhouse.kernels import softmax_kl


class WTTMConfig(MethodConfig):
    """Settings of WTTM."""

    temperature: float = Field(
        4.0, gt=0, description="T of the teacher alone: its probabilities to the power 1/T."
    )
    beta: float = Field(1.0, ge=0, description="Weight of the teacher beside the labels.")
    weighted: bool = Field(True, description="Whether uncertain teacher rows weigh more; False gives TTM.")


class WTTM(Method):
    """``CE(labels, q) + beta U(p) KL(p^ || q)`` with ``p^ = softmax(z / T)`` and the student's ``q`` at T = 1.

    Dropping the student's temperature adds, as the paper shows, a Renyi entropy to the objective of knowledge
    distillation; ``U(p) = sum_k p_k^(1/T)`` weighs a row by how smooth the teacher's ``p`` is on it.
    There is no T^2: the student has no temperature that would shrink its gradient.
    """

    api_version = 1
    Config = WTTMConfig
    config: WTTMConfig
    requires = frozenset({"logits"})
    conformance = Conformance(settings={"temperature": 1.0}, minimum={"ttm": 0.0})

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        teacher = targets.dense.float()
        power = 1 / self.config.temperature
        rows = softmax_kl(student_out.logits, teacher * power, mask=batch.mask, reduction="none")
        if self.config.weighted:
            weights = (teacher.log_softmax(-1) * power).exp().sum(-1)
            if batch.mask is not None:  # a masked row may hold anything, and NaN times 0 is NaN
                weights = weights.where(batch.mask, weights.new_zeros(()))
            rows = rows * weights
        terms = {"ttm": LossTerm(info.mean(rows, batch.mask), self.config.beta)}
        if targets.has_labels:
            terms["ce"] = LossTerm(label_loss(student_out.logits, targets, batch, info))
        return terms
