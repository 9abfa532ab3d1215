"""The flow of the solution procedure: Yim et al. 2017, CVPR ("A Gift from Knowledge Distillation")."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import (
    SUPPORTS,
    Batch,
    ConfigError,
    Feature,
    Layers,
    LossTerm,
    Method,
    MethodConfig,
    RunContext,
    StepInfo,
    StudentOut,
    TeacherOut,
    feature_mean,
    feature_pairs,
    hookimpl,
    kept,
    wide,
)


class FSPConfig(MethodConfig):
    """Settings of FSP."""

    layers: Layers = Field(
        "ends",
        description="Layers between which the flow is taken, one to the next: ends (first and penultimate), uniform or "
        "last; or each of the student's by name with the teacher's, two or more.",
    )
    weight: float = Field(1.0, gt=0, description="Weight of the term.")


class FSP(Method):
    """``mean over flows and elements (G_S - G_T)^2`` with ``G = F_a F_b^T / positions``, F ``(channels, positions)``.

    G is torchdistill's, with max pooling where the two layers of one model have other positions. Its loss sums the
    norms of G's columns; this is the squared error of the paper's equation 3, as the mean over elements, so that
    widths compare. The paper chooses layers of equal widths; where they differ here, the student's features go through
    a trained linear map without bias. Name it beside ``kd``: alone it trains no output layer.
    """

    api_version = 1
    Config = FSPConfig
    requires = frozenset({"hidden_states"})
    supports = SUPPORTS
    config: FSPConfig

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        self.pairs = feature_pairs(run, self.config.layers)
        if len(self.pairs) < 2:
            raise ConfigError(
                f"{run.caller}: got {len(self.pairs)} layer; expected two or more, with a flow between"
            )
        self.maps = nn.ModuleList(
            nn.Identity() if pair.student.width == pair.teacher.width else _map(pair.student, pair.teacher)
            for pair in self.pairs
        )

    @hookimpl
    def auxiliary_modules(self, run: RunContext) -> dict[str, nn.Module]:
        return {"maps": self.maps}

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, teacher_out: TeacherOut, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        own, given, counts = [], [], None
        for pair, widen in zip(self.pairs, self.maps, strict=True):
            student, teacher = pair.of(student_out, teacher_out)
            mask = pair.student.mask(student, batch)
            if mask is not None and pair.student.tokens:
                counts = mask.sum(1).clamp(min=1)[:, None, None]
            mapped = widen(_channels_last(student, pair.student))
            own.append(_channels_first(kept(mapped, mask)))
            given.append(_channels_first(kept(_channels_last(teacher, pair.teacher), mask)))
        errors = [
            (flow(*mine, counts) - flow(*theirs, counts)).square().flatten(1).mean(1)
            for mine, theirs in zip(pairwise(own), pairwise(given), strict=True)
        ]
        value = feature_mean(torch.stack(errors).mean(0), self.pairs[0].student, batch, info)
        return {"flow": LossTerm(value, self.config.weight)}


def flow(first: Tensor, second: Tensor, counts: Tensor | None = None) -> Tensor:
    """``(B, C_a, C_b)`` from features ``(B, C, positions...)`` of one model's two layers.

    counts
        Of tokens: how many positions count in each sample ``(B, 1, 1)``; the others hold zeros. None: all.
    """
    first, second = _meet(wide(first), wide(second))
    return first @ second.transpose(1, 2) / (first.shape[-1] if counts is None else counts)


def _meet(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both as ``(B, C, positions)`` at the smaller number of positions; a layer without positions has one."""
    if first.shape[2:] != second.shape[2:]:
        if first.dim() != second.dim():
            first, second = (
                x.flatten(2).amax(-1, keepdim=True) if x.dim() > 2 else x for x in (first, second)
            )
        else:
            size = [min(sizes) for sizes in zip(first.shape[2:], second.shape[2:], strict=True)]
            pool = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[len(size) - 1]
            first, second = (pool(x, size) for x in (first, second))
    first, second = (x[..., None] if x.dim() == 2 else x.flatten(2) for x in (first, second))
    return first, second


def _map(student: Feature, teacher: Feature) -> nn.Module:
    return nn.Linear(student.width, teacher.width, bias=False)


def _channels_last(features: Tensor, side: Feature) -> Tensor:
    return features if side.tokens else features.movedim(1, -1)


def _channels_first(features: Tensor) -> Tensor:
    return features.movedim(-1, 1)
