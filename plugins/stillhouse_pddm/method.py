"""Distillation along a path of small networks, in three stages.

The names PDDM and PDNet stand in no published paper; this is our reading of their source text, grounded in the flow
between layers (Yim et al. 2017, CVPR), HyperNetworks (Ha et al. 2017, arXiv:1609.09106), teacher assistants (Mirzadeh
et al. 2020, arXiv:1902.03393), route constrained optimisation (Jin et al. 2019, arXiv:1904.09149), Weight
Distillation (Lin et al. 2021, arXiv:2009.09152) and LiGO (Wang et al. 2023, arXiv:2303.00980).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import (
    CLASS_KINDS,
    Auxiliary,
    Batch,
    ConfigError,
    Conformance,
    LossTerm,
    Method,
    MethodConfig,
    RunContext,
    Stage,
    StepInfo,
    StudentOut,
    Targets,
    hookimpl,
    label_loss,
    soft_loss,
)
from stillhouse_pddm import report
from stillhouse_pddm.alignment import align, needs_scipy
from stillhouse_pddm.networks import (
    PathOutputs,
    flow,
    mappable,
    output_error,
    outputs_of,
    parameters_of,
    relative_error,
)
from stillhouse_pddm.pdnet import PDNet

PROBE = 512
"""Training rows on which units are compared and errors are reported."""


class PDDMConfig(MethodConfig):
    """Settings of PDDM."""

    points: int = Field(4, ge=2, description="Snapshots of one small network along its training.")
    networks: tuple[dict[str, Any], ...] | None = Field(
        None,
        min_length=2,
        description="Instead of snapshots, a path along size: teacher assistants, each named and set as a student "
        "is; the target is the step after the last.",
    )
    taught_by: Literal["teacher", "previous"] = Field(
        "teacher",
        description="Along size: who teaches a network; the first one is the teacher's in any case.",
    )
    shares: tuple[float, float] = Field((3.0, 1.0), description="Relative lengths of path and target.")
    pdnet_steps: int = Field(200, gt=0, description="PDNet's updates; the student is not trained in them.")
    pdnet_lr: float = Field(3e-3, gt=0, description="PDNet's learning rate.")
    rank: int = Field(8, gt=0, description="Rank of PDNet's matrices.")
    block: int = Field(32, gt=0, description="Units that share a gain.")
    linear: bool = Field(False, description="An affine PDNet, the same at each point.")
    outputs: float = Field(1.0, ge=0, description="Weight of the outputs' KL in PDNet's loss.")
    flows: float = Field(0.1, ge=0, description="Weight of the FSP matrices' error in PDNet's loss.")
    align: bool = Field(True, description="Put hidden units in one order along the path (needs SciPy).")
    anchors: int = Field(1, gt=0, description="How many of the path's last networks teach the target.")
    temperature: float = Field(
        4.0, gt=0, description="T of the softmaxes; those losses are multiplied by T^2."
    )
    alpha: float = Field(0.9, ge=0, le=1, description="On the path: weight of the teacher beside the labels.")
    target_alpha: float = Field(1.0, ge=0, le=1, description="The target: weight of the small networks.")
    data: Literal["labelled", "unlabelled", "all"] | None = Field(
        None, description="What every stage trains on; default: all for classes, labelled for regression."
    )


class PDDM(Method):
    """``path`` trains small networks, ``pdnet`` a network that continues their parameters, ``target`` goes on from it.

    ``path``: ``alpha T^2 KL(teacher || small) + (1 - alpha) CE``, for one network whose snapshots are the path, or for
    one after another along size. Then hidden units are aligned. ``pdnet``: from point k the parameters of k + 1,
    ``|made - real|^2 / |real|^2 + outputs KL(real || made) + flows FSP``. ``target``: PDNet's step past the path's end
    is loaded, and trained against the last ``anchors`` small networks' outputs. The teacher is called in ``path`` alone.
    """

    api_version = 1
    Config = PDDMConfig
    requires = frozenset({"logits"})
    supports = CLASS_KINDS | {"regression"}
    writes = ("pddm/path.pt", "pddm/path.json", "pddm/path.png", "pddm/pdnet.pt")
    conformance = Conformance(
        settings={"points": 2, "pdnet_steps": 2}
    )  # the checks stop and resume at each update
    config: PDDMConfig

    def __init__(self, config: PDDMConfig | None = None) -> None:
        super().__init__(config)
        self._facts: dict[str, Any] = {}

    # Set-up.

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        assert run.probe is not None
        if self.config.align:
            needs_scipy()
        self._regression = run.kind.labels == "numbers"
        if self._regression and self.config.data == "all":
            raise ConfigError(
                f"{run.caller}.data is 'all', and the labels are floats; expected labelled or unlabelled"
            )
        self.networks = self._networks(run)
        named = [(self._title(point), network) for point, network in enumerate(self.networks)]
        shapes = mappable([*named, (f"the {run.target_name}", run.target)])
        self._compare_outputs(run)
        config, device = self.config, next(run.target.parameters()).device
        self.pdnet = PDNet(shapes, rank=config.rank, block=config.block, linear=config.linear).to(device)
        anchors = self.networks[-config.anchors :]
        self.together = PathOutputs(anchors, regression=self._regression)
        self._data = config.data or ("labelled" if self._regression else "all")
        if config.data is None:
            run.chose("data", self._data, "default")
        widths = {name: given for name, given in shapes.items() if len(set(given)) > 1}
        if widths:
            run.chose(
                "projections", {name: _arrows(given) for name, given in widths.items()}, "widths differ"
            )

    def _networks(self, run: RunContext) -> list[nn.Module]:
        if self.config.networks is None:
            return [copy.deepcopy(run.target) for _ in range(self.config.points)]
        if run.build is None:
            raise ConfigError(
                f"{run.caller}.networks names models, and this trainer knows models as objects only; expected a path of "
                "snapshots here: leave networks out"
            )
        return [run.build(spec) for spec in self.config.networks]

    def _title(self, point: int) -> str:
        if self.config.networks is None:
            return f"snapshot {point + 1}"
        spec = self.config.networks[point]
        return f"network {point + 1} ({', '.join(f'{name}={value}' for name, value in spec.items())})"

    @torch.no_grad()
    def _compare_outputs(self, run: RunContext) -> None:
        assert run.probe is not None
        modes = run.target.training
        wanted = outputs_of(run.target.eval(), run.probe.inputs).shape
        run.target.train(modes)
        for point, network in enumerate(self.networks):
            got = outputs_of(network.eval(), run.probe.inputs).shape
            if got != wanted:
                raise ConfigError(
                    f"{self._title(point)} gives outputs of shape {tuple(got)}, the {run.target_name} "
                    f"{tuple(wanted)}; expected the same: give it as many outputs"
                )

    @hookimpl
    def auxiliary_modules(self, run: RunContext) -> dict[str, nn.Module | Auxiliary]:
        options = {"lr": self.config.pdnet_lr, "weight_decay": 0.0}
        small = {f"small{point + 1}": network for point, network in enumerate(self.networks)}
        return {**small, "pdnet": Auxiliary(self.pdnet, options), "path": self.together}

    @hookimpl
    def stages(self, run: RunContext) -> list[Stage]:
        names = {id(module): name for name, module in run.models.items()}
        small = [names[id(network)] for network in self.networks]
        pdnet, together, target = names[id(self.pdnet)], names[id(self.together)], run.target_name
        share, rest = self.config.shares
        if self.config.networks is None:
            path = [Stage("path", share, data=self._data, model=small[-1], train=(small[-1],))]
        else:
            teachers = (
                ["teacher", *small] if self.config.taught_by == "previous" else ["teacher"] * len(small)
            )
            path = [
                Stage(
                    f"path.{number + 1}",
                    share / len(small),
                    None,
                    self._data,
                    name,
                    (name,),
                    teachers[number],
                )
                for number, name in enumerate(small)
            ]
        return [
            *path,
            Stage(
                "pdnet",
                steps=self.config.pdnet_steps,
                data=self._data,
                model=None,
                train=(pdnet,),
                teacher=None,
            ),
            Stage("target", rest, data=self._data, model=target, train=(target,), teacher=together),
        ]

    # Losses.

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut | None, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        if student_out is None:
            return self._pdnet_terms(batch, info)
        alpha = self.config.target_alpha if info.stage.name == "target" else self.config.alpha
        return self._against(student_out.logits, alpha, targets, batch, info)

    def _against(
        self, logits: Tensor, alpha: float, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        """The soft targets, and the labels where there are some."""
        soft = soft_loss(logits, targets, batch, info, temperature=self.config.temperature)
        if not targets.has_labels or alpha == 1:
            return {"soft": LossTerm(soft)}
        labels = label_loss(logits, targets, batch, info)
        return {"soft": LossTerm(soft, alpha), "labels": LossTerm(labels, 1 - alpha)}

    def _pdnet_terms(self, batch: Batch, info: StepInfo) -> dict[str, LossTerm]:
        """Parameters, outputs and flows of every generated network against the real one's."""
        config, count = self.config, len(self.networks) - 1
        errors: list[Tensor] = []
        outputs: list[Tensor] = []
        flows: list[Tensor] = []
        for point in range(count):
            real = self.networks[point + 1].eval()
            made = self.pdnet(parameters_of(self.networks[point]), point)
            errors.append(relative_error(made, parameters_of(real)))
            with torch.no_grad():
                wanted, real_flow = flow(real, batch.inputs)
            given, made_flow = flow(real, batch.inputs, made)
            per_row = output_error(given, wanted, regression=self._regression)
            outputs.append(info.mean(per_row, batch.mask))
            pairs = zip(made_flow, real_flow, strict=True)
            flows += [(a - b).square().sum() / b.square().sum().clamp_min(1e-12) for a, b in pairs]
        terms = {
            # These two are no sums over rows: each micro-batch counts by its part.
            "parameters": LossTerm(info.share * torch.stack(errors).mean()),
            "outputs": LossTerm(torch.stack(outputs).mean(), config.outputs),
        }
        if flows and config.flows:
            terms["flows"] = LossTerm(info.share * torch.stack(flows).mean(), config.flows)
        return terms

    # Along the way.

    @hookimpl
    def on_update_end(self, info: StepInfo) -> None:
        """Keep a snapshot where the path has a point."""
        if info.stage.name != "path":
            return
        last = self.networks[-1].state_dict()
        for point, network in enumerate(self.networks[:-1], 1):
            if info.stage_index + 1 == max(1, round(info.stage_steps * point / len(self.networks))):
                network.load_state_dict(last)

    @hookimpl
    def on_stage_end(self, run: RunContext, stage: Stage) -> None:
        if stage.name == "path" or stage.name == f"path.{len(self.networks)}":
            self._close_path(run)
        elif stage.name == "pdnet":
            self._report(run)

    @hookimpl
    def on_stage_start(self, run: RunContext, stage: Stage) -> None:
        if stage.name == "target":
            self._start(run.target)

    def _close_path(self, run: RunContext) -> None:
        """Align the units, then keep every point's parameters, outputs and flows."""
        inputs, done = _some_rows(run).inputs, []
        if self.config.align:
            for point in range(1, len(self.networks)):
                found = align(self.networks[point], self.networks[point - 1], inputs)
                done.append({"point": point + 1, "layers": [asdict(item) for item in found]})
        self._facts["alignment"] = done
        if run.dir is not None:
            report.keep(run.dir, self.networks, inputs)

    @torch.no_grad()
    def _start(self, target: nn.Module) -> None:
        """PDNet's step past the path's end; buffers of the last network where they fit."""
        last = self.networks[-1]
        made = self.pdnet(parameters_of(last), len(self.networks) - 1)
        buffers = dict(last.named_buffers())
        kept = {
            name: buffers[name] if name in buffers and buffers[name].shape == own.shape else own
            for name, own in target.named_buffers()
        }
        target.load_state_dict({**target.state_dict(), **kept, **made})

    @torch.no_grad()
    def _report(self, run: RunContext) -> None:
        if run.dir is None:
            return
        batch, trained = _some_rows(run), copy.deepcopy(run.target)
        self._start(trained)
        last = outputs_of(self.networks[-1].eval(), batch.inputs)
        start = output_error(outputs_of(trained.eval(), batch.inputs), last, regression=self._regression)
        content = {
            "path": [self._title(point) for point in range(len(self.networks))],
            **self._facts,
            "points": report.errors(self.pdnet, self.networks, batch.inputs, regression=self._regression),
            "start": {"output_error": float(start.mean()), "from": "the path's last network"},
            "pdnet": self.pdnet.describe(),
        }
        report.write(run.dir, content, self.pdnet)

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return {"facts": self._facts}

    @hookimpl
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._facts = dict(state["facts"])


def _some_rows(run: RunContext) -> Batch:
    """Training rows spread over the split; the probe where only a step is embedded."""
    assert run.probe is not None
    if run.splits is None:
        return run.probe
    split = run.splits.train
    index = torch.linspace(0, len(split) - 1, min(PROBE, len(split))).long()
    return split.batch(index).to(next(run.target.parameters()).device)


def _arrows(shapes: list[tuple[int, ...]]) -> str:
    return " -> ".join("x".join(str(size) for size in shape) for shape in shapes)
