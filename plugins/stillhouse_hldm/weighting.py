"""How loss terms are weighted. Each weighting is a module: what it trains or remembers travels in checkpoints.

A weighting has a slot for each term, given out as terms first appear. ``weights`` says how much each term counts
in the student's loss; ``objective`` is the loss of the weighting's own parameters, in which the terms are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillhouse.api import ConfigError

SLOTS = 32
"""How many terms a run may have."""

Gradient = list[Tensor]
"""A term's gradient, a tensor for each parameter that is looked at."""


@dataclass
class Part:
    """What one micro-batch gives of its update.

    slots, losses
        The terms and their parts of the update's values ``(n,)``, without a graph.
    share
        Part of the update's rows.
    last
        Whether the update is whole with it.
    gradients
        Gives each term's gradient; called only where it is needed, for it costs a backward pass a term.
    """

    slots: Tensor
    losses: Tensor
    share: float
    last: bool
    gradients: Callable[[], list[Gradient]]


class Weighting(nn.Module):
    """Every weight is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def slots(self, names: Sequence[str]) -> Tensor:
        """The slots of the terms ``(n,)``; ConfigError where there are none left."""
        for name in names:
            if name not in self.names:
                if len(self.names) == SLOTS:
                    raise ConfigError(
                        f"hldm: got more than {SLOTS} loss terms ({name}); expected fewer: drop methods"
                    )
                self.names.append(name)
        return torch.tensor([self.names.index(name) for name in names])

    def prepare(self) -> None:
        """Called before the first micro-batch of an update: put parameters back where they may be."""

    def weights(self, slots: Tensor) -> Tensor:
        """The weights ``(n,)`` of the terms in ``slots``, without a graph."""
        return torch.ones(len(slots))

    def objective(self, part: Part) -> tuple[Tensor, Tensor] | None:
        """The loss that trains the weighting, and the part of it that is shown and is no term's; or None.

        Summed over an update's micro-batches it does not depend on how the update was split.
        """
        return None

    def observe(self, metrics: Mapping[str, Tensor]) -> None:
        """Look at the terms' values of a whole update, after it."""


class Fixed(Weighting):
    """Weights set by hand; 1 where none is given."""

    def __init__(self, given: Mapping[str, float]) -> None:
        super().__init__()
        self.given = dict(given)

    def weights(self, slots: Tensor) -> Tensor:
        return torch.tensor([self.given.get(self.names[slot], 1.0) for slot in slots.tolist()])


class Uncertainty(Weighting):
    """``sum_i exp(-s_i) L_i + s_i``, s_i trained (Kendall, Gal & Cipolla 2018, arXiv:1705.07115).

    The paper's factors 1/2 are left out, which moves no optimum of the student's. For a constant loss the optimum
    is ``s_i = log L_i``: each term then contributes 1, whatever its scale. ``|s_i| <= bound``, else a term that
    goes to 0 drives its weight to infinity. ``scales`` divide a term where it is balanced, not where the student
    learns from it.
    """

    def __init__(self, bound: float, scales: Mapping[str, float]) -> None:
        super().__init__()
        self.bound, self.scales = bound, dict(scales)
        self.s = nn.Parameter(torch.zeros(SLOTS))

    def prepare(self) -> None:
        # A clamp in the loss would have gradient 0 outside, and s could never come back.
        with torch.no_grad():
            self.s.clamp_(-self.bound, self.bound)

    def weights(self, slots: Tensor) -> Tensor:
        return (-self.s.detach()[slots]).exp()

    def objective(self, part: Part) -> tuple[Tensor, Tensor]:
        named = [self.scales.get(self.names[slot], 1.0) for slot in part.slots.tolist()]
        s = self.s[part.slots]
        own = part.share * s.sum()
        return ((-s).exp() * part.losses / part.losses.new_tensor(named)).sum() + own, own


class Simplex(Weighting):
    """Weights on the simplex that minimise ``sum_i w_i L_i - tau H(w)``: the optimum is ``softmax(-L / tau)``.

    Without the entropy the optimum puts everything on the smallest loss.
    """

    def __init__(self, entropy: float) -> None:
        super().__init__()
        self.entropy = entropy
        self.theta = nn.Parameter(torch.zeros(SLOTS))

    def weights(self, slots: Tensor) -> Tensor:
        return self.theta.detach()[slots].softmax(0)

    def objective(self, part: Part) -> tuple[Tensor, Tensor]:
        logs = self.theta[part.slots].log_softmax(0)
        own = part.share * self.entropy * (logs.exp() * logs).sum()
        return (logs.exp() * part.losses).sum() + own, own


class GradNorm(Weighting):
    """Weighted gradient norms follow the terms' training rates (Chen et al. 2018, arXiv:1711.02257).

    Minimises ``sum_i |w_i G_i - mean(w G) r_i ** alpha|``, the second part held constant, with G_i the norm of
    L_i's gradient and r_i the loss over its first value, divided by the terms' mean of that. The weights sum to
    the number of terms. They are trained as logarithms, so that none turns negative.

    Norms and rates are those of the whole update: its micro-batches' losses and gradients are added up, and the last one
    trains the weights. Over several ranks they are those of the rank's own part.
    """

    initial: Tensor

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.theta = nn.Parameter(torch.zeros(SLOTS))
        self.register_buffer("initial", torch.full((SLOTS,), torch.inf))
        self.prepare()

    def prepare(self) -> None:
        self._losses: dict[int, Tensor] = {}
        self._gradients: dict[int, Gradient] = {}
        self._share = 0.0

    def weights(self, slots: Tensor) -> Tensor:
        return len(slots) * self.theta.detach()[slots].softmax(0)

    def objective(self, part: Part) -> tuple[Tensor, Tensor] | None:
        self._add(part)
        if not part.last:
            return None
        slots = torch.tensor(sorted(self._losses), device=self.theta.device)
        whole = torch.stack([self._losses[slot] for slot in slots.tolist()]) / self._share
        norms = torch.stack([_norm(self._gradients[slot], whole) for slot in slots.tolist()]) / self._share
        first = self.initial[slots]
        self.initial[slots] = torch.where(first.isinf(), whole, first)
        ratio = whole / self.initial[slots].clamp(min=1e-12)
        rate = ratio / ratio.mean().clamp(min=1e-12)
        theta = self.theta[slots]
        # Normalising after each update, as the paper does: the normaliser has no gradient.
        norm = self.weights(slots) * (theta - theta.detach()).exp() * norms
        target = norm.detach().mean() * rate**self.alpha
        own = self._share * (norm - target).abs().sum()
        self.prepare()  # gradients as large as the model are not kept until the next update
        return own, own.detach() * 0

    def _add(self, part: Part) -> None:
        self._share += part.share
        for slot, loss, gradient in zip(part.slots.tolist(), part.losses, part.gradients(), strict=True):
            known = self._gradients.get(slot)
            self._losses[slot] = self._losses[slot] + loss if known else loss
            self._gradients[slot] = (
                gradient if not known else [a + b for a, b in zip(known, gradient, strict=True)]
            )


def _norm(gradient: Gradient, like: Tensor) -> Tensor:
    squares = [part.float().square().sum() for part in gradient]
    return torch.stack(squares).sum().sqrt() if squares else like.new_zeros(())


class DWA(Weighting):
    """Dynamic weight averaging (Liu, Johns & Davison 2019, arXiv:1803.10704): ``n softmax(r / T)``.

    r_i is the term's mean over the last ``window`` updates divided by that over the ones before (the paper's
    window is an epoch). Terms that fall at the same rate have weight 1. Nothing is trained.
    """

    sums: Tensor
    counts: Tensor
    means: Tensor
    ratio: Tensor

    def __init__(self, window: int, temperature: float) -> None:
        super().__init__()
        self.window, self.temperature = window, temperature
        self.register_buffer("sums", torch.zeros(SLOTS))
        self.register_buffer("counts", torch.zeros(SLOTS))
        self.register_buffer("means", torch.full((SLOTS,), torch.inf))
        self.register_buffer("ratio", torch.ones(SLOTS))

    def weights(self, slots: Tensor) -> Tensor:
        return len(slots) * (self.ratio[slots] / self.temperature).softmax(0)

    def observe(self, metrics: Mapping[str, Tensor]) -> None:
        for slot, name in enumerate(self.names):
            if name in metrics:
                self.sums[slot] += metrics[name]
                self.counts[slot] += 1
        full = self.counts >= self.window
        mean = self.sums / self.counts.clamp(min=1)
        ratio = mean / self.means.clamp(min=1e-12)
        self.ratio.copy_(torch.where(full & ~self.means.isinf(), ratio, self.ratio))
        self.means.copy_(torch.where(full, mean, self.means))
        self.sums.masked_fill_(full, 0)
        self.counts.masked_fill_(full, 0)
