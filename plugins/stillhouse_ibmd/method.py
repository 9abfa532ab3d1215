"""Distillation through an information bottleneck, in two stages.

The name IBMD stands in no published paper; this is our reading of its source text, grounded in Deep VIB (Alemi
et al. 2017, arXiv:1612.00410), variational information distillation (Ahn et al. 2019, arXiv:1904.05835) and
IBKD (Zhang et al. 2023, arXiv:2311.05472).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import (
    CLASS_KINDS,
    Batch,
    ConfigError,
    LossTerm,
    Method,
    MethodConfig,
    RunContext,
    Stage,
    StepInfo,
    StudentOut,
    Targets,
    TeacherOut,
    hookimpl,
    label_loss,
    soft_loss,
)
from stillhouse.kernels import softmax_kl
from stillhouse_ibmd.bottleneck import Encoder, Gaussian, GaussianDecoder, divergence, rate
from stillhouse_ibmd.features import Feature, as_rows, feature
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
    teacher_features: str | None = Field(None, description="A module of the teacher; default: penultimate.")
    student_features: str | None = Field(None, description="A module of the student; default: penultimate.")


class IBMD(Method):
    """Stage ``bottleneck`` trains what is shared, stage ``target`` the student through it.

    With h the features, e(z | h) encoders to diagonal Gaussians, d(y | z) one decoder and p the teacher's
    softened outputs, ``bottleneck`` minimises
    ``T^2 KL(p || d(z_T)) + T^2 KL(p || d(z_S)) + beta (KL(e_T || N) + KL(e_S || N)) + gamma KL(e_T || e_S)``
    over encoders, decoder and, by choice, the student with its own head. ``target`` freezes encoders and decoder
    and minimises the student's part of it, times ``weight``, and ``alpha T^2 KL(p || q) + (1 - alpha) CE`` at the
    student's head.

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
        self._teacher = feature(
            run, "teacher", run.teacher, run.probe.for_teacher, config.teacher_features, "teacher_features"
        )
        self._student = feature(
            run, self._role, run.target, run.probe.inputs, config.student_features, "student_features"
        )
        if self._teacher.rows != self._student.rows:
            raise ConfigError(
                f"the teacher gives outputs for rows {self._teacher.rows}, the {self._role} for "
                f"{self._student.rows}; expected the same rows: a code each has to have a partner"
            )
        outputs, own = self._teacher.outputs, self._student.outputs
        self._head_teacher = outputs == own
        if not self._head_teacher and labels is None:
            raise ConfigError(
                f"the teacher has {outputs} outputs, the {self._role} {own}, and the data no labels: nothing can "
                "train the head; expected labels, or as many outputs"
            )
        if self._regression and config.data == "all":
            raise ConfigError(
                "ibmd.data is 'all', and the labels are floats; expected labelled or unlabelled"
            )
        self._make(run, outputs)
        self._tell(run)

    def _make(self, run: RunContext, outputs: int) -> None:
        config, device = self.config, next(run.target.parameters()).device
        sides = (self._teacher, self._student)
        self.encode_teacher, self.encode_student = (
            Encoder(side.width, config.dim, config.hidden, deterministic=config.deterministic).to(device)
            for side in sides
        )
        decoder = GaussianDecoder if self._regression else nn.Linear
        self.decode = decoder(config.dim, outputs).to(device)

    def _tell(self, run: RunContext) -> None:
        for side in (self._teacher, self._student):
            name = f"{side.role}.{side.module}"
            run.chose(
                f"projection.{side.role}", f"{name}: {side.width} -> {self.config.dim}", "widths differ"
            )
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
        student = self.encode_student(_rows(student_out, self._student))
        teacher = self.encode_teacher(_rows(teacher_out, self._teacher))
        terms: dict[str, LossTerm] = {}
        if shared:
            terms |= self._side("teacher", self.encode_teacher, teacher, targets, batch, info, 1.0)
        terms |= self._side("student", self.encode_student, student, targets, batch, info, weight)
        if config.gamma:
            tie = info.mean(divergence(teacher, student), batch.mask)
            terms["match"] = LossTerm(tie, weight * config.gamma)
        if not shared or config.train_student:
            terms |= self._head(student_out.logits, targets, batch, info)
        return terms

    def _side(
        self,
        role: str,
        encoder: Encoder,
        code: Gaussian,
        targets: Targets,
        batch: Batch,
        info: StepInfo,
        weight: float,
    ) -> dict[str, LossTerm]:
        """Rate and distortion of one code, both in nats."""
        temperature = self.config.temperature
        drawn, scale = encoder.code(code), 1.0
        if isinstance(self.decode, GaussianDecoder):
            loss = info.mean(self.decode.distortion(drawn, targets.dense), batch.mask)
        else:
            scale = temperature**2
            logits = self.decode(drawn)
            loss = (
                softmax_kl(logits, targets.soft, temperature=temperature, mask=batch.mask, count=info.rows)
                / scale
            )
        return {
            f"distortion_{role}": LossTerm(loss, weight * scale),
            f"rate_{role}": LossTerm(info.mean(rate(code), batch.mask), weight * self.config.beta),
        }

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


def _rows(out: StudentOut | TeacherOut, asked: Feature) -> Tensor:
    logits = out.logits
    if not isinstance(logits, Tensor) or asked.module not in out.features:
        raise ConfigError(
            f"no features of {asked.role}.{asked.module} came with this batch; expected the model to be called: "
            "IBMD can't read kept soft labels"
        )
    return as_rows(out.features[asked.module], logits, asked)
