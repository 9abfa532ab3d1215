"""Soft label distillation in three stages.

The name SLD stands in no published paper; this is our reading of its source text, grounded in Hinton et al.
2015 (arXiv:1503.02531), Noisy Student (Xie et al. 2020, arXiv:1911.04252) and Born-Again Networks (Furlanello
et al. 2018, arXiv:1805.04770). The per-class choice of unlabelled rows is that of SSLD (PaddleClas).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from stillhouse.api import (
    CLASS_KINDS,
    IGNORE,
    Batch,
    ConfigError,
    Conformance,
    LossTerm,
    Method,
    MethodConfig,
    RunContext,
    Split,
    Stage,
    StepInfo,
    StudentOut,
    Targets,
    hookimpl,
    soft_and_label_terms,
    soft_loss,
)

SHARES = {"distil": 1.0, "relabel": 6.0, "target": 2.0}
TEMPERATURE = 4.0
ROWS = 1024
"""Samples that the teacher reads at a time where rows are chosen."""


class SLDConfig(MethodConfig):
    """Settings of SLD; none needs to be given."""

    temperature: float | None = Field(None, gt=0, description="T of both softmaxes; default 4.")
    alpha: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Stages 1 and 2: weight of the teacher; 1 - alpha is the labels', and below 1 stage 2 reads the "
        "labelled inputs too.",
    )
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

    @model_validator(mode="after")
    def _rows_without_labels(self) -> SLDConfig:
        if self.alpha < 1 and self.top_per_class is not None:
            raise ValueError(
                f"alpha is {self.alpha}, with which stage 2 reads rows that have labels, and top_per_class chooses among "
                "those that have none; expected one of the two: leave the other out"
            )
        return self


class SLD(Method):
    """Source S teaches the small network M with labels' inputs, then without; M's soft labels teach the target.

    ``distil``: M on the labelled inputs, T^2 KL(S || M). ``relabel``: the same on the unlabelled inputs; M's
    outputs over all inputs are then taken in one pass and kept. ``target``: the target (M going on, or another
    model) trains on all inputs, M's kept outputs standing where S's would; S is not called.
    """

    api_version = 1
    Config = SLDConfig
    supports = CLASS_KINDS | {"different_outputs"}
    requires = frozenset({"logits", "deterministic_teacher"})
    config: SLDConfig
    conformance = Conformance(minimum={"kl": 0.0})

    def __init__(self, config: SLDConfig | None = None) -> None:
        super().__init__(config)
        self.temperature = self.config.temperature or TEMPERATURE

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        if self.config.temperature is None:
            run.chose("temperature", TEMPERATURE, "default")
        if self.config.shares is None:
            run.chose("shares", list(SHARES.values()), "default: distil, relabel, target")
        if run.splits is not None and run.splits.unlabelled is None:
            run.chose("unlabelled", "the labelled split's inputs", "the task has no unlabelled split")

        if run.splits is None and self.config.top_per_class is not None:
            raise ConfigError(
                f"{run.caller}.top_per_class chooses rows of a split, and this trainer hands over batches; leave it out"
            )

    @hookimpl
    def stages(self, run: RunContext) -> list[Stage]:
        distil, relabel, target = self.config.shares or SHARES.values()
        return [
            Stage("distil", distil, data="labelled"),
            Stage("relabel", relabel, data="unlabelled" if self.config.alpha == 1 else "all"),
            Stage("target", target, data="all", model=run.target_name, teacher="student"),
        ]

    @hookimpl
    def stage_rows(self, run: RunContext, stage: Stage, split: Split) -> Tensor | None:
        if stage.name != "relabel" or self.config.top_per_class is None:
            return None
        return surest(run, split, self.config.top_per_class)

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        logits, temperature, alpha = student_out.logits, self.temperature, self.config.alpha
        if info.stage.name != "target" and alpha < 1:
            return soft_and_label_terms(
                logits,
                targets,
                batch,
                info,
                temperature=temperature,
                soft_weight=alpha,
                label_weight=1 - alpha,
            )
        if info.stage.name != "target" or self.config.labels == "soft":
            return {"kl": LossTerm(soft_loss(logits, targets, batch, info, temperature=temperature))}
        # A class that the target has no output for can't be learned: the surest among the others then.
        labels = named = targets.dense[..., : logits.shape[-1]].argmax(-1)
        if self.config.labels == "actual":
            labels = self._actual(targets, named)
        probable = labels.is_floating_point()
        own = replace(
            targets, labels=None if probable else labels, probabilities=labels if probable else None
        )
        return soft_and_label_terms(
            logits,
            own,
            batch,
            info,
            temperature=temperature,
            soft_weight=0.5,
            label_weight=0.5,
            label_count=info.rows,  # every row has a label here
        )

    @staticmethod
    def _actual(targets: Targets, named: Tensor) -> Tensor:
        """The true label where there is one, in the form in which it comes, else the class that M names."""
        if targets.probabilities is not None:
            known = targets.probabilities.sum(-1, keepdim=True) > 0
            hot = F.one_hot(named, targets.probabilities.shape[-1]).to(targets.probabilities)
            return targets.probabilities.where(known, hot)
        return named if targets.labels is None else targets.labels.where(targets.labels != IGNORE, named)


def surest(run: RunContext, split: Split, count: int) -> Tensor:
    """Sample numbers of the ``count`` rows of each class that the teacher is surest of."""
    confidence, predicted = [], []
    device = next(run.student.parameters()).device
    for start in range(0, len(split), ROWS):
        batch = split.batch(torch.arange(start, min(start + ROWS, len(split)))).to(device)
        sure, named = run.outputs("teacher", batch).logits.float().softmax(-1).max(-1)
        if sure.dim() > 1:
            raise ConfigError(
                f"{run.caller}.top_per_class chooses samples, and this task has a class a position; leave it out"
            )
        confidence.append(sure.cpu())
        predicted.append(named.cpu())
    sure, named = torch.cat(confidence), torch.cat(predicted)
    chosen = []
    for label in torch.unique(named):
        ids = (named == label).nonzero()[:, 0]
        chosen.append(ids[sure[ids].argsort(descending=True, stable=True)[:count]])
    return torch.cat(chosen).sort().values
