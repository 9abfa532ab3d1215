"""Distillation through an information bottleneck, in two stages.

The name IBMD stands in no published paper; this is our reading of its source text, grounded in Deep VIB (Alemi
et al. 2017, arXiv:1612.00410), variational information distillation (Ahn et al. 2019, arXiv:1904.05835) and
IBKD (Zhang et al. 2023, arXiv:2311.05472).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import (
    CLASS_KINDS,
    Batch,
    ConfigError,
    Feature,
    FeaturePair,
    Layers,
    LossTerm,
    Method,
    MethodConfig,
    RunContext,
    Stage,
    StepInfo,
    StudentOut,
    Targets,
    TeacherOut,
    feature_pairs,
    hookimpl,
    label_loss,
    soft_loss,
)
from stillhouse.kernels import softmax_kl
from stillhouse_ibmd.bottleneck import Encoder, GaussianDecoder, divergence, rate
from stillhouse_ibmd.features import as_rows, both, check_rows, rows_of, width_of
from stillhouse_ibmd.plane import COLUMNS, InformationPlane

STAGES = ("bottleneck", "target")


class IBMDConfig(MethodConfig):
    """Settings of IBMD."""

    beta: float = Field(1e-3, ge=0, description="Weight of the rates: how much the code is squeezed.")
    gamma: float = Field(
        0.1, ge=0, description="Weight of KL(e_T || e_S), which ties the two codes together."
    )
    dim: int = Field(32, gt=0, description="Width of the shared space Z.")
    hidden: int = Field(0, ge=0, description="Hidden units of each encoder; 0: linear.")
    deterministic: bool = Field(
        False, description="Codes without noise (variance 1): with beta 0 this is feature distillation."
    )
    train_student: bool = Field(True, description="Train the student in stage bottleneck too.")
    temperature: float = Field(
        4.0, gt=0, description="T of every softmax; those losses are multiplied by T^2."
    )
    alpha: float = Field(
        0.9, ge=0, le=1, description="Head: weight of the teacher; 1 - alpha is the labels'."
    )
    weight: float = Field(1.0, ge=0, description="Stage target: weight of the bottleneck beside the head.")
    shares: tuple[float, float] = Field((1.0, 2.0), description="Relative lengths of the two stages.")
    data: Literal["labelled", "unlabelled", "all"] | None = Field(
        None, description="What both stages train on; default: all for classes, labelled for regression."
    )
    layers: Layers = Field(
        "penultimate",
        description="Layers that codes are made of: penultimate, middle, uniform or last; or each of the student's by "
        "name with the teacher's beside it.",
    )


class IBMD(Method):
    """Stage ``bottleneck`` trains what is shared, stage ``target`` the student through it.

    With h the features, e(z | h) encoders to diagonal Gaussians, d(y | z) one decoder and p the teacher's
    softened outputs, ``bottleneck`` minimises
    ``T^2 KL(p || d(z_T)) + T^2 KL(p || d(z_S)) + beta (KL(e_T || N) + KL(e_S || N)) + gamma KL(e_T || e_S)``
    over encoders, decoder and, by choice, the student with its own head. ``target`` freezes encoders and decoder
    and minimises the student's part of it, times ``weight``, and ``alpha T^2 KL(p || q) + (1 - alpha) CE`` at the
    student's head.

    Several layers: an encoder for each, one decoder, and the mean over layers of every term but the head's. Where a
    row is a sample, a feature with tokens is the mean of those that are no padding.

    For regression the decoder is a Gaussian with a trained variance and the head's losses are squared errors.
    With another number of outputs than the teacher's the head learns from labels alone.
    """

    api_version = 1
    Config = IBMDConfig
    requires = frozenset({"logits", "hidden_states"})
    supports = CLASS_KINDS | {"regression", "different_outputs"}
    writes = ("information_plane.csv", "information_plane.png")
    config: IBMDConfig

    def __init__(self, config: IBMDConfig | None = None) -> None:
        super().__init__(config)
        self.plane = InformationPlane()

    # Set-up.

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        assert run.teacher is not None
        assert run.probe is not None
        labels, config = run.probe.labels, self.config
        self._regression = run.kind.labels == "numbers"
        self._role = run.target_name
        self._pairs = feature_pairs(run, config.layers)
        logits = {role: run.outputs(role).logits for role in ("teacher", self._role)}
        rows = {role: rows_of(given, run.kind) for role, given in logits.items()}
        if rows["teacher"] != rows[self._role]:
            raise ConfigError(
                f"the teacher gives outputs for rows {rows['teacher']}, the {self._role} for "
                f"{rows[self._role]}; expected the same rows: a code each has to have a partner"
            )
        self._rows = rows[self._role]
        for pair in self._pairs:
            for side in (pair.teacher, pair.student):
                check_rows(side, self._rows)
        outputs, own = (int(given.shape[-1]) for given in logits.values())
        self._head_teacher = outputs == own
        if not self._head_teacher and labels is None:
            raise ConfigError(
                f"the teacher has {outputs} outputs, the {self._role} {own}, and the data no labels: nothing can "
                "train the head; expected labels, or as many outputs"
            )
        if self._regression and config.data == "all":
            raise ConfigError(
                f"{run.caller}.data is 'all', and the labels are floats; expected labelled or unlabelled"
            )
        self._make(run, outputs)
        self._tell(run)

    def _make(self, run: RunContext, outputs: int) -> None:
        config, device = self.config, next(run.target.parameters()).device

        def encoders(sides: Iterable[Feature], *, scaled: bool) -> nn.ModuleList:
            made = (
                Encoder(
                    width_of(side, self._rows),
                    config.dim,
                    config.hidden,
                    deterministic=config.deterministic,
                    scaled=scaled,
                )
                for side in sides
            )
            return nn.ModuleList(made).to(device)

        # A wide teacher's code leaps by thousands of nats in the first updates otherwise, and the student, which is
        # to match it, loses units of its own that never come back.
        self.encode_teacher = encoders((pair.teacher for pair in self._pairs), scaled=True)
        self.encode_student = encoders((pair.student for pair in self._pairs), scaled=False)
        decoder = GaussianDecoder if self._regression else nn.Linear
        self.decode = decoder(config.dim, outputs).to(device)

    def _tell(self, run: RunContext) -> None:
        for role, sides in zip(
            ("teacher", self._role), zip(*map(both, self._pairs), strict=True), strict=True
        ):
            made = ", ".join(
                f"{side.name}: {width_of(side, self._rows)} -> {self.config.dim}" for side in sides
            )
            run.chose(f"projection.{role}", made, "one space for both")
        if not self._head_teacher:
            run.chose("head", "labels alone", "teacher and student differ in outputs")
        self._data = self.config.data or ("labelled" if self._regression else "all")
        if self.config.data is None:
            run.chose("data", self._data, "default")

    @hookimpl
    def auxiliary_modules(self, run: RunContext) -> dict[str, nn.Module]:
        return {
            "teacher_encoder": self.encode_teacher,
            "student_encoder": self.encode_student,
            "decoder": self.decode,
        }

    @hookimpl
    def stages(self, run: RunContext) -> list[Stage]:
        names = ("teacher_encoder", "student_encoder", "decoder")
        first, second = self.config.shares
        trained = (self._role, *names) if self.config.train_student else names
        return [
            Stage("bottleneck", first, data=self._data, model=self._role, train=trained),
            Stage("target", second, data=self._data, model=self._role, train=(self._role,)),
        ]

    # Losses.

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, teacher_out: TeacherOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        config, shared = self.config, info.stage.name == "bottleneck"
        weight = 1.0 if shared else config.weight
        rows = rows_of(student_out.logits, info.kind)
        losses: dict[str, list[Tensor]] = {}
        for pair, encode_student, encode_teacher in self._each():
            student, teacher = (
                as_rows(value, side, rows, batch)
                for value, side in zip(
                    pair.of(student_out, teacher_out), (pair.student, pair.teacher), strict=True
                )
            )
            codes = {"student": encode_student(student), "teacher": encode_teacher(teacher)}
            for role, encoder in (("teacher", encode_teacher), ("student", encode_student)):
                if shared or role == "student":
                    drawn = encoder.code(codes[role])
                    losses.setdefault(f"distortion_{role}", []).append(
                        self._distortion(drawn, targets, batch, info)
                    )
                    losses.setdefault(f"rate_{role}", []).append(info.mean(rate(codes[role]), batch.mask))
            if config.gamma:
                tie = divergence(codes["teacher"], codes["student"])
                losses.setdefault("match", []).append(info.mean(tie, batch.mask))
        terms = {
            name: LossTerm(
                torch.stack(given).mean(), self._weight(name, 1.0 if "teacher" in name else weight)
            )
            for name, given in losses.items()
        }
        if not shared or config.train_student:
            terms |= self._head(student_out.logits, targets, batch, info)
        return terms

    def _each(self) -> Iterator[tuple[FeaturePair, Encoder, Encoder]]:
        encoders = zip(self.encode_student, self.encode_teacher, strict=True)
        for pair, (own, other) in zip(self._pairs, encoders, strict=True):
            assert isinstance(own, Encoder)
            assert isinstance(other, Encoder)
            yield pair, own, other

    def _weight(self, name: str, weight: float) -> float:
        """Of a term in the loss; distortions are in nats, and the loss has T^2 times them."""
        config = self.config
        if name == "match":
            return weight * config.gamma
        if name.startswith("rate"):
            return weight * config.beta
        return weight * (1.0 if isinstance(self.decode, GaussianDecoder) else config.temperature**2)

    def _distortion(self, drawn: Tensor, targets: Targets, batch: Batch, info: StepInfo) -> Tensor:
        """What the decoder loses of the teacher's outputs, in nats."""
        if isinstance(self.decode, GaussianDecoder):
            return info.mean(self.decode.distortion(drawn, targets.dense), batch.mask)
        temperature = self.config.temperature
        kl = softmax_kl(
            self.decode(drawn), targets.soft, temperature=temperature, mask=batch.mask, count=info.rows
        )
        return kl / temperature**2

    def _head(self, logits: Tensor, targets: Targets, batch: Batch, info: StepInfo) -> dict[str, LossTerm]:
        """The student's own outputs against the teacher's and against the labels."""
        alpha = self.config.alpha if self._head_teacher else 0.0
        terms = {}
        if self._head_teacher:
            soft = soft_loss(logits, targets, batch, info, temperature=self.config.temperature)
            terms["head"] = LossTerm(soft, alpha if targets.has_labels else 1.0)
        if targets.has_labels and alpha < 1:
            terms["labels"] = LossTerm(label_loss(logits, targets, batch, info), 1 - alpha)
        return terms

    # The information plane.

    @hookimpl
    def on_update_end(self, info: StepInfo, metrics: Mapping[str, Tensor]) -> None:
        found = {name.rpartition(".")[2]: value for name, value in metrics.items()}
        measured = {name: found[name] for name in COLUMNS if name in found}
        self.plane.add(info.index, STAGES.index(info.stage.name), measured)

    @hookimpl
    def on_stage_end(self, run: RunContext, stage: Stage) -> None:
        if run.dir is not None:
            self.plane.write(run.dir)

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return {"plane": self.plane.table()}

    @hookimpl
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plane.load(state["plane"])
