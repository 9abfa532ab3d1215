"""Hints from a teacher's features: FitNets, Romero et al. 2015, arXiv:1412.6550."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import (
    SUPPORTS,
    Batch,
    ConfigError,
    LossTerm,
    Method,
    MethodConfig,
    RunContext,
    StepInfo,
    StudentOut,
    TeacherOut,
    hookimpl,
)


class FitNetsConfig(MethodConfig):
    """Settings of FitNets."""

    teacher_layer: str | None = Field(None, description="Module that gives the hint; default: see FitNets.")
    student_layer: str | None = Field(None, description="Module that is guided; default: see FitNets.")
    weight: float = Field(1.0, gt=0, description="Weight of the hint.")


class Regressor(nn.Module):
    """From the student's features to the teacher's width.

    Features of the same rank with places (``(B, channels, places...)``) meet at the smaller number of places, with
    a linear map over channels (a 1x1 convolution); all others are flattened and mapped linearly.
    """

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        super().__init__()
        self.places = student.dim() == teacher.dim() and 3 <= student.dim() <= 5
        if self.places:
            self.size: Any = tuple(
                min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)
            )
            self.map = nn.Linear(student.shape[1], teacher.shape[1])
        else:
            self.map = nn.Linear(student[0].numel(), teacher[0].numel())

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both features ``(B, ...)`` in the teacher's width, of one shape."""
        if not self.places:
            return self.map(student.flatten(1)), teacher.flatten(1)
        student, teacher = (self._pooled(features) for features in (student, teacher))
        mapped: Tensor = self.map(student.movedim(1, -1)).movedim(-1, 1)
        return mapped, teacher

    def _pooled(self, features: Tensor) -> Tensor:
        if len(self.size) == 1:
            return F.adaptive_avg_pool1d(features, self.size[0])
        if len(self.size) == 2:
            return F.adaptive_avg_pool2d(features, self.size)
        return F.adaptive_avg_pool3d(features, self.size)


class FitNets(Method):
    """The mean squared error between the teacher's features and the student's, mapped by a trained regressor.

    The hint is one term of the loss from the first update to the last, as in the comparisons of CRD (Tian et al.
    2020) and torchdistill; the paper trains on hints first and distils afterwards. It halves the squared error and
    sums it over the elements; this is the mean, so that widths compare. Name it beside ``kd``: alone it trains no
    output layer.

    By default the guided module is the student's middle one among those without children, and the teacher's
    likewise.
    """

    api_version = 1
    Config = FitNetsConfig
    requires = frozenset({"hidden_states"})
    supports = SUPPORTS
    config: FitNetsConfig

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        assert run.teacher is not None
        self.role = run.target_name
        self.layers = {
            "teacher": self.config.teacher_layer or middle(run.teacher),
            self.role: self.config.student_layer or middle(run.target),
        }
        for role, layer in self.layers.items():
            run.capture(role, layer)
        features = {role: run.outputs(role).features[layer] for role, layer in self.layers.items()}
        for role, tensor in features.items():
            if tensor.dim() < 2 or not tensor.is_floating_point():
                raise ConfigError(
                    f"fitnets: {role}.{self.layers[role]} gives {tensor.dtype} of shape {tuple(tensor.shape)}; "
                    "expected floats (B, ...): name another module"
                )
        self.regressor = Regressor(features[self.role], features["teacher"])
        shapes = " -> ".join(f"{tuple(features[role].shape[1:])}" for role in (self.role, "teacher"))
        named = f"{self.role}.{self.layers[self.role]} -> teacher.{self.layers['teacher']}"
        run.chose("hint", named, f"features {shapes}, regressor {self.regressor.map}")

    @hookimpl
    def auxiliary_modules(self, run: RunContext) -> dict[str, nn.Module]:
        return {"regressor": self.regressor}

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, teacher_out: TeacherOut, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        student = student_out.features[self.layers[self.role]]
        mapped, hint = self.regressor(student, teacher_out.features[self.layers["teacher"]])
        rows = (mapped.float() - hint.float()).square().flatten(1).mean(-1)
        mask = batch.mask if batch.mask is None or batch.mask.shape == rows.shape else None
        return {"hint": LossTerm(info.mean(rows, mask), self.config.weight)}


def middle(model: nn.Module) -> str:
    """The name of the middle one of the modules that have no children and no dropout."""
    names: list[str] = [
        name
        for name, module in model.named_modules()
        if name and not list(module.children()) and not isinstance(module, nn.Dropout | nn.Identity)
    ]
    if not names:
        raise ConfigError("fitnets: the model has no inner module; expected one to take features from")
    return names[(len(names) - 1) // 2]
