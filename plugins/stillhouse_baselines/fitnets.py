"""Hints from a teacher's features: FitNets, Romero et al. 2015, arXiv:1412.6550."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.api import (
    SUPPORTS,
    Batch,
    FeaturePair,
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
from stillhouse_baselines.pooling import pooled


class FitNetsConfig(MethodConfig):
    """Settings of FitNets."""

    layers: Layers = Field(
        "middle",
        description="Guided layers: middle, penultimate, uniform or last; or each of the student's by name with the "
        "teacher's that guides it.",
    )
    weight: float = Field(1.0, gt=0, description="Weight of the hint.")

    @model_validator(mode="before")
    @classmethod
    def _one_pair(cls, given: Any) -> Any:
        """``student_layer`` and ``teacher_layer`` together are one pair of ``layers``."""
        if not isinstance(given, Mapping) or not {"student_layer", "teacher_layer"} <= given.keys():
            return given
        rest = {
            name: value for name, value in given.items() if name not in ("student_layer", "teacher_layer")
        }
        if "layers" in rest:
            raise ValueError("layers are given twice: as layers, and as student_layer with teacher_layer")
        return {**rest, "layers": {given["student_layer"]: given["teacher_layer"]}}


class Regressor(nn.Module):
    """From the student's features to the teacher's width, by one trained linear map.

    Tokens ``(B, L, H)`` are mapped over H. Channels first ``(B, C, positions...)`` meet at the smaller number of
    positions and are mapped over C (a 1x1 convolution). All others are flattened.
    """

    def __init__(self, pair: FeaturePair) -> None:
        super().__init__()
        student, teacher = pair.student, pair.teacher
        own, other = student.shape, teacher.shape
        self.tokens = student.tokens
        self.size: tuple[int, ...] | None = None
        if self.tokens:
            self.map = nn.Linear(student.width, teacher.width)
        elif len(own) == len(other) and 3 <= len(own) <= 5:
            self.size = tuple(min(sizes) for sizes in zip(own[2:], other[2:], strict=True))
            self.map = nn.Linear(own[1], other[1])
        else:
            self.map = nn.Linear(math.prod(own[1:]), math.prod(other[1:]))

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both features in the teacher's width, of one shape, the width last: ``(B, positions..., W)``."""
        if self.tokens:
            return self.map(student), teacher
        if self.size is None:
            return self.map(student.flatten(1)), teacher.flatten(1)
        student, teacher = (pooled(features, self.size).movedim(1, -1) for features in (student, teacher))
        return self.map(student), teacher


class FitNets(Method):
    """The mean squared error between the teacher's features and the student's, mapped by a trained regressor.

    The hint is one term of the loss from the first update to the last, as in the comparisons of CRD (Tian et al.
    2020) and torchdistill; the paper trains on hints first and distils afterwards. It halves the squared error and
    sums it over the elements; this is the mean, so that widths compare, and the mean over layers where there are
    several. Name it beside ``kd``: alone it trains no output layer.

    Hidden states ``(B, L, H)`` are compared token by token. Where the batch's rows are those tokens, the mean is over
    the rows that count; where a row is a sample, over its tokens that are no padding.
    """

    api_version = 1
    Config = FitNetsConfig
    requires = frozenset({"hidden_states"})
    supports = SUPPORTS
    config: FitNetsConfig

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        self.pairs: Sequence[FeaturePair] = feature_pairs(run, self.config.layers)
        self.regressors = nn.ModuleList(Regressor(pair) for pair in self.pairs)

    @hookimpl
    def auxiliary_modules(self, run: RunContext) -> dict[str, nn.Module]:
        return {"regressor": self.regressors}

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, teacher_out: TeacherOut, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        hints = []
        for pair, regressor in zip(self.pairs, self.regressors, strict=True):
            student, teacher = pair.of(student_out, teacher_out)
            mask = pair.student.mask(student, batch)
            mapped, hint = regressor(kept(student, mask), kept(teacher, mask))
            error = (wide(mapped) - wide(hint)).square().mean(-1)
            hints.append(feature_mean(error, pair.student, batch, info))
        return {"hint": LossTerm(torch.stack(hints).mean(), self.config.weight)}
