"""Teacher assistants: TAKD, Mirzadeh et al. 2020, AAAI, arXiv:1902.03393."""

from __future__ import annotations

import copy
from typing import Any

from pydantic import Field
from torch import nn

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


class TAKDConfig(MethodConfig):
    """Settings of TAKD."""

    assistants: tuple[dict[str, Any], ...] | None = Field(
        None,
        min_length=1,
        description="From large to small, each named and set as a student is; default: one like the student.",
    )
    temperature: float = Field(4.0, gt=0, description="T of both softmaxes; the loss is multiplied by T^2.")
    alpha: float = Field(0.9, ge=0, le=1, description="Weight of the teacher; 1 - alpha is the labels'.")
    share: float = Field(1.0, gt=0, description="Length of each assistant's stage; the student's is 1.")


class TAKD(Method):
    """KD down a chain: the teacher teaches the first assistant, each assistant the next, the last one the student.

    Stage ``assistant-k``, then ``student``, each ``alpha T^2 KL + (1 - alpha) CE``; the teacher is called in the first
    alone. The paper's assistants lie between the two in size. The default, one like the student, is the end of that
    scale (born-again networks, Furlanello et al. 2018), there so that the method runs where models have no names.
    """

    api_version = 1
    Config = TAKDConfig
    supports = CLASS_KINDS | {"multi_label"}
    config: TAKDConfig
    conformance = Conformance(minimum={"kl": 0.0})

    @hookimpl
    def auxiliary_modules(self, run: RunContext) -> dict[str, nn.Module]:
        if self.config.assistants is None:
            run.chose("assistants", "one like the student", "none is named")
            made: list[nn.Module] = [copy.deepcopy(run.target)]
        elif run.build is None:
            raise ConfigError(
                f"{run.caller}.assistants names models, and this trainer knows models as objects only; expected none: the "
                "assistant is then like the student"
            )
        else:
            made = [run.build(spec) for spec in self.config.assistants]
        self._names = [f"assistant{number}" for number in range(1, len(made) + 1)]
        return dict(zip(self._names, made, strict=True))

    @hookimpl
    def stages(self, run: RunContext) -> list[Stage]:
        found, teacher = [], "teacher"
        for number, name in enumerate(self._names, 1):
            found.append(
                Stage(f"assistant-{number}", self.config.share, model=name, train=(name,), teacher=teacher)
            )
            teacher = name
        return [*found, Stage("student", model=run.target_name, train=(run.target_name,), teacher=teacher)]

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
