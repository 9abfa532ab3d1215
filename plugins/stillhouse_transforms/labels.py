"""Changes of targets: label smoothing, and correction of a teacher's labels by its known mistakes."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stillhouse.api import (
    CLASS_KINDS,
    IGNORE,
    Batch,
    ConfigError,
    Method,
    MethodConfig,
    RunContext,
    Targets,
    hookimpl,
)
from stillhouse_transforms.classes import probabilities

ROWS = 1024
"""Rows of a split that the teacher reads at a time."""


class LabelSmoothingConfig(MethodConfig):
    """Settings of label smoothing."""

    amount: float = Field(
        0.1, ge=0, lt=1, description="Part of each label that is shared out over all classes."
    )


class LabelSmoothing(Method):
    """Labels become ``(1 - amount) one-hot + amount / classes`` (Szegedy et al. 2016, arXiv:1512.00567, section 7).

    The teacher's outputs are left as they are; a row without a label stays one. Class probabilities that an earlier
    plugin made are smoothed in the same way.
    """

    api_version = 1
    Config = LabelSmoothingConfig
    config: LabelSmoothingConfig
    requires = frozenset()
    supports = CLASS_KINDS | {"different_outputs"}

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        self._classes = run.outputs(run.target_name).logits.shape[-1]

    @hookimpl
    def label_transform(self, targets: Targets) -> Targets | None:
        hot = probabilities(targets.labels, targets.probabilities, self._classes)
        if hot is None:
            return None
        amount = self.config.amount
        smooth = (1 - amount) * hot + amount / self._classes * hot.sum(-1, keepdim=True)
        return replace(targets, labels=None, probabilities=smooth)


class LabelCorrectionConfig(MethodConfig):
    """Settings of label correction."""

    estimated_on: Literal["validation", "labelled"] = Field(
        "validation",
        description="Where the teacher's mistakes are counted; it makes few on the rows it was trained on.",
    )
    rows: Literal["unlabelled", "all"] = Field("unlabelled", description="Which rows are corrected.")
    prior: float = Field(1.0, gt=0, description="Rows of right answers that each class is credited with.")


class LabelCorrection(Method):
    """The teacher's class probabilities ``p`` become ``p C`` with ``C[i, j] = P(label j | teacher says i)``.

    ``C`` is counted, with the teacher's probabilities as fractions of a row, on rows whose labels are trusted; this
    is the estimate of gold loss correction (Hendrycks et al. 2018, arXiv:1802.05300, equation 1, there of labels
    that annotators gave) turned around: it corrects the labels and not the loss. Temperature comes after it.
    """

    api_version = 1
    Config = LabelCorrectionConfig
    config: LabelCorrectionConfig
    requires = frozenset({"logits"})
    supports = CLASS_KINDS | {"different_outputs"}

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        splits = run.splits
        split = None if splits is None else splits.validation if self._on_validation else splits.train
        if split is None or not split.labelled:
            raise ConfigError(
                f"label_correction: got no labelled rows in the {self.config.estimated_on} split; expected some, to "
                "count the teacher's mistakes on: set estimated_on, or leave it out"
            )
        run.chose("estimated_on", self.config.estimated_on, "its labels are read before training")
        counts = torch.zeros(())
        for start in range(0, len(split), ROWS):
            batch = split.batch(torch.arange(start, min(start + ROWS, len(split))))
            counts = counts + self._counted(run, batch)
        self._matrix = counts / counts.sum(-1, keepdim=True)

    @property
    def _on_validation(self) -> bool:
        return self.config.estimated_on == "validation"

    def _counted(self, run: RunContext, batch: Batch) -> Tensor:
        """Counts ``(classes, classes)``: the teacher's answer by the label."""
        device = next((p.device for p in run.student.parameters()), torch.device("cpu"))
        batch = batch.to(device)
        logits = run.outputs("teacher", batch).logits.float()
        labels = batch.labels
        if labels is None or labels.is_floating_point():
            raise ConfigError("label_correction: got float labels; expected class labels: leave it out")
        answers, labels = logits.softmax(-1).reshape(-1, logits.shape[-1]), labels.reshape(-1)
        known = labels != IGNORE
        hot = F.one_hot(labels[known], logits.shape[-1]).float()
        share = self.config.prior * len(batch) / max(1, self._rows(run))
        return answers[known].T @ hot + share * torch.eye(logits.shape[-1], device=device)

    def _rows(self, run: RunContext) -> int:
        assert run.splits is not None
        split = run.splits.validation if self._on_validation else run.splits.train
        return 0 if split is None else len(split)

    @hookimpl
    def label_transform(self, targets: Targets, batch: Batch) -> Targets | None:
        if targets.soft is None:
            return None
        logits = targets.dense.float()
        corrected = (logits.softmax(-1) @ self._matrix.to(logits.device)).log()
        if self.config.rows == "unlabelled" and batch.probabilities is not None:
            corrected = logits.where((batch.probabilities.sum(-1) > 0)[..., None], corrected)
        elif self.config.rows == "unlabelled" and batch.labels is not None:
            corrected = logits.where((batch.labels != IGNORE)[..., None], corrected)
        return replace(targets, soft=corrected)
