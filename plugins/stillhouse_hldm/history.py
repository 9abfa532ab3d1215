"""The weights over a run: ``weights.json`` and ``weights.png`` in its directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class History:
    """Rows of ``step``, ``stage`` and ``weights`` by term."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, step: int, stage: str, weights: Mapping[str, float]) -> None:
        """Keep the weights of one update."""
        self.rows.append({"step": step, "stage": stage, "weights": dict(weights)})

    def write(self, folder: Path, weighting: str) -> None:
        """Write the rows, and plot them; the axis of the weights is logarithmic."""
        (folder / "weights.json").write_text(json.dumps(self.rows) + "\n", encoding="utf-8")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
        axes = figure.subplots()
        names = dict.fromkeys(name for row in self.rows for name in row["weights"])
        for name in names:
            rows = [row for row in self.rows if name in row["weights"]]
            axes.plot([row["step"] for row in rows], [row["weights"][name] for row in rows], label=name)
        if names and all(value > 0 for row in self.rows for value in row["weights"].values()):
            axes.set_yscale("log")
        axes.set(
            xlabel="student updates", ylabel="weight of the term", title=f"weights learned by {weighting}"
        )
        if names:
            axes.legend()
        figure.savefig(folder / "weights.png")
