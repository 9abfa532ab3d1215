"""Knowledge distillation: Hinton, Vinyals & Dean 2015, arXiv:1503.02531."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stillhouse.api import (
    CLASS_KINDS,
    Batch,
    ConfigError,
    Conformance,
    LossTerm,
    Method,
    MethodConfig,
    RunContext,
    Stage,
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
    data: Literal["labelled", "all"] = Field(
        "labelled",
        description="What it trains on; all: the inputs without labels too, where the teacher alone speaks.",
    )


class KD(Method):
    """``alpha T^2 KL(teacher || student) + (1 - alpha) CE(labels, student)``.

    Rows without a label have the first term alone. Several labels at once: the same of each class's yes and no. With
    ``data: all`` it is the control for every method that sees unlabelled data.
    """

    api_version = 1
    Config = KDConfig
    supports = CLASS_KINDS | {"multi_label", "different_outputs"}
    config: KDConfig
    conformance = Conformance(minimum={"kl": 0.0})

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        unlabelled = run.splits is not None and run.splits.unlabelled is not None
        if self.config.data == "all" and unlabelled and run.kind.labels != "classes":
            raise ConfigError(
                f"{run.caller}.data is all, and {run.kind} has labels that can't be missing in single rows; expected "
                "data: labelled"
            )

    @hookimpl
    def stages(self, run: RunContext) -> list[Stage] | None:
        if self.config.data == "labelled":
            return None
        return [Stage("train", data="all", model=run.target_name)]

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
