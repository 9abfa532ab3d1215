"""Embeddings without a teacher: the control beside a student that learns a teacher's vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import (
    Batch,
    Conformance,
    LossTerm,
    Method,
    MethodConfig,
    RunContext,
    Stage,
    StepInfo,
    StudentOut,
    hookimpl,
    kept,
    wide,
)
from stillhouse_baselines.embedding import WITHIN, info_nce


class ContrastiveConfig(MethodConfig):
    """Settings of contrastive training."""

    temperature: float = Field(0.05, gt=0, description="Of the softmax over cosines.")


class Contrastive(Method):
    """InfoNCE between the student's vectors of two views of each sample; no teacher is called.

    The second view is what the batch holds for a teacher (``teacher_inputs``: another modality, a translation), read by
    the student itself as CLIP's two sides are; where there is none it is the same input under other dropout (SimCSE, Gao
    et al. 2021, arXiv:2104.08821). Negatives are those of the micro-batch.
    """

    api_version = 1
    Config = ContrastiveConfig
    requires = frozenset()
    supports = frozenset({"embedding", "classification"})
    config: ContrastiveConfig
    conformance = Conformance(
        expected_failures=dict.fromkeys(
            ("micro_batches_do_not_matter", "ragged_micro_batches_do_not_matter"), WITHIN
        )
    )

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        self._model = run.models[run.target_name]

    @hookimpl
    def stages(self, run: RunContext) -> list[Stage]:
        return [Stage("train", model=run.target_name, teacher=None)]

    @hookimpl
    def loss_terms(self, student_out: StudentOut, batch: Batch, info: StepInfo) -> dict[str, LossTerm]:
        other = vectors(self._model, batch.for_teacher)
        both = [wide(kept(side, batch.mask)) for side in (student_out.logits, other)]
        if batch.mask is not None:
            both = [side[batch.mask] for side in both]
        return {"contrastive": LossTerm(info_nce(both[0], both[1], self.config.temperature) * info.share)}


def vectors(model: nn.Module, inputs: Any) -> Tensor:
    """A vector a sample ``(B, D)``: the model's tensor, or the mean of its last hidden states over the real tokens."""
    out = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(out, Tensor):
        return out
    states: Tensor = out.last_hidden_state
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    weights = torch.ones_like(states[..., 0]) if mask is None else mask.to(states.dtype)
    return (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
