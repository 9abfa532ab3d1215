"""Hybrid loss: classification error, inference error and other methods' terms, with weights that are learned.

The name HLDM stands in no published paper; this is our reading of its source text, grounded in uncertainty
weighting (Kendall et al. 2018), GradNorm (Chen et al. 2018) and dynamic weight averaging (Liu et al. 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.api import (
    CLASS_KINDS,
    Auxiliary,
    Batch,
    ConfigError,
    Diverged,
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
    soft_and_label_terms,
    soft_loss,
)
from stillhouse_hldm.history import History
from stillhouse_hldm.weighting import DWA, Fixed, GradNorm, Part, Simplex, Uncertainty, Weighting

POINTS = 400
"""How many points the plot of the weights has."""


class HLDMConfig(MethodConfig):
    """Settings of HLDM."""

    weighting: Literal["uncertainty", "gradnorm", "dwa", "fixed", "simplex"] = Field(
        "uncertainty", description="How the weights are found."
    )
    terms: tuple[Literal["ce", "kd"], ...] | None = Field(
        None, description="Terms of its own; default: both where it is the run's only method, else none."
    )
    data: Literal["labelled", "unlabelled", "all"] | None = Field(
        None,
        description="What its own stage trains on; default: all for classes, labelled for regression. "
        "Beside other methods it has no stage of its own.",
    )
    temperature: float = Field(4.0, gt=0, description="T of its own term kd, which is multiplied by T^2.")
    weights: dict[str, float] = Field(
        default_factory=dict,
        description="fixed: weights by the term's name, as in {hldm.kd: 0.9}; default 1.",
    )
    scales: dict[str, float] = Field(
        default_factory=dict,
        description="uncertainty: what a term is divided by where it is balanced, by name; default: T^2 for hldm.kd.",
    )
    bound: float = Field(5.0, gt=0, description="uncertainty: greatest |s|; weights lie in exp(-s).")
    alpha: float = Field(
        1.5, ge=0, description="gradnorm: pull towards equal training rates; 0: equal norms."
    )
    layer: str | None = Field(
        None,
        description="gradnorm: the module whose parameters the norms are taken at; default: the whole model.",
    )
    window: int = Field(100, gt=0, description="dwa: updates in one mean.")
    dwa_temperature: float = Field(2.0, gt=0, description="dwa: T of the softmax; large: equal weights.")
    entropy: float | None = Field(
        None, gt=0, description="simplex: tau, weight of the entropy; has no default."
    )
    lr: float | None = Field(None, gt=0, description="Learning rate of the weights; default: the run's.")

    @model_validator(mode="after")
    def _no_collapse(self) -> HLDMConfig:
        if self.weighting == "simplex" and self.entropy is None:
            raise ValueError(
                "weighting is simplex without entropy, which puts all weight on the smallest loss and ignores the "
                "others; expected entropy above 0 (near the losses' size), or weighting: uncertainty"
            )
        if self.weights and self.weighting != "fixed":
            raise ValueError(
                f"weights are given, and weighting {self.weighting} finds its own; set weighting: fixed"
            )
        return self


class HLDM(Method):
    """``sum_i w_i L_i`` over the terms of every method of the run, w_i from ``weighting``.

    Its own terms are CE with the labels (squared error for regression) and ``T^2 KL(teacher || student)``.
    L_i is a term times the weight that its method gave it. The parameters of the weighting train on a loss in
    which the terms are constants, and the student on one in which the weights are.
    """

    api_version = 1
    Config = HLDMConfig
    supports = CLASS_KINDS | {"regression", "multi_label", "different_outputs"}
    writes = ("weights.json", "weights.png")
    config: HLDMConfig

    def __init__(self, config: HLDMConfig | None = None) -> None:
        super().__init__(config)
        self.weighting = self._make()
        self.history = History()

    def _make(self) -> Weighting:
        config = self.config
        if config.weighting == "uncertainty":
            return Uncertainty(config.bound, config.scales)
        if config.weighting == "gradnorm":
            return GradNorm(config.alpha)
        if config.weighting == "dwa":
            return DWA(config.window, config.dwa_temperature)
        if config.weighting == "simplex":
            assert config.entropy is not None
            return Simplex(config.entropy)
        return Fixed(config.weights)

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        self._run, self._checked = run, False
        if isinstance(self.weighting, Uncertainty):  # T^2 inflates the KD term: balanced as it is without
            self.weighting.scales.setdefault(f"{run.caller}.kd", self.config.temperature**2)
        self._alone = len(run.with_losses) < 2  # transforms beside it bring no terms
        own: tuple[Literal["ce", "kd"], ...] = ("ce", "kd") if self._alone else ()
        self._terms = own if self.config.terms is None else self.config.terms
        if self.config.terms is None:
            why = "the run has no other method" if self._alone else "the run's other methods bring terms"
            run.chose("terms", list(self._terms), why)
        for name in (*self.config.weights, *self.config.scales):
            if name.partition(".")[0] not in run.method_names:
                raise ConfigError(
                    f"hldm: '{name}' names a term of no method of this run ({', '.join(run.method_names)}); expected "
                    "METHOD.TERM, as in kd.kl"
                )
        self._check_layer(run)
        self._every = max(1, run.steps // POINTS)
        self._floats = run.kind.labels in ("numbers", "flags")

    def _check_layer(self, run: RunContext) -> None:
        layer, names = self.config.layer, [name for name, _ in run.target.named_modules() if name]
        if layer is not None and layer not in names:
            raise ConfigError(
                f"hldm.layer: no module '{layer}' in {type(run.target).__name__}; expected one of {', '.join(names)}"
            )

    @hookimpl
    def stages(self, run: RunContext) -> list[Stage] | None:
        if self._alone:
            data = self.config.data or ("labelled" if self._floats else "all")
            return [Stage("train", data=data, model=run.target_name)]
        if self.config.data is not None:
            raise ConfigError(
                f"hldm.data is {self.config.data}, and {', '.join(run.method_names)} run together; expected it for "
                "hldm alone: methods that stand together train on what they say"
            )
        return None

    @hookimpl
    def auxiliary_modules(self, run: RunContext) -> dict[str, nn.Module | Auxiliary]:
        options = {"weight_decay": 0.0} | ({} if self.config.lr is None else {"lr": self.config.lr})
        return {"weights": Auxiliary(self.weighting, options, torch.float32)}

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        logits, temperature = student_out.logits, self.config.temperature
        labels = "ce" in self._terms and targets.has_labels
        soft = "kd" in self._terms and targets.soft is not None
        if labels and soft:
            kd, ce = self._expected(info.caller)
            both = soft_and_label_terms(
                logits, targets, batch, info, temperature=temperature, soft_weight=kd, label_weight=ce
            )
            return {"ce": LossTerm(both["ce"].value), "kd": LossTerm(both["kl"].value)}
        found = {}
        if labels:
            found["ce"] = LossTerm(label_loss(logits, targets, batch, info))
        if soft:
            found["kd"] = LossTerm(soft_loss(logits, targets, batch, info, temperature=temperature))
        return found

    def _expected(self, own: str) -> tuple[float, float]:
        """The weights that ``combine_terms`` will give kd and ce, most likely: gradients of these come in one pass."""
        names = (f"{own}.kd", f"{own}.ce")
        if not set(names) <= set(self.weighting.names):
            return 1.0, 1.0
        kd, ce = self.weighting.weights(self.weighting.slots(names)).tolist()
        return kd or 1.0, ce or 1.0

    @hookimpl
    def combine_terms(self, terms: dict[str, LossTerm], info: StepInfo) -> Mapping[str, LossTerm]:
        if not terms:
            return terms
        names = list(terms)
        losses = [term.weight * term.value for term in terms.values()]
        constant = torch.stack([loss.detach().float() for loss in losses])
        self._check(names, constant, info)
        if (
            info.micro == 0 and torch.is_grad_enabled()
        ):  # an evaluation in the middle of an update changes nothing
            self.weighting.prepare()
        slots = self.weighting.slots(names).to(constant.device)
        weights = self.weighting.weights(slots).to(constant.device)
        combined = {
            name: LossTerm(term.value, weight * term.weight)
            for (name, term), weight in zip(terms.items(), weights, strict=True)
        }
        if torch.is_grad_enabled():
            part = Part(slots, constant, info.share, info.last, lambda: self._gradients(losses, info))
            objective = self.weighting.objective(part)
            if objective is not None:
                loss, own = objective
                # The terms are in the sum already: this one adds its gradient and its own part.
                combined[f"{info.caller}.balance"] = LossTerm(loss - loss.detach() + own.detach())
        for name, weight in zip(names, weights, strict=True):
            info.log(f"weight.{name}", weight * info.share)
        return combined

    def _check(self, names: list[str], losses: Tensor, info: StepInfo) -> None:
        """Stop at a term that is not finite, before its gradient reaches anything; name unknown weights."""
        if losses.device.type == "cpu" and not torch.isfinite(losses).all():
            bad = [f"{name} = {value}" for name, value in zip(names, losses.tolist(), strict=True)]
            bad = [item for item, fine in zip(bad, torch.isfinite(losses).tolist(), strict=True) if not fine]
            raise Diverged(
                f"hldm: got a loss term that is not finite in update {info.index}: {', '.join(bad)}; the student is "
                "as it was before, and the last checkpoint is kept. Lower optimizer.lr, set clip, or look at the "
                "inputs of that term"
            )
        if self._checked:
            return
        self._checked = True
        for name in (*self.config.weights, *self.config.scales):
            # A method with stages of its own may bring the term later.
            if name not in names and info.stage.name == "train":
                raise ConfigError(f"hldm: '{name}' is no term of this run; its terms are {', '.join(names)}")

    def _gradients(self, losses: list[Tensor], info: StepInfo) -> list[list[Tensor]]:
        """Each term's gradient at the model's, or the chosen layer's, trained parameters."""
        model = self._run.models[info.stage.model or self._run.target_name]
        if self.config.layer is not None:
            model = dict(model.named_modules()).get(self.config.layer, model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [
            list(torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True))
            if loss.requires_grad
            else [torch.zeros_like(parameter) for parameter in parameters]
            for loss in losses
        ]

    @hookimpl
    def on_update_end(self, info: StepInfo, metrics: Mapping[str, Tensor]) -> None:
        self.weighting.observe(metrics)
        if info.index % self._every == 0:
            shown = {name: float(metrics[f"{info.caller}.weight.{name}"]) for name in self.weighting.names
                     if f"{info.caller}.weight.{name}" in metrics}  # fmt: skip
            self.history.add(info.index, info.stage.name, shown)

    @hookimpl
    def on_run_end(self, run: RunContext) -> None:
        if run.dir is not None:
            self.history.write(run.dir, self.config.weighting)

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return {"names": list(self.weighting.names), "history": list(self.history.rows)}

    @hookimpl
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weighting.names = list(state["names"])
        self.history.rows = list(state["history"])
