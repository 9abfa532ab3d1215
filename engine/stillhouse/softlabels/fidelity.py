"""How far what is kept is from the teacher's exact answer, in nats a row."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.kernels import Sampled, TeacherHead, TopK
from stillhouse.softlabels.forms import Labels, multiplied


def divergences(exact: Tensor, kept: Labels) -> dict[str, Tensor]:
    """By name, a value a row ``(rows,)`` float64.

    exact
        The teacher's logits ``(rows, outputs)``.
    kept
        What a lookup gave for these rows.

    ``kl``: KL(exact || kept) over all classes; of a top k the rest is spread evenly over the other classes. ``kept_kl``, of
    a top k: over its k entries and the rest as one more outcome, which is what its loss reads. ``sampled_kl``: KL(kept ||
    exact) of sampled labels, whose other direction is infinite; it falls as 1 / draws and is no bias. ``coverage``: the
    exact mass of the kept classes. ``entropy``: of the exact answer.
    """
    logs = torch.log_softmax(exact.double(), -1)
    found = {"entropy": _mean(logs, -logs)}
    if isinstance(kept, TopK):
        assert kept.log_rest is not None
        at = kept.log_probs.double()
        inside = logs.gather(-1, kept.indices)
        rest = _log_rest(logs, kept.indices)
        others = exact.shape[-1] - kept.indices.shape[-1]
        both = torch.cat([inside, rest[:, None]], -1)
        mine = torch.cat([at, kept.log_rest.double()[:, None]], -1)
        found["kept_kl"] = _mean(both, both - mine)
        filled = (kept.log_rest.double() - torch.log(torch.tensor(max(others, 1.0))))[:, None].expand_as(logs)
        full = filled.scatter(-1, kept.indices, at)
        found["kl"] = _mean(logs, logs - full)
        found["coverage"] = inside.exp().sum(-1)
        return found
    if isinstance(kept, Sampled):
        weights = kept.weights.double()
        log_ratio = weights.clamp(min=1e-300).log() - logs.gather(-1, kept.indices)
        found["sampled_kl"] = (weights * log_ratio).where(weights > 0, 0.0).sum(-1)
        drawn = torch.zeros_like(logs, dtype=torch.bool).scatter(-1, kept.indices, True)
        found["coverage"] = logs.exp().where(drawn, 0.0).sum(-1)
        return found
    logits = kept if isinstance(kept, Tensor) else multiplied(kept)
    found["kl"] = _mean(logs, logs - torch.log_softmax(logits.double(), -1))
    return found


def _mean(logs: Tensor, values: Tensor) -> Tensor:
    """The mean of ``values`` under ``exp(logs)``; where the probability is 0 a value counts nothing."""
    probs = logs.exp()
    return (probs * values).where(probs > 0, 0.0).sum(-1)


def _log_rest(logs: Tensor, indices: Tensor) -> Tensor:
    return logs.scatter(-1, indices, float("-inf")).logsumexp(-1)


class Fidelity:
    """Means over rows that come in parts."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self.rows = 0

    def add(self, exact: Tensor, kept: Labels) -> None:
        """Compare some rows, a few at a time: a vocabulary in float64 is large."""
        for some in torch.split(torch.arange(len(exact)), 64):
            for name, values in divergences(exact[some], part(kept, some)).items():
                self._sums[name] = self._sums.get(name, 0.0) + float(values.sum())
        self.rows += len(exact)

    def means(self) -> dict[str, float]:
        """The mean of each, and ``rows``."""
        return {**{name: total / max(self.rows, 1) for name, total in self._sums.items()}, "rows": self.rows}


def part(labels: Labels, rows: Tensor) -> Labels:
    """Some of the rows."""
    from dataclasses import replace

    if isinstance(labels, Tensor):
        return labels[rows]
    if isinstance(labels, TeacherHead):
        return replace(labels, hidden=labels.hidden[rows])
    if isinstance(labels, Sampled):
        return replace(labels, indices=labels.indices[rows], weights=labels.weights[rows])
    assert labels.log_rest is not None
    return replace(
        labels,
        indices=labels.indices[rows],
        log_probs=labels.log_probs[rows],
        log_rest=labels.log_rest[rows],
    )
