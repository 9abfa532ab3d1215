"""What a teacher gives for one batch of rows, other than its whole logits: the top k entries, or sampled labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rest = Literal["ghost", "renormalise"]


@dataclass(frozen=True, eq=False)
class TopK:
    """The teacher's k most likely entries of each row.

    Attributes:
        indices: (..., k) int64, distinct within a row; the leading shape is that of the student's logits.
        log_probs: (..., k) floating, natural log-probabilities of those entries, exp-sum at most 1 in a row.
        rest: what becomes of the mass outside the k entries. ``"ghost"``: one more outcome holds it, on the
            student's side too (the loss is then a lower bound of the dense one, and equals it at k = V).
            ``"renormalise"``: the k entries are scaled to sum to one and the others have probability zero.
        temperature: the temperature at which ``log_probs`` were taken (1 for plain log-probabilities). A ghost
            cannot be moved to another temperature, because that needs the entries it stands for.
        trusted: skip the checks that read the values (indices in range and distinct, log-probabilities valid).
            They cost a pass over (..., k), and a host synchronisation on a GPU.
        log_rest: floating, the leading shape of ``indices`` without its last axis: the natural logarithm of the mass
            outside the k entries, which a ghost has. None: it is taken from one minus the sum of theirs, of which
            nothing is left where they hold nearly all of it.
    """

    indices: Tensor
    log_probs: Tensor
    rest: Rest = "ghost"
    temperature: float = 1.0
    trusted: bool = False
    log_rest: Tensor | None = None

    @classmethod
    def from_logits(cls, logits: Tensor, k: int, *, temperature: float = 1.0, rest: Rest = "ghost") -> TopK:
        """The top k of teacher ``logits`` (..., V) at ``temperature``; log-probabilities in float32 or float64."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        log_probs, indices = torch.log_softmax(wide / temperature, dim=-1).topk(k, dim=-1)
        return cls(indices, log_probs, rest=rest, temperature=temperature, trusted=True)


@dataclass(frozen=True, eq=False)
class Sampled:
    """Labels drawn from the teacher: an unbiased stand-in for its whole distribution.

    The loss is the cross-entropy ``-sum_i weights_i * log p_student(indices_i)``. Its mean over draws is the
    forward KL plus the teacher's entropy (a constant), and the mean of its gradients is the gradient of that KL.

    Attributes:
        indices: (..., k) int64 drawn from softmax(teacher / temperature); repeats are welcome.
        weights: (..., k) floating, non-negative, summing to one in each row (1/k each for plain draws).
        temperature: the temperature of the distribution that was drawn from.
        trusted: skip the checks that read the values, as for :class:`TopK`.
    """

    indices: Tensor
    weights: Tensor
    temperature: float = 1.0
    trusted: bool = False

    @classmethod
    def from_logits(
        cls, logits: Tensor, k: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Sampled:
        """``k`` draws with replacement for each row of teacher ``logits`` (..., V), each of weight 1/k."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        probs = torch.softmax(wide / temperature, dim=-1).reshape(-1, logits.shape[-1])
        drawn = torch.multinomial(probs, k, replacement=True, generator=generator)
        indices = drawn.reshape(*logits.shape[:-1], k)
        weights = torch.full(indices.shape, 1.0 / k, dtype=probs.dtype, device=logits.device)
        return cls(indices, weights, temperature=temperature, trusted=True)


Target = Tensor | TopK | Sampled
