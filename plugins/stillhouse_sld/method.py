"""Soft label distillation in three stages.

The name SLD stands in no published paper; this is our reading of its source text, grounded in Hinton et al.
2015 (arXiv:1503.02531), Noisy Student (Xie et al. 2020, arXiv:1911.04252) and Born-Again Networks (Furlanello
et al. 2018, arXiv:1805.04770). The per-class choice of unlabelled rows is that of SSLD (PaddleClas).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from stillhouse.api import (
    IGNORE,
    Batch,
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
)
from stillhouse.kernels import distillation_loss, softmax_kl

SHARES = {"distil": 1.0, "relabel": 6.0, "target": 2.0}
TEMPERATURE = 4.0


class SLDConfig(MethodConfig):
    """Settings of SLD; none needs to be given."""

    temperature: float | None = Field(None, gt=0, description="T of both softmaxes; default 4.")
    labels: Literal["soft", "hard", "actual"] = Field(
        "soft",
        description="Stage 3: soft: KL alone; hard: beside it, cross-entropy with the class that the small "
        "network names; actual: with the true label where there is one, else that class.",
    )
    shares: tuple[float, float, float] | None = Field(
        None, description="Relative lengths of the three stages; default 1, 6, 2."
    )
    top_per_class: int | None = Field(
        None, gt=0, description="Unlabelled rows kept per class, the teacher's surest first; default all."
    )

    @field_validator("shares")
    @classmethod
    def _some(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and (min(value) < 0 or sum(value) == 0):
            raise ValueError("expected lengths of 0 or more, one of them above 0")
        return value


class SLD(Method):
    """Source S teaches the small network M with labels' inputs, then without; M's soft labels teach the target.

    ``distil``: M on the labelled inputs, T^2 KL(S || M). ``relabel``: the same on the unlabelled inputs; M's
    outputs over all inputs are then taken in one pass and kept. ``target``: the target (M going on, or another
    model) trains on all inputs, M's kept outputs standing where S's would; S is not called.
    """

    api_version = 1
    Config = SLDConfig
    requires = frozenset({"logits", "deterministic_teacher"})
    config: SLDConfig
    conformance = Conformance(minimum={"kl": 0.0})

    def __init__(self, config: SLDConfig | None = None) -> None:
        super().__init__(config)
        self.temperature = self.config.temperature or TEMPERATURE

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        if self.config.temperature is None:
            run.chose("sld.temperature", TEMPERATURE, "default")
        if self.config.shares is None:
            run.chose("sld.shares", list(SHARES.values()), "default: distil, relabel, target")
        if run.splits is not None and run.splits.unlabelled is None:
            run.chose("sld.unlabelled", "the labelled split's inputs", "the task has no unlabelled split")

    @hookimpl
    def stages(self, run: RunContext) -> list[Stage]:
        distil, relabel, target = self.config.shares or SHARES.values()
        return [
            Stage("distil", distil, data="labelled"),
            Stage("relabel", relabel, data="unlabelled", top_per_class=self.config.top_per_class),
            Stage("target", target, data="all", model=run.target_name, teacher="student"),
        ]

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, step: StepInfo
    ) -> dict[str, LossTerm]:
        settings: dict[str, Any] = {
            "temperature": self.temperature, "mask": batch.mask, "count": step.rows,
        }  # fmt: skip
        if step.stage.name != "target" or self.config.labels == "soft":
            return {"kl": LossTerm(softmax_kl(student_out.logits, targets.soft, **settings))}
        labels = targets.dense.argmax(-1)
        if self.config.labels == "actual" and targets.labels is not None:
            labels = targets.labels.where(targets.labels != IGNORE, labels)
        # Every row has a label here, so the mean is over all valid rows.
        kl, ce = distillation_loss(
            student_out.logits, targets.soft, labels, weights=(0.5, 0.5), label_count=step.rows, **settings
        )
        return {"kl": LossTerm(kl, 0.5), "ce": LossTerm(ce, 0.5)}
