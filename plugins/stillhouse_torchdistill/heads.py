"""Trained modules on top of a feature, which some losses expect: projections, means with variances, embeddings."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import ConfigError, MethodConfig


class HeadConfig(MethodConfig):
    """A module over what a module of a model reads or gives; losses find it under the head's name."""

    role: Literal["student", "teacher"] = Field("student", description="Whose feature it reads.")
    path: str = Field(".", description="The module; '.' is the whole model.")
    side: Literal["input", "output"] = Field("output", description="What is read of that module.")
    width: int = Field(64, gt=0, description="Channels that it gives, on axis 1.")
    kind: Literal["linear", "gaussian", "unit"] = Field(
        "linear",
        description="linear; gaussian: a linear mean and a trained variance (VID); unit: linear, of length 1 (CRD).",
    )


class Head(nn.Module):
    """A linear map of axis 1: ``(B, C)``, ``(B, C, L)`` or ``(B, C, H, W)`` to ``width`` channels."""

    def __init__(self, config: HeadConfig, like: Tensor) -> None:
        super().__init__()
        makers: dict[int, type[nn.Module]] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}
        if like.dim() not in makers:
            raise ConfigError(
                f"torchdistill: a head reads {config.role}.{config.path} of shape {tuple(like.shape)}; expected 2, 3 "
                "or 4 axes"
            )
        extra = () if like.dim() == 2 else (1,)
        self.kind = config.kind
        self.map: nn.Module = makers[like.dim()](like.shape[1], config.width, *extra)
        if self.kind == "gaussian":
            ones = [1] * (like.dim() - 2)
            self.spread = nn.Parameter(
                self.map.get_parameter("weight").new_full((1, config.width, *ones), 5.0)
            )

    def forward(self, feature: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        given: Tensor = self.map(feature)
        if self.kind == "gaussian":
            # softplus keeps the variance positive (Ahn et al. 2019, arXiv:1904.05835, equation 6)
            return given, F.softplus(self.spread) + 1e-6
        return F.normalize(given, dim=1) if self.kind == "unit" else given
