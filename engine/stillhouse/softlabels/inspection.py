"""Looking at a store: what it holds, whether it is whole, and what some samples say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import StillhouseError
from stillhouse.kernels import Sampled, TeacherHead, TopK
from stillhouse.softlabels.forms import Labels, multiplied
from stillhouse.softlabels.places import Place, place, sha256, unsealed
from stillhouse.softlabels.schema import check_store
from stillhouse.softlabels.shard import PREFIX, Shard, read_manifest, samples
from stillhouse.softlabels.store import HEAD, STORE, StoredLabels

_LOOKED_AT = 4096
"""Samples, spread over the store, that entropy and coverage are computed of."""
_TOP = 5


def facts(labels: StoredLabels) -> dict[str, Any]:
    """Counts and bytes; of at most 4,096 samples the entropy in nats (of a top k: with the rest as one more outcome, a
    lower bound; of draws: of the draws) and, of a top k, the coverage: the mass of its entries.
    """
    total = sum(int(manifest["bytes"]) for manifest in labels.manifests)
    rows = sum(int(manifest["rows"]) for manifest in labels.manifests)
    found: dict[str, Any] = {
        "samples": len(labels),
        "rows": rows,
        "shards": len(labels.manifests),
        "bytes": total,
        "bytes_per_row": total / max(rows, 1),
    }
    ids = labels.ids
    ids = _spread(ids, _LOOKED_AT)
    kept: dict[str, list[Tensor]] = {"entropy": [], "coverage": []}
    for some in torch.split(ids, 64):
        for name, values in _measures(labels.rows(some)).items():
            kept[name].append(values)
    for name, parts in kept.items():
        values = torch.cat(parts) if parts else torch.empty(0)
        if len(values):
            counts, edges = torch.histogram(values.float(), 20)
            found[name] = {
                "mean": float(values.mean()),
                "min": float(values.min()),
                "max": float(values.max()),
                "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            }
    return found


def _spread(ids: Tensor, count: int) -> Tensor:
    """At most ``count`` of the ids, evenly spread."""
    many = max(0, min(count, len(ids)))
    return ids[torch.linspace(0, len(ids) - 1, many).long()] if many else ids[:0]


def _measures(labels: Labels) -> dict[str, Tensor]:
    if isinstance(labels, TopK):
        assert labels.log_rest is not None
        logs = torch.cat([labels.log_probs, labels.log_rest[..., None]], -1)
        return {"entropy": _entropy(logs), "coverage": labels.log_probs.exp().sum(-1)}
    if isinstance(labels, Sampled):
        return {"entropy": _entropy(labels.weights.log())}
    logits = labels if isinstance(labels, Tensor) else multiplied(labels)
    return {"entropy": _entropy(torch.log_softmax(logits.float(), -1))}


def _entropy(logs: Tensor) -> Tensor:
    return -(logs.exp() * logs).where(logs > float("-inf"), 0.0).sum(-1)


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw the histograms of entropy and coverage."""
    from matplotlib.figure import Figure

    named = [name for name in ("entropy", "coverage") if name in found]
    figure = Figure(figsize=(4.5 * len(named), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(named), squeeze=False)[0], named, strict=True):
        histogram = found[name]["histogram"]
        axes.stairs(histogram["counts"], histogram["edges"], fill=True)
        axes.set_xlabel("entropy, nats" if name == "entropy" else "mass of the kept classes")
        axes.set_ylabel("rows")
    figure.savefig(path, dpi=120)


def shown(labels: StoredLabels, count: int, names: dict[int, str]) -> Iterator[str]:
    """Some samples with the most likely classes of each row, a line a row."""
    ids = labels.ids
    chosen = torch.unique(_spread(ids, count))
    for sample in chosen:
        rows = labels.rows(sample[None])
        for number, line in enumerate(_tops(rows)):
            said = ", ".join(f"{names.get(index, str(index))} {value:.3f}" for index, value in line)
            yield f"sample {int(sample)}, row {number}: {said}"


def _tops(labels: Labels) -> list[list[tuple[int, float]]]:
    if isinstance(labels, TopK):
        indices, probs = labels.indices, labels.log_probs.exp()
    elif isinstance(labels, Sampled):
        indices, probs = labels.indices, labels.weights
    else:
        logits = multiplied(labels) if isinstance(labels, TeacherHead) else labels
        probs = logits.float().softmax(-1)
        indices = torch.arange(probs.shape[-1]).expand_as(probs)
    top, at = probs.topk(min(_TOP, probs.shape[-1]), -1)
    chosen = indices.gather(-1, at)
    return [
        [(int(index), float(value)) for index, value in zip(row, values, strict=True) if value > 0]
        for row, values in zip(chosen, top, strict=True)
    ]


def verify(where: str | Path) -> Iterator[tuple[str, str]]:
    """Every file of a store with what is wrong with it, or an empty string; then the whole: samples missing or twice."""
    there = place(where)
    problem, about = "", {}
    try:
        about = unsealed(there.read(STORE), f"{there}/{STORE}")
        check_store(about, f"{there}/{STORE}")
    except StillhouseError as error:
        problem = str(error)
    yield STORE, problem
    whole = not problem
    if whole and about["head"] is not None:
        problem = _head_problem(there, about["head"])
        whole = not problem
        yield HEAD, problem
    manifests = {name for name in there.names() if name.startswith(PREFIX) and name.endswith(".json")}
    for name in sorted(manifests):
        shown_name, problem = name.removesuffix(".json"), ""
        try:
            manifest = read_manifest(there, name)
            shown_name = f"{shown_name} ({samples(manifest)})"
            Shard(there, manifest, anew=True).check_values()
        except StillhouseError as error:
            problem = str(error)
        whole &= not problem
        yield shown_name, problem
    if whole:
        try:
            labels = StoredLabels(there)
            labels.head()
            labels.check_whole()
        except StillhouseError as error:
            yield "the whole", str(error)


def _head_problem(there: Place, digest: str) -> str:
    try:
        found = sha256(there.read(HEAD))
    except StillhouseError as error:
        return str(error)
    if found == digest:
        return ""
    return f"{there}/{HEAD} was changed or damaged since it was written; label again, which writes it anew"
