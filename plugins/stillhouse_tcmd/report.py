"""Scores of each task apart, with the task known and with it routed, as ``tasks.json`` of the run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.api import IGNORE, RunContext
from stillhouse_tcmd.networks import CombinedNetwork, columns, marginals

CHUNK = 1024


def scores(
    logits: Tensor, labels: Tensor, tasks: Sequence[Sequence[int]], *, exclusive: bool
) -> list[dict[str, Any]]:
    """For each task: its rows, ``given`` (accuracy among the task's classes) and, where the tasks part one
    softmax, ``routed`` (accuracy among all classes) and ``router`` (the part of rows sent to the right task).

    logits ``(N, C)`` made without a task, labels ``(N,)``.
    """
    found = []
    for number, own in enumerate(tasks):
        rows = torch.isin(labels, torch.tensor(own))
        mine, wanted = logits[rows], labels[rows]
        entry: dict[str, Any] = {"task": number, "classes": list(own), "rows": int(rows.sum())}
        if len(mine):
            named = torch.tensor(own)[columns(mine, own).argmax(-1)]
            entry["given"] = float((named == wanted).float().mean())
            if exclusive:
                entry["routed"] = float((mine.argmax(-1) == wanted).float().mean())
                entry["router"] = float((marginals(mine, tasks).argmax(-1) == number).float().mean())
        found.append(entry)
    return found


def write(
    run: RunContext, network: CombinedNetwork, tasks: Sequence[Sequence[int]], *, exclusive: bool
) -> None:
    """Score the network on the validation split, say it, and write it down."""
    split = None if run.splits is None else run.splits.validation
    if split is None or not split.labelled:
        return
    device = next(network.parameters()).device
    logits, labels = [], []
    for start in range(0, len(split), CHUNK):
        batch = split.batch(torch.arange(start, min(start + CHUNK, len(split)))).to(device)
        logits.append(run.outputs(f"{run.caller}.network", batch).logits.cpu())
        labels.append(batch.labels.cpu())  # type: ignore[union-attr]
    joined, wanted = torch.cat(logits), torch.cat(labels)
    known = wanted != IGNORE
    found = scores(joined[known], wanted[known], tasks, exclusive=exclusive)
    for entry in found:
        run.say(f"{run.caller} task {entry['task']}: {json.dumps(entry)}")
    if run.dir is not None:
        layout = "shared" if len(network.parts) == 1 and len(tasks) > 1 else "side_by_side"
        content = {"outputs": network.outputs, "exclusive": exclusive, "network": layout, "validation": found}
        (run.dir / "tasks.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
