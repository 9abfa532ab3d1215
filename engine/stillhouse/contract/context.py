"""What a plugin is told: the run it is in, the stage, and the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from stillhouse.contract.batch import Batch
from stillhouse.contract.kinds import KINDS, TaskKind
from stillhouse.contract.outputs import StudentOut
from stillhouse.errors import ConfigError

if TYPE_CHECKING:
    from stillhouse.contract.splits import Splits

STUDENT = "student"
TARGET = "target"
TEACHER = "teacher"


@dataclass(frozen=True)
class Stage:
    """One part of a method: what is trained, on what, for how long, and against whose outputs.

    name
        Shown in logs and in the manifest.
    share
        Part of the run's student updates that the stage takes; shares need not sum to 1.
    steps
        The stage's length in updates; replaces ``share`` and is on top of the run's steps.
    data
        ``labelled``, ``unlabelled`` (the inputs of the labelled split where the task has none), or
        ``all`` (both, one after the other, labels ``-100`` where there are none).
    model
        Whose outputs are ``student_out``, and what is evaluated: ``student``, ``target``, or an
        auxiliary module by the name that the plugin gave it. None: no forward pass is made for the
        losses, which run their own modules.
    train
        Names of the modules whose parameters are trained; None: ``model`` and every auxiliary module.
    teacher
        Whose outputs are ``teacher_out``: ``teacher`` (of several their mean); some of several by name (their mean); a model's
        name (it stands still for the stage: its soft labels are kept, or a frozen copy answers); None: nobody's.
    """

    name: str
    share: float = 1.0
    steps: int | None = None
    data: Literal["labelled", "unlabelled", "all"] = "labelled"
    model: str | None = STUDENT
    train: tuple[str, ...] | None = None
    teacher: str | tuple[str, ...] | None = TEACHER


@dataclass(slots=True)
class StepInfo:
    """Where the run stands, handed to every hook of a step.

    index
        Number of student updates made before this one, over the whole run.
    stage, stage_index, stage_steps
        The stage, the updates made in it before this one, and its length.
    rows, labelled
        Rows that count, and those of them with a label, of the *whole* update: all micro-batches, all
        ranks. A loss divides by these, so it does not depend on how the update was split.
    share
        This micro-batch's part of ``rows``: the factor for a loss that is a mean over the
        micro-batch and does not split into rows.
    micro, micros
        Number of this micro-batch, from 0, and how many the update has.
    kind
        What the batch means.
    logged
        What hooks of this micro-batch have logged, by ``plugin.name``.
    """

    index: int = 0
    stage: Stage = field(default_factory=lambda: Stage("train"))
    stage_index: int = 0
    stage_steps: int = 0
    rows: float = 1.0
    labelled: float = 0.0
    share: float = 1.0
    micro: int = 0
    micros: int = 1
    kind: TaskKind = KINDS["classification"]
    logged: dict[str, Tensor] = field(default_factory=dict)
    caller: str = ""

    @property
    def last(self) -> bool:
        """Whether this is the update's last micro-batch."""
        return self.micro == self.micros - 1

    def mean(self, per_row: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum of ``per_row`` over the rows that count divided by the update's rows: a scalar.

        per_row
            One value a row, the shape of ``mask``. Masked rows may hold anything, NaN too.
        """
        kept = per_row if mask is None else per_row.where(mask, per_row.new_zeros(()))
        return kept.sum() / self.rows

    def log(self, name: str, value: Tensor | float) -> None:
        """Show a number beside the loss terms, as ``plugin.name``; it is no part of the loss.

        The values of an update's micro-batches are added up, as those of terms are: divide a sum by ``rows``, or
        multiply a mean by ``share``.
        """
        self.logged[f"{self.caller}.{name}"] = torch.as_tensor(value).detach()


@dataclass
class Auxiliary:
    """A module trained beside the student, with optimizer options of its own.

    options
        Go to its optimizer group, for example ``{"lr": 0.01, "weight_decay": 0.0}``.
    dtype
        Of its floating parameters; None: the student's. It is placed on the student's device.
    """

    module: nn.Module
    options: Mapping[str, float] = field(default_factory=dict)
    dtype: torch.dtype | None = None


class Host(Protocol):
    """What stands behind a RunContext: the step that asks the plugins."""

    def look(self, role: str, batch: Batch) -> StudentOut: ...
    def capture(self, role: str, module: str) -> None: ...
    def say(self, message: str) -> None: ...


@dataclass
class RunContext:
    """The run as a plugin sees it.

    models
        By name: ``student``, ``target`` where another model is trained at the end, and every
        auxiliary module under ``plugin.module`` once the plugins have given theirs.
    teacher
        The frozen teacher, or None; the first one where there are several.
    teachers
        All of them by name; the first is ``teacher``.
    splits
        Labelled and unlabelled training data and validation; None when only a step is embedded in
        somebody else's trainer. The test split is not here: nobody sees it before the end.
    probe
        A few rows of the training data, for finding out shapes.
    kind
        What a batch means.
    steps
        Student updates of the whole run.
    dir
        The run directory, or None. It is there from the first stage on: before, the run may still be refused.
    build
        Makes a further model from ``{"name": ..., argument: ...}``, as the config's ``student`` is made
        (a teacher assistant, a specialist); None where the surrounding trainer knows models as objects only.
    method_names
        Names of the run's methods, in order: the prefixes of their loss terms.
    with_losses
        Those of them that give loss terms; the others change batches or targets.
    """

    models: dict[str, nn.Module]
    teacher: nn.Module | None = None
    splits: Splits | None = None
    probe: Batch | None = None
    kind: TaskKind = KINDS["classification"]
    steps: int = 1
    batch_size: int = 1
    seed: int = 0
    dir: Path | None = None
    build: Callable[[Mapping[str, Any]], nn.Module] | None = None
    method_names: tuple[str, ...] = ()
    with_losses: tuple[str, ...] = ()
    teachers: Mapping[str, nn.Module] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    caller: str = ""
    host: Host | None = field(default=None, repr=False)

    @property
    def student(self) -> nn.Module:
        """The model that ``student`` names."""
        return self.models[STUDENT]

    @property
    def target(self) -> nn.Module:
        """The model trained at the end: ``target`` where the config names one, else the student."""
        return self.models.get(TARGET, self.models[STUDENT])

    @property
    def target_name(self) -> str:
        """``target`` where the config names one, else ``student``."""
        return TARGET if TARGET in self.models else STUDENT

    def chose(self, name: str, value: Any, why: str) -> None:
        """Print and keep (in the manifest, as ``plugin.name``) what was chosen without being asked for."""
        full = f"{self.caller}.{name}" if self.caller else name
        self.chosen[full] = {"value": value, "why": why}
        self.say(f"{full} = {value} ({why})")

    def say(self, message: str) -> None:
        """A line for people, where somebody reads."""
        if self.host is not None:
            self.host.say(message)

    def outputs(self, role: str = STUDENT, batch: Batch | None = None) -> StudentOut:
        """Outputs and asked-for features of ``teacher`` or a model by name, in eval mode and without a graph.

        batch
            Default: the probe, for finding out shapes.
        """
        rows = self.probe if batch is None else batch
        if self.host is None or rows is None:
            raise ConfigError(f"outputs of '{role}': got no model and no rows to call it on")
        return self.host.look(role, rows)

    def capture(self, role: str, module: str) -> None:
        """Ask for the output of a named module at every forward pass.

        role
            ``teacher``, or a model's name. The output is then in ``teacher_out.features[module]``
            or ``student_out.features[module]``.
        module
            The module's name; with ``:input`` behind it, what the module reads is taken instead.
            ``hidden_states.N`` and ``attentions.N`` are those of a transformers model (of an encoder and a decoder
            the decoder's; ``encoder_hidden_states.N`` the encoder's).

        Raises ConfigError, offering the nearest names, if there is no such module.
        """
        if self.host is None:
            raise ConfigError(f"features of {role}.{module}: this trainer offers no hidden states")
        self.host.capture(role, module)
