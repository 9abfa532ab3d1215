"""Knowledge distillation from a stronger teacher: DIST, Huang et al. 2022, NeurIPS, arXiv:2205.10536."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

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
    label_loss,
    wide,
)


class DISTConfig(MethodConfig):
    """Settings of DIST."""

    temperature: float = Field(
        1.0, gt=0, description="T of both softmaxes; the losses are multiplied by T^2."
    )
    inter: float = Field(1.0, ge=0, description="Weight of the correlation over classes, row by row.")
    intra: float = Field(1.0, ge=0, description="Weight of the correlation over rows, class by class.")
    ce: float = Field(1.0, ge=0, description="Weight of cross-entropy with the labels.")


class DIST(Method):
    """``T^2 inter (1 - mean over rows r(p, q)) + T^2 intra (1 - mean over classes r(p, q)) + ce CE``.

    r is Pearson's correlation of teacher's and student's probabilities; T^2 as in the authors' code and torchdistill.
    The second is taken within a micro-batch, so its size matters.
    """

    api_version = 1
    Config = DISTConfig
    supports = CLASS_KINDS
    config: DISTConfig
    conformance = Conformance(
        minimum={"inter": 0.0, "intra": 0.0},
        expected_failures=dict.fromkeys(
            ("micro_batches_do_not_matter", "ragged_micro_batches_do_not_matter"),
            "correlates the rows of a micro-batch",
        ),
    )

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        config, mask = self.config, batch.mask
        rows = slice(None) if mask is None else mask
        own, given = (
            (wide(logits[rows]).reshape(-1, logits.shape[-1]) / config.temperature).softmax(-1)
            for logits in (student_out.logits, targets.dense)
        )
        scale = config.temperature**2
        terms = {"inter": LossTerm(scale * info.mean(1 - correlation(own, given)), config.inter)}
        classes = own.sum() * 0.0 if len(own) < 2 else 1 - correlation(own.T, given.T).mean()
        # No sum over rows: each micro-batch counts by its part.
        terms["intra"] = LossTerm(scale * classes * info.share, config.intra)
        if config.ce and targets.has_labels:
            terms["ce"] = LossTerm(label_loss(student_out.logits, targets, batch, info), config.ce)
        return terms


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of each row ``(n, m)`` with its partner: ``(n,)``."""
    centred: list[Tensor] = [x - x.mean(1, keepdim=True) for x in (first, second)]
    return F.cosine_similarity(*centred, eps=torch.finfo(torch.float32).tiny ** 0.5)
