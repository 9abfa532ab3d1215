"""Means over the rows of a whole evaluation, of terms that come batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from stillhouse.adapters.host import ranks
from stillhouse.training.output import StepOutput
from stillhouse.training.random_state import RandomState
from stillhouse.training.step import DistillStep

_Sums = dict[str, tuple[float, float]]


class Means:
    """Loss and terms as if the evaluated rows were one batch, however they are split over batches and ranks.

    Each batch's mean is multiplied by what it was divided by: its rows that count, or those of them with a label.

    on_labels
        Of the terms that were looked at, whether they are divided by the rows with a label.
    """

    def __init__(self, on_labels: dict[str, bool] | None = None) -> None:
        self.on_labels = dict(on_labels or {})
        self._terms: _Sums = {}  # over batches, each by its rows and by its labelled rows
        self._parts: _Sums = {}
        self._rows, self._labelled = 0.0, 0.0

    def add(
        self, step: DistillStep, model: nn.Module, output: StepOutput, batch: Any, another: bool = False
    ) -> None:
        """A batch that was evaluated.

        model
            The student, without a wrapper: ranks call it as often as each of them has to.
        batch, another
            What was evaluated; or what is to be counted in place of it (nothing, where it is empty).
        """
        if another:
            if not batch:
                return
            output = step.evaluate(model, batch)
        rows, labelled = output.counts or (0.0, 0.0)
        if not rows:
            return
        self._look(step, model, output, batch, labelled)
        self._rows, self._labelled = self._rows + rows, self._labelled + labelled
        for sums, values in ((self._terms, output.metrics), (self._parts, output.parts)):
            for name, value in values.items():
                by_rows, by_labels = sums.get(name, (0.0, 0.0))
                sums[name] = by_rows + float(value) * rows, by_labels + float(value) * labelled

    def _look(
        self, step: DistillStep, model: nn.Module, output: StepOutput, batch: Any, labelled: float
    ) -> None:
        """Find out of terms seen first what they are divided by: those on labels halve when twice the labels are said."""
        fresh = [name for name, value in output.metrics.items() if name not in self.on_labels and value != 0]
        if not labelled or not set(fresh) - {"loss"}:
            return
        outside = RandomState.capture()
        found = []
        for count in (labelled, 2 * labelled):
            found.append(step.evaluate(model, batch, labelled=count).metrics)
            outside.restore()
        for name in fresh:
            once, twice = (float(metrics.get(name, torch.zeros(()))) for metrics in found)
            self.on_labels[name] = abs(twice - once / 2) < abs(twice - once)

    def take(self) -> dict[str, float]:
        """The means by name, over all ranks; empty where no row counted."""
        own = (self._terms, self._parts, self._rows, self._labelled, self.on_labels)
        every: list[Any] = [own]
        if ranks() > 1:
            every = [None] * ranks()
            dist.all_gather_object(every, own)
        rows, labelled = sum(found[2] for found in every), sum(found[3] for found in every)
        if not rows:
            return {}
        on_labels = {name for found in every for name, is_so in found[4].items() if is_so}

        def means(each: Iterable[_Sums]) -> dict[str, float]:
            sums = list(each)
            return {
                name: sum(found.get(name, (0.0, 0.0))[1] for found in sums) / max(labelled, 1.0)
                if name in on_labels
                else sum(found.get(name, (0.0, 0.0))[0] for found in sums) / rows
                for name in sorted({name for found in sums for name in found})
            }

        return {
            **means(found[0] for found in every),
            "loss": sum(means(found[1] for found in every).values()),
        }
