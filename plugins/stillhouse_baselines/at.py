"""Attention transfer: Zagoruyko & Komodakis 2017, arXiv:1612.03928."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stillhouse.api import (
    SUPPORTS,
    Batch,
    ConfigError,
    Conformance,
    Feature,
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


class ATConfig(MethodConfig):
    """Settings of attention transfer."""

    layers: Layers = Field(
        "middle",
        description="Compared layers: middle, penultimate, ends, uniform or last; or each of the student's by name "
        "with the teacher's.",
    )
    weight: float = Field(1000.0, gt=0, description="Weight of the term; its values are small.")


class AT(Method):
    """``sum over layers of mean over positions (a_S / |a_S| - a_T / |a_T|)^2``, ``a`` the mean square over channels.

    The mean over positions of the *squared* difference is that of the authors' code and of torchdistill's mode
    ``code``; equation 2 of the paper has the norm of the difference, not squared. Maps of other sizes meet at the
    smaller one. In sequences the positions are the tokens that count. Widths may differ, so nothing is trained beside
    the student. Name it beside ``kd``: alone it trains no output layer.
    """

    api_version = 1
    Config = ATConfig
    requires = frozenset({"hidden_states"})
    supports = SUPPORTS
    config: ATConfig
    conformance = Conformance(task="token_classification")  # a vector has no positions

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        self.pairs = feature_pairs(run, self.config.layers)
        for side in (side for pair in self.pairs for side in (pair.student, pair.teacher)):
            if len(side.shape) < 3:
                raise ConfigError(
                    f"{run.caller}: {side.role}.{side.name} gives {side.shape}, one vector a sample; expected positions "
                    "(B, C, positions...) or (B, L, H), over which attention is a map: name another layer"
                )

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, teacher_out: TeacherOut, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        terms = [self._layer(pair, *pair.of(student_out, teacher_out), batch, info) for pair in self.pairs]
        return {"attention": LossTerm(torch.stack(terms).sum(), self.config.weight)}

    def _layer(
        self, pair: FeaturePair, student: Tensor, teacher: Tensor, batch: Batch, info: StepInfo
    ) -> Tensor:
        mask = pair.student.mask(student, batch)
        own, given = (
            attention(kept(student, mask), pair.student),
            attention(kept(teacher, mask), pair.teacher),
        )
        own, given = _meet(own, given, info.caller)
        error = (F.normalize(own.flatten(1)) - F.normalize(given.flatten(1))).square()
        tokens = mask is not None and mask.shape == error.shape
        count = mask.sum(1).clamp(min=1) if tokens and mask is not None else error.shape[1]
        return feature_mean(error.sum(1) / count, pair.student, batch, info)


def attention(features: Tensor, side: Feature) -> Tensor:
    """The attention map ``(B, positions...)``: the mean square over channels."""
    return wide(features).square().mean(-1 if side.tokens else 1)


def _meet(own: Tensor, given: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller size of each axis."""
    if own.shape == given.shape:
        return own, given
    if own.dim() != given.dim():
        raise ConfigError(
            f"{name}: attention maps of shape {tuple(own.shape)} and {tuple(given.shape)}; expected as many axes of positions: "
            "pair other layers"
        )
    size = [min(sizes) for sizes in zip(own.shape[1:], given.shape[1:], strict=True)]
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
    first, second = (pool(x[:, None], size if len(size) > 1 else size[0])[:, 0] for x in (own, given))
    return first, second
