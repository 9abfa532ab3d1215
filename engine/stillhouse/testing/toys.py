"""Small models and data on which a plugin can be tried in milliseconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.api import (
    SUPPORTS,
    Batch,
    LossTerm,
    Method,
    Splits,
    StepInfo,
    StudentOut,
    Targets,
    TensorSplit,
    hookimpl,
    label_loss,
    soft_loss,
)

FEATURES, CLASSES = 8, 5
FLAG = 1e3
"""Rows whose first input is above this have infinite logits: what masked rows may hold."""


class ToyNet(nn.Module):
    """Inputs ``(B, 8)`` to logits ``(B, 5)`` through modules called ``body``, ``act`` and ``head``.

    noise
        Standard deviation of what is added to the logits, in eval mode too: a teacher that is not deterministic.
    """

    def __init__(self, hidden: int = 12, *, noise: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, hidden)
        self.act = nn.Tanh()
        self.head = nn.Linear(hidden, CLASSES)
        self.noise, self.scale = noise, scale

    def forward(self, inputs: Tensor) -> Tensor:
        flagged = inputs[:, :1] > FLAG
        logits: Tensor = self.head(self.act(self.body(inputs.clamp(max=FLAG)))) * self.scale
        if self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        return logits.masked_fill(flagged, torch.inf)


class ToyTeacher(ToyNet):
    """The wider of the two."""

    def __init__(self, hidden: int = 24, *, noise: float = 0.0, scale: float = 1.0) -> None:
        super().__init__(hidden, noise=noise, scale=scale)


class ToyStudent(ToyNet):
    """The narrower of the two."""


def toy_splits(train: int = 32, unlabelled: int = 24, *, labels: bool = True, known: float = 1.0) -> Splits:
    """Random inputs ``(N, 8)`` and classes from a seed of their own.

    known
        Part of the training rows that keep their label; the others have ``-100``.
    """
    generator = torch.Generator().manual_seed(7)

    def split(rows: int, part: float = 1.0) -> TensorSplit:
        inputs = torch.randn(rows, FEATURES, generator=generator)
        classes = torch.randint(CLASSES, (rows,), generator=generator)
        hidden = torch.arange(rows) >= part * rows
        return TensorSplit(inputs, classes.masked_fill(hidden, -100))

    data = Splits(train=split(train, known), validation=split(16), test=split(16))
    if unlabelled:
        data.unlabelled = split(unlabelled).without_labels()
    if not labels:
        data.train = data.train.without_labels()
    return data


class Plain(Method):
    """The loss beside a method that has none of its own: whatever the targets allow."""

    api_version = 1
    requires = frozenset()
    supports = SUPPORTS

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        logits = student_out.logits
        terms = {}
        if targets.soft is not None:
            terms["kl"] = LossTerm(soft_loss(logits, targets, batch, info))
        if targets.has_labels:
            terms["ce"] = LossTerm(label_loss(logits, targets, batch, info))
        if not terms:
            terms["square"] = LossTerm(info.mean(logits.float().square().mean(-1), batch.mask))
        return terms
