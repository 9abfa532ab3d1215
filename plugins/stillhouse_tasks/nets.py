"""The networks that the tasks offer as teachers and students."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """1-D convolutions over ``(B, length)``, three layers of stride 2, then a linear head to ``(B, outputs)``."""

    def __init__(self, length: int, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, channels, 5, stride=2, padding=1)
        self.conv2 = nn.Conv1d(channels, channels, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(channels, channels, 3, stride=2, padding=1)
        with torch.no_grad():
            width = self._features(torch.zeros(1, length)).shape[-1]
        self.head = nn.Linear(width, outputs)

    def _features(self, inputs: Tensor) -> Tensor:
        x = self.conv1(inputs[:, None]).relu()
        x = self.conv2(x).relu()
        features: Tensor = self.conv3(x).relu().flatten(1)
        return features

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self._features(inputs))
        return logits


def mlp(inputs: int, outputs: int, hidden: int, layers: int) -> nn.Sequential:
    """``layers`` hidden layers of ``hidden`` ReLU units, then a linear head."""
    widths = [inputs, *[hidden] * layers]
    stack: list[nn.Module] = []
    for before, after in pairwise(widths):
        stack += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*stack, nn.Linear(widths[-1], outputs))
