"""Small models and data on which a plugin can be tried in milliseconds: vectors, and tokens with padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.api import (
    IGNORE,
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
LENGTH, VOCABULARY = 6, 12
PAD = 0
"""The token whose logits are infinite: what padding may hold."""


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


class ToyTokenNet(nn.Module):
    """Tokens ``(B, L)`` to logits ``(B, L, 5)``: one self-attention without positions, then ``body``, ``act``, ``head``.

    What it says of a real token does not depend on where padding stands, nor on how much of it there is.
    """

    def __init__(self, hidden: int = 12, *, noise: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.body = nn.Linear(hidden, hidden)
        self.act = nn.Tanh()
        self.head = nn.Linear(hidden, CLASSES)
        self.noise, self.scale = noise, scale

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.embed(input_ids)
        scores = self.query(states) @ self.key(states).transpose(1, 2) / math.sqrt(states.shape[-1])
        scores = scores.masked_fill(attention_mask[:, None] == 0, -1e4)
        states = states + scores.softmax(-1) @ self.value(states)
        logits: Tensor = self.head(self.act(self.body(states))) * self.scale
        if self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        return logits.masked_fill((input_ids == PAD)[..., None], torch.inf)


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
        return TensorSplit(inputs, classes.masked_fill(hidden, IGNORE))

    return _splits(split, train, unlabelled, labels=labels, known=known)


def toy_token_splits(
    train: int = 32, unlabelled: int = 24, *, labels: bool = True, known: float = 1.0
) -> Splits:
    """The same of sequences of 1 to 6 tokens, padded on the right, with a class a token."""
    generator = torch.Generator().manual_seed(7)

    def split(rows: int, part: float = 1.0) -> TensorSplit:
        lengths = torch.randint(1, LENGTH + 1, (rows, 1), generator=generator)
        real = torch.arange(LENGTH) < lengths
        tokens = torch.randint(1, VOCABULARY, (rows, LENGTH), generator=generator).where(real, PAD)
        classes = torch.randint(CLASSES, (rows, LENGTH), generator=generator)
        hidden = (torch.arange(rows) >= part * rows)[:, None] | ~real
        # The mask is given: a sample without labels counts too.
        inputs = {"input_ids": tokens, "attention_mask": real.long()}
        return TensorSplit(inputs, classes.masked_fill(hidden, IGNORE), mask=real)

    return _splits(split, train, unlabelled, labels=labels, known=known)


def _splits(
    split: Callable[..., TensorSplit], train: int, unlabelled: int, *, labels: bool, known: float
) -> Splits:
    data = Splits(train=split(train, known), validation=split(16), test=split(16))
    if unlabelled:
        data.unlabelled = split(unlabelled).without_labels()
    if not labels:
        data.train = data.train.without_labels()
    return data


@dataclass(frozen=True)
class Toys:
    """Models and data of one kind of task.

    teacher, student
        Always with the same weights; arguments go to the network.
    """

    task: str
    splits: Callable[..., Splits]
    network: Callable[..., nn.Module]

    def teacher(self, **given: Any) -> nn.Module:
        """The wider of the two."""
        return self._made(1, {"hidden": 24, **given})

    def student(self, **given: Any) -> nn.Module:
        """The narrower of the two."""
        return self._made(2, given)

    def _made(self, seed: int, given: dict[str, Any]) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.network(**given)


VECTORS = Toys("classification", toy_splits, ToyNet)
TOKENS = Toys("token_classification", toy_token_splits, ToyTokenNet)


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
