"""What a teacher gives for one batch of rows, other than its whole logits: the top k entries, or sampled labels."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from stillhouse.kernels.errors import fail, require
from stillhouse.kernels.normalise import log_softmax
from stillhouse.kernels.series import NO_LABEL

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
            They cost a pass over (..., k), and a host synchronisation on a GPU. An index that is there twice then
            gives a loss without meaning.
        log_rest: (...) floating, the natural log of the mass outside the k entries, for ``"ghost"``. Without it the
            mass is 1 less that of the k entries, which leaves nothing of a rest of 1e-7 where those are float32.
    """

    indices: Tensor
    log_probs: Tensor
    rest: Rest = "ghost"
    temperature: float = 1.0
    trusted: bool = False
    log_rest: Tensor | None = None

    @classmethod
    def from_logits(cls, logits: Tensor, k: int, *, temperature: float = 1.0, rest: Rest = "ghost") -> TopK:
        """The top k of teacher ``logits`` (..., V) at ``temperature``; log-probabilities in float32 or float64.

        Raises:
            ValueError: k that is not from 1 to V, or a temperature that is not above 0.
        """
        k = _check_draw("TopK", logits, k, temperature)
        every = log_softmax(logits, temperature)
        log_probs, indices = every.topk(k, dim=-1)
        log_rest = None
        if rest == "ghost":
            log_rest = every.scatter_(-1, indices, float("-inf")).logsumexp(-1)
        return cls(indices, log_probs, rest, temperature, trusted=True, log_rest=log_rest)


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
        """``k`` draws with replacement for each row of teacher ``logits`` (..., V), each of weight 1/k.

        Raises:
            ValueError: k below 1, a temperature that is not above 0, or, on the CPU, logits that give no distribution.
        """
        k = _check_draw("Sampled", logits, k, temperature)
        probs = log_softmax(logits, temperature).exp().reshape(-1, logits.shape[-1])
        try:
            drawn = torch.multinomial(probs, k, replacement=True, generator=generator)
        except RuntimeError as error:
            bad = probs.isnan().any(-1)
            if not bool(bad.any()):
                raise
            raise fail(
                "Sampled.from_logits logits", f"NaN, +inf or only -inf in row {int(bad.nonzero()[0, 0])}",
                "a distribution to draw from", "leave that row out",
            ) from error  # fmt: skip
        indices = drawn.reshape(*logits.shape[:-1], k)
        weights = torch.full(indices.shape, 1.0 / k, dtype=probs.dtype, device=logits.device)
        return cls(indices, weights, temperature=temperature, trusted=True)


@dataclass(frozen=True, eq=False)
class Labels:
    """What the label term is taken against, rows in one dimension: either class indices or probabilities.

    Attributes:
        indices: (N,) int64, ``NO_LABEL`` where a row has none; or None.
        probabilities: (N, V) floating; a row of zeros has no label; or None.
        smoothing: the share of every label that goes to all V entries alike.
    """

    indices: Tensor | None
    probabilities: Tensor | None
    smoothing: float

    def present(self) -> Tensor:
        """Which rows have a label, (N,)."""
        if self.indices is not None:
            return self.indices != NO_LABEL
        assert self.probabilities is not None
        return (self.probabilities != 0).any(-1)


def restricted(target: Target, divergence: str) -> bool:
    """Is the student too restricted to the target's k entries? Then its logits there are dense ones, k wide."""
    return isinstance(target, TopK) and target.rest == "renormalise" and divergence == "reverse"


def _check_draw(kind: str, logits: Tensor, k: object, temperature: object) -> int:
    name, shape = f"{kind}.from_logits", tuple(logits.shape)
    require(
        bool(shape) and shape[-1] > 0,
        f"{name} logits shape",
        shape,
        "(..., V) with V >= 1",
        "keep the vocabulary last",
    )
    try:
        count = 0 if isinstance(k, bool) else operator.index(k)  # type: ignore[arg-type]
    except TypeError:
        count = 0
    most = f"to V = {shape[-1]}" if kind == "TopK" else "on"
    fits = count >= 1 and (kind != "TopK" or count <= shape[-1])
    require(fits, f"{name} k", repr(k), f"a whole number from 1 {most}", "pass a k in that range")
    positive = isinstance(temperature, Real) and 0 < float(temperature) < math.inf
    require(positive, f"{name} temperature", repr(temperature), "a finite number above 0", "pass 1.0")
    return count


Target = Tensor | TopK | Sampled
