"""The information plane of a run: rate and distortion of every update, kept, written and drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLUMNS = ("rate_teacher", "distortion_teacher", "rate_student", "distortion_student")


class InformationPlane:
    """Rate and distortion in nats, a row an update. What an update did not measure is NaN."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def add(self, step: int, stage: int, measured: Mapping[str, Tensor]) -> None:
        """Keep one update's figures; they stay on their device until they are read."""
        some = next(iter(measured.values()), torch.zeros(()))
        values = [measured.get(name, some.new_full((), math.nan)).float() for name in COLUMNS]
        self._rows.append(torch.stack([some.new_tensor(step), some.new_tensor(stage), *values]))

    def table(self) -> Tensor:
        """``(updates, 6)`` on the CPU: step, stage number, then COLUMNS."""
        return torch.stack(self._rows).cpu() if self._rows else torch.empty(0, 2 + len(COLUMNS))

    def load(self, table: Tensor) -> None:
        """Take back what ``table`` gave."""
        self._rows = list(table)

    def write(self, folder: Path) -> None:
        """``information_plane.csv`` with every update, ``information_plane.png`` with the two paths."""
        table = self.table()
        lines = [",".join(["step", "stage", *COLUMNS])]
        for step, stage, *values in table.tolist():
            figures = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
            lines.append(",".join([f"{step:.0f}", f"{stage:.0f}", *figures]))
        (folder / "information_plane.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if len(table):
            draw(table, folder / "information_plane.png")


def draw(table: Tensor, path: Path) -> None:
    """Distortion over rate, smoothed; teacher and student side by side, coloured by update."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    points: Any = None
    for panel, role in zip(panels, ("teacher", "student"), strict=True):
        columns = [2 + COLUMNS.index(f"{what}_{role}") for what in ("rate", "distortion")]
        known = table[~table[:, columns].isnan().any(-1)]
        block = max(1, len(known) // 150)
        # A mean of a block of updates each: single updates are noisy.
        means = torch.stack([part.mean(0) for part in torch.split(known, block)]) if len(known) else known
        rates, distortions = means[:, columns[0]], means[:, columns[1]]
        panel.plot(rates, distortions, color="0.8", lw=0.8, zorder=0)
        points = panel.scatter(
            rates, distortions, c=means[:, 0], s=12, vmin=0, vmax=float(table[-1, 0]), cmap="viridis"
        )
        panel.set(xlabel="rate KL(e || N(0, I)) [nats]", title=f"{role}'s code")
        late = means[means[:, 1] > 0]
        if len(late):
            panel.scatter(late[:1, columns[0]], late[:1, columns[1]], marker="x", color="tab:red")
            panel.annotate(
                "stage target", (float(late[0, columns[0]]), float(late[0, columns[1]])), fontsize=8
            )
    panels[0].set_ylabel("distortion [nats]")
    figure.colorbar(points, ax=panels, label="update")
    figure.savefig(path)
