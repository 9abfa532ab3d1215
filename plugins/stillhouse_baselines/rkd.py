"""Relational knowledge distillation: Park et al. 2019, CVPR, arXiv:1904.05068."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stillhouse.api import (
    SUPPORTS,
    Batch,
    Conformance,
    Layers,
    LossTerm,
    Method,
    MethodConfig,
    RunContext,
    StepInfo,
    StudentOut,
    TeacherOut,
    feature_pairs,
    hookimpl,
    wide,
)

RELATES = "relates the samples of a micro-batch to each other"


class RKDConfig(MethodConfig):
    """Settings of RKD."""

    layers: Layers = Field(
        "penultimate", description="Layers whose features are related; by name, or penultimate, middle, last."
    )
    distance: float = Field(25.0, ge=0, description="Weight of the distances.")
    angle: float = Field(50.0, ge=0, description="Weight of the angles, which cost the cube of the batch.")


class RKD(Method):
    """Huber loss between the two models' relations of samples: distances of pairs, angles of triples.

    Distances are divided by their mean over pairs apart; both terms are means over all ordered pairs or triples, as
    in the authors' code and torchdistill. Features of a sample with tokens are the mean of those that count. The
    relations are those within a micro-batch, so its size matters. Name it beside ``kd``: alone it trains no output
    layer. Default weights are those of CRD's comparison (Tian et al. 2020).
    """

    api_version = 1
    Config = RKDConfig
    requires = frozenset({"hidden_states"})
    supports = SUPPORTS
    config: RKDConfig
    conformance = Conformance(
        expected_failures=dict.fromkeys(
            ("micro_batches_do_not_matter", "ragged_micro_batches_do_not_matter"), RELATES
        )
    )

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        self.pairs = feature_pairs(run, self.config.layers)

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, teacher_out: TeacherOut, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        weights = {"distance": self.config.distance, "angle": self.config.angle}
        losses: dict[str, list[Tensor]] = {name: [] for name, weight in weights.items() if weight}
        for pair in self.pairs:
            student, teacher = pair.of(student_out, teacher_out)
            own, given = pair.student.pooled(student, batch), pair.teacher.pooled(teacher, batch)
            if batch.mask is not None:
                counts = batch.mask.reshape(len(batch), -1).any(1)
                own, given = own[counts], given[counts]
            for name, found in losses.items():
                found.append(relation_loss(name, wide(own), wide(given)))
        # Relations are no rows: each micro-batch counts by its part of them.
        return {
            name: LossTerm(torch.stack(found).mean() * info.share, weights[name])
            for name, found in losses.items()
        }


def relation_loss(name: str, own: Tensor, given: Tensor) -> Tensor:
    """``distance`` or ``angle`` of features ``(B, D)``; fewer than two samples have no relations."""
    if len(own) < 2:
        return own.sum() * 0.0
    relations = distances if name == "distance" else angles
    return F.smooth_l1_loss(relations(own), relations(given))


def distances(features: Tensor) -> Tensor:
    """``(B, B)``: Euclidean distances over their mean."""
    found = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    apart = found > 0
    mean = found.sum() / apart.sum().clamp(min=1)
    return found / mean.clamp(min=1e-12)


def angles(features: Tensor) -> Tensor:
    """``(B, B, B)``: at sample i the cosine of the angle between those to j and k."""
    towards = F.normalize(features[None] - features[:, None], dim=2)
    return towards @ towards.transpose(1, 2)
