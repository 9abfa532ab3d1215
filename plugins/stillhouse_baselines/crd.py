"""Contrastive representation distillation: Tian et al. 2020, ICLR, arXiv:1910.10699."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import (
    SUPPORTS,
    Auxiliary,
    Batch,
    ConfigError,
    Conformance,
    FeaturePair,
    Layers,
    LossTerm,
    Method,
    MethodConfig,
    RunContext,
    Stage,
    StepInfo,
    StudentOut,
    TeacherOut,
    feature_mean,
    feature_pairs,
    hookimpl,
    wide,
)

EPSILON = 1e-7


class CRDConfig(MethodConfig):
    """Settings of CRD."""

    layers: Layers = Field(
        "penultimate", description="The layer of each model; by name, or penultimate, middle."
    )
    dim: int = Field(128, gt=0, description="Width of the space in which embeddings are compared.")
    negatives: int = Field(1024, gt=0, description="Other samples drawn for each; the paper: 16384.")
    temperature: float = Field(0.07, gt=0, description="Of the scores' exponential.")
    momentum: float = Field(0.5, ge=0, lt=1, description="Part of the old embedding that the memory keeps.")
    memory: int | None = Field(
        None,
        gt=0,
        description="Rows of the memory, where the trainer hands over batches; default: the data's.",
    )
    weight: float = Field(0.8, gt=0, description="Weight of the term.")


class Memory(nn.Module):
    """The last embedding of each sample, for either model ``(N, dim)``, and the log of each side's normaliser."""

    student: Tensor
    teacher: Tensor
    log_z: Tensor

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        for name in ("student", "teacher"):
            spread = 1 / math.sqrt(dim / 3)
            self.register_buffer(name, torch.empty(rows, dim).uniform_(-spread, spread))
        self.register_buffer("log_z", torch.zeros(2))

    @torch.no_grad()
    def update(self, index: Tensor, student: Tensor, teacher: Tensor, momentum: float) -> None:
        """Move the rows ``index`` towards new embeddings, and back onto the sphere."""
        for memory, new in ((self.student, student), (self.teacher, teacher)):
            mixed = momentum * memory[index] + (1 - momentum) * new.to(memory)
            memory[index] = F.normalize(mixed)


class CRD(Method):
    """Noise-contrastive estimation: which teacher's embedding belongs to the student's, and the other way round.

    ``-log h(positive) - sum over negatives log(1 - h)`` with ``h = p / (p + K / N)``, ``p = exp(z . m / tau) / Z``: z an
    embedding (a trained linear map of the penultimate layer, of length 1), m from the other model's memory. Formulas,
    momentum and 1e-7 are those of the authors' code and of torchdistill. Z is found on a few rows before the first
    update, there on the first batch; the memory moves at the end of an update, so that micro-batches see the same. A
    sample with tokens is the mean of those that count. Name it beside ``kd``: alone it trains no output layer.
    """

    api_version = 1
    Config = CRDConfig
    requires = frozenset({"hidden_states"})
    supports = SUPPORTS
    config: CRDConfig
    conformance = Conformance(settings={"memory": 64, "negatives": 16, "dim": 8})

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        assert run.probe is not None
        (self.pair,) = self._one(run)
        self._sizes = self._rows(run)
        if run.splits is None and run.probe.ids is None:
            raise ConfigError(
                f"{run.caller} keeps a memory of each sample by its number, and the batch has none; expected 'ids' (B,) "
                "beside the inputs, from 0 on, in every batch"
            )
        features = [run.outputs(role).features[side.name] for role, side in self._sides(run)]
        widths = [
            side.pooled(value, run.probe).shape[-1]
            for value, (_, side) in zip(features, self._sides(run), strict=True)
        ]
        self.embed = nn.ModuleDict(
            {
                name: nn.Linear(width, self.config.dim)
                for name, width in zip(("student", "teacher"), widths, strict=True)
            }
        )
        self.memory = Memory(sum(self._sizes), self.config.dim)
        self._normalise(run, features)
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def _one(self, run: RunContext) -> list[FeaturePair]:
        pairs = feature_pairs(run, self.config.layers)
        if len(pairs) != 1:
            raise ConfigError(f"{run.caller}.layers pairs {len(pairs)} layers; expected one of each model")
        return pairs

    def _sides(self, run: RunContext) -> list[tuple[str, Any]]:
        return [(side.role, side) for side in (self.pair.student, self.pair.teacher)]

    def _rows(self, run: RunContext) -> tuple[int, int]:
        """Samples of the labelled and of the unlabelled split."""
        if self.config.memory is not None:
            return self.config.memory, 0
        if run.splits is None:
            raise ConfigError(
                f"{run.caller}: got batches, and not the data whose samples are remembered; expected memory: their number"
            )
        unlabelled = run.splits.unlabelled
        return len(run.splits.train), 0 if unlabelled is None else len(unlabelled)

    @torch.no_grad()
    def _normalise(self, run: RunContext, features: list[Tensor]) -> None:
        """Z of either side: the mean score of a few rows with the memory as it begins, times its rows."""
        assert run.probe is not None
        for number, (value, (_, side), name) in enumerate(
            zip(features, self._sides(run), ("student", "teacher"), strict=True)
        ):
            pooled = wide(side.pooled(value, run.probe)).cpu()
            embedding = F.normalize(self.embed[name](pooled.float()))
            other = self.memory.teacher if name == "student" else self.memory.student
            index = torch.randint(len(other), (len(embedding), self.config.negatives + 1))
            scores = scored(embedding, other[index], self.config.temperature)
            self.memory.log_z[number] = (
                scores.logsumexp((0, 1)) - math.log(scores.numel()) + math.log(len(other))
            )

    @hookimpl
    def auxiliary_modules(self, run: RunContext) -> dict[str, nn.Module | Auxiliary]:
        return {"embed": self.embed, "memory": Auxiliary(self.memory, dtype=torch.float32)}

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, teacher_out: TeacherOut, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        student, teacher = self.pair.of(student_out, teacher_out)
        own, given = (
            F.normalize(wide(self.embed[name](side.pooled(value, batch))))
            for name, side, value in (
                ("student", self.pair.student, student),
                ("teacher", self.pair.teacher, teacher),
            )
        )
        start, count = self._range(info.stage)
        positive = self._index(batch, start, info.caller)
        drawn = torch.randint(count, (len(own), self.config.negatives)).to(own.device) + start
        index = torch.cat([positive[:, None], drawn], 1)
        rows = own.new_zeros(len(own))
        for number, (anchor, memory) in enumerate(((own, self.memory.teacher), (given, self.memory.student))):
            scores = scored(anchor, memory[index], self.config.temperature) - self.memory.log_z[number]
            rows = rows + contrast(scores, count)
        if torch.is_grad_enabled():
            self._seen.append((positive, own.detach(), given.detach()))
        return {"contrast": LossTerm(feature_mean(rows, self.pair.student, batch, info), self.config.weight)}

    @hookimpl
    def on_update_end(self, info: StepInfo) -> None:
        """The memory takes up what the update has seen."""
        for index, own, given in self._seen:
            self.memory.update(index, own, given, self.config.momentum)
        self._seen.clear()

    def _range(self, stage: Stage) -> tuple[int, int]:
        """First row and number of rows of the memory that the stage's samples have."""
        labelled, unlabelled = self._sizes
        if stage.data == "all":
            return 0, labelled + unlabelled
        return (labelled, unlabelled) if stage.data == "unlabelled" and unlabelled else (0, labelled)

    def _index(self, batch: Batch, start: int, name: str) -> Tensor:
        if batch.ids is None:
            raise ConfigError(
                f"{name}: got a batch without ids, and others had them; expected 'ids' (B,) in each"
            )
        if (
            not isinstance(batch.ids, Tensor)
            or batch.ids.shape != (len(batch),)
            or batch.ids.is_floating_point()
        ):
            got = (
                f"{batch.ids.dtype} {tuple(batch.ids.shape)}"
                if isinstance(batch.ids, Tensor)
                else type(batch.ids).__name__
            )
            raise ConfigError(f"{name}: ids are {got}; expected whole numbers ({len(batch)},), one a sample")
        index = batch.ids + start
        if index.device.type == "cpu" and len(index) and int(index.min()) < 0:
            raise ConfigError(f"{name}: got the sample number {int(index.min())}; expected 0 or more")
        if index.device.type == "cpu" and len(index) and int(index.max()) >= len(self.memory.student):
            raise ConfigError(
                f"{name}: got the sample number {int(index.max())}; expected fewer than {len(self.memory.student)}, the rows "
                "of the memory: say memory"
            )
        return index


def scored(anchors: Tensor, memory: Tensor, temperature: float) -> Tensor:
    """Scores ``(B, K + 1)`` of ``(B, dim)`` with ``(B, K + 1, dim)``."""
    return (memory.to(anchors) @ anchors[..., None])[..., 0] / temperature


def contrast(scores: Tensor, samples: int) -> Tensor:
    """The loss of each row ``(B,)``, from normalised scores ``(B, K + 1)``, the positive first."""
    negatives = scores.shape[1] - 1
    noise = negatives / samples
    floor = scores.new_tensor(math.log(noise + EPSILON))
    right = scores[:, 0] - torch.logaddexp(scores[:, 0], floor)
    wrong = math.log(noise) - torch.logaddexp(scores[:, 1:], floor)
    return -(right + wrong.sum(1))
