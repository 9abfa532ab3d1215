"""Plain training on the labels: the control beside every distilled student."""

from __future__ import annotations

from stillhouse.api import (
    SUPPORTS,
    Batch,
    LossTerm,
    Method,
    RunContext,
    Stage,
    StepInfo,
    StudentOut,
    Targets,
    hookimpl,
    label_loss,
)


class HardLabels(Method):
    """Cross-entropy with the labels (squared error for regression); no teacher."""

    api_version = 1
    requires = frozenset({"labels"})
    supports = SUPPORTS - {"embedding"}

    @hookimpl
    def stages(self, run: RunContext) -> list[Stage]:
        return [Stage("train", model=run.target_name, teacher=None)]

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        return {"ce": LossTerm(label_loss(student_out.logits, targets, batch, info))}
