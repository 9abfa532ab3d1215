"""What embeddings are scored by: ranks of similarities, nearest neighbours, retrieval. All in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDING = 1e-12
"""Cosines of equal vectors differ by less."""


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """``(N, M)`` of vectors ``(N, D)`` and ``(M, D)``."""
    return F.normalize(first.double(), dim=-1) @ F.normalize(second.double(), dim=-1).T


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 of a vector, equal values sharing the mean of theirs."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    mean: Tensor = (counts.cumsum(0) - (counts - 1) / 2)[place].double()
    return mean


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two vectors; 0 where one is constant."""
    both = torch.stack([ranks(first), ranks(second)])
    both = F.normalize(both - both.mean(1, keepdim=True), dim=1)
    return float(both[0] @ both[1])


def similarity_spearman(own: Tensor, given: Tensor) -> float:
    """Spearman between the cosines of all pairs of texts by one model ``(N, D)`` and by another ``(N, E)``."""
    above = torch.triu_indices(len(own), len(own), 1).unbind()
    return spearman(cosines(own, own)[above], cosines(given, given)[above])


def neighbour_accuracy(vectors: Tensor, classes: Tensor, neighbours: int = 5, fewest: int = 10) -> float:
    """Part of the samples whose nearest others, weighed by cosine, name their class: a probe without training.

    vectors ``(N, D)``, classes ``(N,)``. Samples of classes with fewer than ``fewest`` are left out. 0 where there are
    not two such classes.
    """
    names, place, counts = torch.unique(classes, return_inverse=True, return_counts=True)
    kept = (counts >= fewest)[place]
    if int((counts >= fewest).sum()) < 2:
        return 0.0
    vectors, place = vectors[kept], place[kept]
    near = cosines(vectors, vectors).fill_diagonal_(-torch.inf).topk(min(neighbours, len(place) - 1))
    votes = near.values.new_zeros(len(place), len(names)).scatter_add_(
        1, place[near.indices], 1 + near.values
    )
    return float((votes.argmax(1) == place).double().mean())


def retrieval(queries: Tensor, candidates: Tensor) -> dict[str, float]:
    """``mrr``, ``recall@1`` and ``recall@10``: query i ``(N, D)`` looks for candidate i ``(N, D)`` among all N.

    A candidate that is as near as the right one stands before it, so that vectors that are all alike find nothing.
    """
    scores = cosines(queries, candidates)
    rank = (scores >= scores.diagonal()[:, None] - ROUNDING).sum(1).double()
    found = {f"recall@{k}": float((rank <= k).double().mean()) for k in (1, 10)}
    return {"mrr": float((1 / rank).mean()), **found}
