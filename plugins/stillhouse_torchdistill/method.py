"""Losses of torchdistill (Matsubara 2021, arXiv:2011.12913) at work in Stillhouse.

A loss there reads ``student_io_dict[path]["input" or "output"]``. Which paths it reads is found out by calling it
on the probe before step 0, which also tells whether the shapes fit.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import (
    Batch,
    ConfigError,
    Conformance,
    LossTerm,
    Method,
    MethodConfig,
    MissingExtra,
    RunContext,
    StepInfo,
    StudentOut,
    Targets,
    TeacherOut,
    hookimpl,
    label_loss,
)
from stillhouse_torchdistill.heads import Head, HeadConfig
from stillhouse_torchdistill.views import IDS, ROOT, View, Wanted, feature_name

DEFAULTS = (("module_path", ROOT), ("output_path", ROOT), ("_io", "output"))
"""By the end of an argument's name, what it is where the config does not say."""


class TorchdistillConfig(MethodConfig):
    """Which loss, with which arguments."""

    loss: str = Field(
        description="A class of torchdistill.losses, such as KDLoss, RKDLoss or WeightedSumLoss."
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Its arguments. A module path that is left out is '.', the whole model; an io is 'output'.",
    )
    heads: dict[str, HeadConfig] = Field(
        default_factory=dict, description="Trained modules by the path under which the loss looks them up."
    )
    labels_every: int = Field(
        1,
        gt=0,
        description="Of the labels, one in so many is handed on: 4 for SSKDLoss, whose rows are an image and three "
        "changes of it, with one label.",
    )
    weight: float = Field(1.0, gt=0, description="Weight of the loss.")
    ce_weight: float = Field(0.0, ge=0, description="Weight of cross-entropy with the labels beside it.")


class Torchdistill(Method):
    """Any loss of torchdistill by name; its conventions (temperature, T^2, means) are its own.

    A loss there is a mean over its rows, so it is multiplied by this micro-batch's share of the update. Masked
    samples are taken out before it is called. ``sample_ids`` as a path gives row numbers the way CRDLoss reads them.
    """

    api_version = 1
    Config = TorchdistillConfig
    config: TorchdistillConfig
    requires = frozenset({"logits"})
    supports = frozenset({"classification", "different_outputs"})
    conformance = Conformance(settings={"loss": "KDLoss", "arguments": {"temperature": 4.0, "alpha": 0.5}})

    def __init__(self, config: TorchdistillConfig | None = None) -> None:
        super().__init__(config)
        self._loss = make(self.config.loss, self.config.arguments)
        self._heads: dict[str, Head] = {}

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        for name, head in self.config.heads.items():
            self._heads[name] = Head(head, self._probed(run, head)).to(_device(run.student))
        self._rehearse(run)

    @hookimpl
    def auxiliary_modules(self) -> dict[str, nn.Module]:
        kept: dict[str, nn.Module] = dict(self._heads)
        # Parameters are trained; buffers, such as the memory of CRD, travel in checkpoints.
        if [*self._loss.parameters(), *self._loss.buffers()]:
            kept["loss"] = self._loss
        return kept

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, teacher_out: TeacherOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        values = self._call(self._loss, student_out, teacher_out, targets, batch)
        terms = {"loss": LossTerm(values.reshape(()) * info.share, self.config.weight)}
        if self.config.ce_weight and targets.has_labels:
            ce = label_loss(student_out.logits, targets, batch, info)
            terms["ce"] = LossTerm(ce, self.config.ce_weight)
        return terms

    # The loss, called as torchdistill calls it.

    def _call(
        self, loss: nn.Module, student: StudentOut, teacher: TeacherOut | None, targets: Targets, batch: Batch
    ) -> Tensor:
        if teacher is None:
            raise ConfigError(
                f"torchdistill: {self.config.loss} compares with a teacher, and none is called here"
            )
        teacher = replace(teacher, logits=targets.dense)  # as the plugins before this one left them
        rows = _valid(batch)

        def look(role: str, path: str, side: str) -> Any:
            if path in self._heads and side == "output":
                head = self.config.heads[path]
                return self._heads[path](look(head.role, head.path, head.side))
            if path == IDS:
                return self._samples(_needed(batch.ids, role, path, side)[rows])
            if path == ROOT and side == "input":
                value = batch.inputs if role == "student" else batch.for_teacher
            else:
                out = student if role == "student" else teacher
                value = out.logits if path == ROOT else out.features.get(feature_name(path, side))
            return _needed(value, role, path, side)[rows]

        labels = targets.labels if targets.probabilities is None else targets.probabilities
        labels = None if labels is None else labels[rows]
        if labels is not None and len(labels) == 0:
            return student.logits[rows].sum()  # no valid row: zero, with a graph
        if labels is not None:
            labels = labels[:: self.config.labels_every]
        views = View("student", look), View("teacher", look)
        if hasattr(loss, "term_dict"):
            return loss({"student": views[0], "teacher": views[1]}, {}, labels)  # type: ignore[no-any-return]
        return loss(*views, labels)  # type: ignore[no-any-return]

    def _samples(self, ids: Tensor) -> dict[str, Tensor]:
        """Row numbers, and others drawn beside them: CRDLoss can't draw its own (1.1.5 looks for a missing field)."""
        arguments = self.config.arguments
        negatives = int(arguments.get("num_negative_samples", 1))
        others = torch.randint(int(arguments.get("output_size", 1)), (len(ids), negatives), device=ids.device)
        return {"pos_idx": ids, "contrast_idx": torch.cat([ids[:, None], others], dim=1)}

    def _rehearse(self, run: RunContext) -> None:
        """Call a copy of the loss on the probe until it finds all it looks for; ConfigError where it can't."""
        if run.probe is None or run.teacher is None:
            raise ConfigError(
                f"torchdistill: {self.config.loss} needs a teacher and a few rows to be tried on"
            )
        asked: set[tuple[str, str, str]] = set()
        while True:
            teacher = run.outputs("teacher")
            out = TeacherOut(teacher.logits, teacher.features)
            targets = Targets(run.probe.labels, teacher.logits)
            try:
                with torch.random.fork_rng():
                    value = self._call(copy.deepcopy(self._loss), run.outputs(), out, targets, run.probe)
            except Wanted as wanted:
                key = (wanted.role, wanted.path, wanted.side)
                if key in asked or wanted.path in (ROOT, IDS):
                    raise ConfigError(f"torchdistill: {self.config.loss} reads {wanted}: not there") from None
                asked.add(key)
                run.capture(wanted.role, feature_name(wanted.path, wanted.side))
                continue
            except ConfigError:
                raise
            except Exception as error:
                raise ConfigError(
                    f"torchdistill: {self.config.loss} fails on the first rows ({type(error).__name__}: {error}); "
                    "look at method.arguments: it gets the student's and the teacher's modules and the labels"
                ) from error
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ConfigError(
                    f"torchdistill: {self.config.loss} gave {value!r}; expected one number: set reduction"
                )
            return

    def _probed(self, run: RunContext, head: HeadConfig) -> Tensor:
        """The feature that a head reads, of the probe."""
        assert run.probe is not None
        if head.path == ROOT:
            inputs = run.probe.inputs if head.role == "student" else run.probe.for_teacher
            return inputs if head.side == "input" else run.outputs(head.role).logits
        name = feature_name(head.path, head.side)
        run.capture(head.role, name)
        return run.outputs(head.role).features[name]


def make(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A loss of torchdistill. MissingExtra without the package, ConfigError for a name or arguments it hasn't."""
    try:
        # The module of losses alone: it takes no torchvision, which the rest of the package does.
        from torchdistill.losses import high_level, mid_level  # noqa: F401 - they register what they hold
        from torchdistill.losses.registry import HIGH_LEVEL_LOSS_DICT, MIDDLE_LEVEL_LOSS_DICT
    except ImportError:
        raise MissingExtra("method 'torchdistill'", "torchdistill", "torchdistill") from None
    known = {**MIDDLE_LEVEL_LOSS_DICT, **HIGH_LEVEL_LOSS_DICT}
    if name not in known:
        raise ConfigError(
            f"method.loss: torchdistill has no loss '{name}'; it has {', '.join(sorted(known))}"
        )
    kind = known[name]
    given = {**_defaults(kind), **arguments}
    try:
        made: nn.Module = kind(**given)
    except (TypeError, ValueError, KeyError) as error:
        takes = str(inspect.signature(kind)).replace("'", "")
        raise ConfigError(f"method.arguments: {name}{takes}: {error}") from None
    return made


def _defaults(kind: type[nn.Module]) -> dict[str, str]:
    found = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        for end, value in DEFAULTS:
            if parameter.default is parameter.empty and name.endswith(end):
                found[name] = value
    return found


def _valid(batch: Batch) -> Tensor | slice:
    """Index of the samples that count."""
    if batch.mask is None:
        return slice(None)
    if batch.mask.dim() != 1:
        raise ConfigError(
            "torchdistill: got a mask of tokens; its losses know samples only: use another method"
        )
    return batch.mask


def _needed(value: Any, role: str, path: str, side: str) -> Any:
    if value is None:
        raise Wanted(role, path, side)
    return value


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
