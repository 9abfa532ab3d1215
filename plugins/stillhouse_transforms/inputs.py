"""Changes of inputs; the teacher is asked anew about what comes out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.api import (
    CLASS_KINDS,
    IGNORE,
    SUPPORTS,
    Batch,
    ConfigError,
    Conformance,
    Method,
    MethodConfig,
    RunContext,
    StepInfo,
    hookimpl,
)
from stillhouse_transforms.classes import probabilities

_NO_TOKENS = Conformance(
    expected_failures=dict.fromkeys(
        ("padding_counts_nowhere", "ragged_micro_batches_do_not_matter"), "token ids are no real numbers"
    )
)


class MixupConfig(MethodConfig):
    """Settings of mixup."""

    alpha: float = Field(0.2, gt=0, description="Of the Beta(alpha, alpha) that the shares are drawn from.")


class Mixup(Method):
    """Each row becomes ``share x + (1 - share) x'`` with another row of its micro-batch, labels alike.

    Zhang et al. 2018, arXiv:1710.09412; one share for each row. A row whose mask is False anywhere is neither
    mixed nor mixed in. For distillation the teacher's answer to the mixed input takes the place of mixed answers
    (Beyer et al. 2022, arXiv:2106.05237, "function matching").
    """

    api_version = 1
    Config = MixupConfig
    config: MixupConfig
    conformance = _NO_TOKENS
    requires = frozenset()
    supports = CLASS_KINDS | {"different_outputs"}

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        self._classes = run.outputs(run.target_name).logits.shape[-1]

    @hookimpl
    def batch_transform(self, batch: Batch, info: StepInfo) -> Batch | None:
        rows = torch.arange(len(batch))
        if batch.mask is not None:
            rows = rows[batch.mask.reshape(len(batch), -1).all(-1).cpu()]
        partner = torch.arange(len(batch))
        # A row with a label is mixed with one that has a label: half a label would count as a whole one.
        for group in _alike(rows, batch):
            partner[group] = group[torch.randperm(len(group))]
        beta = torch.distributions.Beta(self.config.alpha, self.config.alpha)
        share = torch.ones(len(batch))
        share[rows] = beta.sample((len(rows),))

        def mixed(value: Any) -> Any:
            return _each(value, lambda x: _mix(x, partner.to(x.device), share.to(x.device)), "mixup")

        hot = probabilities(batch.labels, batch.probabilities, self._classes)
        return replace(
            batch,
            inputs=mixed(batch.inputs),
            teacher_inputs=mixed(batch.teacher_inputs),
            labels=None,
            probabilities=None if hot is None else mixed(hot),
        )


def _alike(rows: Tensor, batch: Batch) -> list[Tensor]:
    """The rows that have a label, and those that have none."""
    if batch.labels is None:
        return [rows]
    known = (batch.labels != IGNORE).reshape(len(batch), -1).any(-1).cpu()[rows]
    return [group for group in (rows[known], rows[~known]) if len(group)]


def _mix(values: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    share = share.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))
    mixed: Tensor = share * values + (1 - share) * values[partner]
    return mixed


class AugmentConfig(MethodConfig):
    """Settings of augmentation."""

    noise: float = Field(0.05, ge=0, description="Standard deviation of what is added to every number.")
    shift: int = Field(
        0, ge=0, description="Greatest shift along the last axis, in positions, around its end."
    )
    scale: float = Field(0.0, ge=0, lt=1, description="A row is multiplied by up to 1 plus or minus this.")


class Augment(Method):
    """Rows are shifted, scaled and noised; student and teacher see the same change, each of its own inputs."""

    api_version = 1
    Config = AugmentConfig
    config: AugmentConfig
    conformance = _NO_TOKENS
    requires = frozenset()
    supports = SUPPORTS

    @hookimpl
    def batch_transform(self, batch: Batch) -> Batch | None:
        config = self.config
        shifts = torch.randint(-config.shift, config.shift + 1, (len(batch),))
        factors = 1 + config.scale * (2 * torch.rand(len(batch)) - 1)

        def changed(values: Tensor) -> Tensor:
            rows = [len(values), *[1] * (values.dim() - 1)]
            places = torch.arange(values.shape[-1], device=values.device)
            index = (places + shifts.to(values.device).reshape(rows)) % values.shape[-1]
            moved = values.gather(-1, index.expand_as(values)) if config.shift else values
            return moved * factors.to(values).reshape(rows) + config.noise * torch.randn_like(values)

        inputs = _each(batch.inputs, changed, "augment")
        return replace(batch, inputs=inputs, teacher_inputs=_each(batch.teacher_inputs, changed, "augment"))


def _each(value: Any, change: Any, who: str) -> Any:
    """``change`` of every tensor in mappings and tuples; None stays."""
    if isinstance(value, dict):
        return {name: _each(item, change, who) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_each(item, change, who) for item in value)
    if value is None:
        return None
    if not value.is_floating_point():
        raise ConfigError(
            f"{who}: got inputs of type {value.dtype}; expected real numbers: leave it out for token ids"
        )
    return change(value)
