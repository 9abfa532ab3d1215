"""Stochastic encoders into one space, decoders out of it, and the Gaussian closed forms between them.

Deep VIB (Alemi et al. 2017, arXiv:1612.00410) gives the encoder, the prior N(0, I) and the rate; the learned
variance of the Gaussian decoder is that of variational information distillation (Ahn et al. 2019,
arXiv:1904.05835), whose optimum is the mean squared error.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stillhouse.api import wide

LIMIT = 8.0
"""Log-variances are held within +-LIMIT, so that no exponential overflows."""


class Gaussian(NamedTuple):
    """Diagonal Gaussians, one a row: ``mean`` and ``log_variance`` of shape ``(..., D)``, float32 or float64."""

    mean: Tensor
    log_variance: Tensor

    def sample(self) -> Tensor:
        """One draw a row ``(..., D)``, by the reparameterisation trick."""
        return self.mean + (0.5 * self.log_variance).exp() * torch.randn_like(self.mean)


def rate(code: Gaussian) -> Tensor:
    """KL(code || N(0, I)) of each row ``(...)``, in nats: an upper bound of I(X; Z) in the mean."""
    mean, log_variance = code
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


def divergence(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) of each row ``(...)``, in nats."""
    spread = (p.log_variance.exp() + (p.mean - q.mean).square()) / q.log_variance.exp()
    return 0.5 * (q.log_variance - p.log_variance + spread - 1).sum(-1)


class Encoder(nn.Module):
    """Features ``(..., width)`` to a Gaussian over ``(..., dim)``.

    hidden
        Units of one ReLU layer; 0 makes mean and log-variance linear in the features.
    scaled
        Features are divided by sqrt(width), and the weights that read them are that much larger at first: the same
        code before training, and one update of Adam's, which moves every weight by the learning rate whatever the
        gradient, moves the code by sqrt(width) times it and not by width times it.
    deterministic
        The mean alone; as a Gaussian it then has variance 1.
    """

    def __init__(
        self, width: int, dim: int, hidden: int = 0, *, deterministic: bool = False, scaled: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.deterministic = dim, deterministic
        outputs = dim if deterministic else 2 * dim
        first = nn.Linear(width, hidden or outputs)
        self.net = nn.Sequential(first, nn.ReLU(), nn.Linear(hidden, outputs)) if hidden else first
        self.scale = math.sqrt(width) if scaled else 1.0
        with torch.no_grad():
            first.weight.mul_(self.scale)

    def forward(self, features: Tensor) -> Gaussian:
        out = wide(self.net(features / self.scale))
        if self.deterministic:
            return Gaussian(out, torch.zeros_like(out))
        mean, log_variance = torch.split(out, self.dim, -1)
        return Gaussian(mean, log_variance.clamp(-LIMIT, LIMIT))

    def code(self, given: Gaussian) -> Tensor:
        """What the decoder reads: a draw, or the mean of a deterministic encoder."""
        return given.mean if self.deterministic else given.sample()


class GaussianDecoder(nn.Module):
    """Codes ``(..., dim)`` to a Gaussian over ``(..., outputs)`` whose variance is one trained number an output."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.mean = nn.Linear(dim, outputs)
        self.log_variance = nn.Parameter(torch.zeros(outputs))

    def forward(self, code: Tensor) -> Tensor:
        mean: Tensor = self.mean(code)
        return mean

    def distortion(self, code: Tensor, wanted: Tensor) -> Tensor:
        """-log density of ``wanted`` ``(..., outputs)`` for each row ``(...)``, in nats.

        Where the decoder is at its best the variance is the mean squared error.
        """
        log_variance = self.log_variance.clamp(-LIMIT, LIMIT)
        error = (wide(wanted) - wide(self.mean(code))).square()
        nats: Tensor = 0.5 * (error / log_variance.exp() + log_variance + math.log(2 * math.pi)).sum(-1)
        return nats
