"""Task-conditioned distillation: a specialist for each task, one network of them, refined on every task.

The name TCMD stands in no published paper; this is our reading of its source text, grounded in MT-DNN
distillation (Liu et al. 2019, arXiv:1904.09482), BAM (Clark et al. 2019, arXiv:1907.04829), knowledge
amalgamation (Shen et al. 2019, arXiv:1811.02796) and UHC (Vongkulbhisal et al. 2019, arXiv:1904.06062).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import (
    IGNORE,
    Batch,
    ConfigError,
    Conformance,
    LossTerm,
    Method,
    MethodConfig,
    RunContext,
    Split,
    Stage,
    StepInfo,
    StudentOut,
    Targets,
    cross_entropy,
    hookimpl,
)
from stillhouse_tcmd import losses, partition
from stillhouse_tcmd.networks import ABSENT, CombinedNetwork, Router, Specialist, check_ids, membership
from stillhouse_tcmd.report import write
from stillhouse_tcmd.setup import built, fresh, task_ids, tasks_of

SPECIALIST, ROUTER, NETWORK = "specialist", "router", "network"


class TCMDConfig(MethodConfig):
    """Settings of TCMD."""

    tasks: int | tuple[tuple[int, ...], ...] | None = Field(
        None,
        description="The classes of each task; or into how many tasks the classes are grouped by what the teacher "
        "confuses; default: the teacher's own list where the data carry task ids, else the root of the classes' "
        "number.",
    )
    network: Literal["shared", "side_by_side"] = Field(
        "shared",
        description="What the specialists become: one network with a shared trunk, or all of them, joined.",
    )
    specialist: dict[str, Any] | None = Field(
        None,
        description="A student's name and arguments, to build each specialist and the router; default: the "
        "student's own architecture.",
    )
    gate: Literal["router", "merge"] = Field(
        "router",
        description="side_by_side without task ids: a learned router; merge: for tasks that share classes.",
    )
    temperature: float = Field(4.0, gt=0, description="T of both softmaxes; the loss is multiplied by T^2.")
    alpha: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Weight of the soft labels; 1 - alpha is the labels', where a row has one.",
    )
    annealing: bool = Field(
        False, description="Stage refine: rows with a label go from soft labels alone to the label alone."
    )
    sampling_temperature: float = Field(
        4 / 3,
        ge=1,
        description="Task k is drawn in proportion to size_k ** (1 / this) in combine and refine.",
    )
    unlabelled: bool = Field(True, description="Train on the unlabelled split too, where the task has one.")
    shares: tuple[float, float, float] = Field(
        (1.0, 1.0, 6.0), description="Relative lengths of specialise (all tasks together), combine, refine."
    )


class TCMD(Method):
    """Learn the teacher's tasks one by one, combine the small networks, refine the whole.

    ``specialise-k``: specialist k, a network like the student, learns task k from the teacher's softmax over that
    task's classes alone. ``combine``: a shared network learns from the specialists; or, with the specialists
    side by side and no task ids, the router learns (with nothing to learn, there is no such stage). ``refine``:
    the combined network is distilled from the teacher on all tasks.

    Where the data carry ids in ``extra["task"]`` a row belongs to that task, and a row of -1 to every one. Where
    they carry none, the tasks part one softmax, and with the task marginals pi of the teacher
    ``KL(p || q) = KL(pi || rho) + sum_k pi_k KL(p_k || q_k)``: specialist k minimises its summand.
    """

    api_version = 1
    Config = TCMDConfig
    requires = frozenset({"logits"})
    writes = ("tasks.json",)
    conformance = Conformance(settings={"tasks": [[0, 1], [2, 3, 4]], "shares": [2.0, 1.0, 1.0]})
    config: TCMDConfig

    # Set-up.

    @hookimpl
    def on_run_start(self, run: RunContext) -> None:
        assert run.probe is not None
        self._name = run.caller
        self._exclusive = "task" not in run.probe.extra
        self.outputs = int(run.outputs("teacher").logits.shape[-1])
        self.tasks = tasks_of(run, self.config.tasks, self.outputs, merge=self.config.gate == "merge")
        self._members = membership(self.tasks, self.outputs)
        self._check(run)
        run.chose("network", self.config.network, self._conditioned())

    def _conditioned(self) -> str:
        if not self._exclusive:
            return "conditioned on the task ids that the data carry"
        if self.config.network == "shared":
            return "no task ids: its own task marginals are the router"
        return f"no task ids: {self.config.gate}"

    def _check(self, run: RunContext) -> None:
        config = self.config
        if config.gate == "merge" and (config.network == "shared" or not self._exclusive):
            raise ConfigError(
                f"{run.caller}.gate is merge, which joins specialists side by side where no task ids are given; expected "
                "network: side_by_side and data without task ids: use gate: router"
            )
        if self._exclusive:
            return
        parts = [("batch", run.probe.extra["task"])] if run.probe is not None else []
        if run.splits is not None:
            parts = [
                (name, ids) for name, split in run.splits.items() if (ids := task_ids(split)) is not None
            ]
        for name, ids in parts:
            check_ids(ids, len(self.tasks), f"the {name} split" if run.splits is not None else "the batch")

    @hookimpl
    def auxiliary_modules(self, run: RunContext) -> dict[str, nn.Module]:
        config = self.config
        small = run.student if config.specialist is None else built(run, config.specialist)
        specialists = [
            Specialist(fresh(small, run.seed + number), own, self.outputs)
            for number, own in enumerate(self.tasks)
        ]
        routed = self._exclusive and config.network == "side_by_side" and config.gate == "router"
        self._router = Router(fresh(small, run.seed + len(self.tasks)), self.tasks) if routed else None
        device = next(run.target.parameters()).device
        self._members = self._members.to(device)
        self._specialists = [specialist.to(device) for specialist in specialists]
        self.network = CombinedNetwork(
            [run.target] if config.network == "shared" else specialists,
            self.tasks,
            self.outputs,
            exclusive=self._exclusive,
            router=self._router,
            merge=config.gate == "merge",
        ).to(device)
        made: dict[str, nn.Module] = {f"specialist{number}": part for number, part in enumerate(specialists)}
        if self._router is not None:
            made["router"] = self._router
        return {**made, "network": self.network}

    @hookimpl
    def stages(self, run: RunContext) -> list[Stage]:
        specialise, combine, refine = self.config.shares
        data: Literal["all", "labelled"] = "labelled"
        if self.config.unlabelled and run.splits is not None and run.splits.unlabelled is not None:
            data = "all"
        found = []
        for number in range(len(self.tasks)):
            name = f"{SPECIALIST}{number}"
            share = specialise / len(self.tasks)
            found.append(Stage(f"specialise-{number}", share, data=data, model=name, train=(name,)))
        if self.config.network == "shared":
            teacher = "teacher" if self._exclusive else None
            found.append(
                Stage("combine", combine, data=data, model=NETWORK, train=(NETWORK,), teacher=teacher)
            )
        elif self._router is not None:
            found.append(Stage("combine", combine, data=data, model=NETWORK, train=(ROUTER,)))
        else:
            run.chose("combine", "no stage", "specialists side by side with nothing between them to learn")
        return [*found, Stage("refine", refine, data=data, model=NETWORK, train=(NETWORK,))]

    @hookimpl
    def stage_rows(self, run: RunContext, stage: Stage, split: Split) -> Tensor | None:
        if self._exclusive:
            return None
        ids = task_ids(split)
        assert ids is not None
        if not stage.name.startswith("specialise"):
            return partition.sampled(ids, len(self.tasks), self.config.sampling_temperature)
        number = _number(stage)
        rows = ((ids == number) | (ids < 0)).nonzero()[:, 0]
        if not len(rows):
            raise ConfigError(
                f"task {number} has no row in the {stage.data} data; expected some, or drop the task"
            )
        return rows

    # The losses.

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        logits = student_out.logits
        if info.stage.name.startswith("specialise"):
            return self._specialise(logits, targets, batch, info)
        if info.stage.name == "combine":
            return self._combine(logits, targets, batch, info)
        return self._refine(logits, targets, batch, info)

    def _specialise(
        self, logits: Tensor, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        number, temperature = _number(info.stage), self.config.temperature
        rows = losses.restricted(logits, targets.dense, self.tasks[number], temperature, batch.mask)
        if self._exclusive:
            rows = rows * losses.task_weights(targets.dense, self.tasks, temperature)[..., number]
        labels, soft = targets.labels, targets.probabilities
        if soft is not None:
            soft = soft * self._members[number]
        elif labels is not None:
            labels = labels.where(self._members[number][labels.clamp(min=0)] & (labels != IGNORE), IGNORE)
        own = replace(targets, labels=labels, probabilities=soft)
        return self._blend(rows, logits, own, batch, info, self.config.alpha)

    def _combine(self, logits: Tensor, targets: Targets, batch: Batch, info: StepInfo) -> dict[str, LossTerm]:
        temperature, mask = self.config.temperature, batch.mask
        if (
            self._router is not None
        ):  # only the router is trained; the specialists' part of the loss is constant
            return {"kd": LossTerm(info.mean(losses.whole(logits, targets.dense, temperature, mask), mask))}
        taught = self._taught(batch)
        if not self._exclusive:
            rows = losses.by_task(logits, taught, self.tasks, self._ids(batch, info), temperature, mask)
            return {"kd": LossTerm(info.mean(rows, mask))}
        weights = losses.task_weights(targets.dense, self.tasks, temperature)
        rows = logits.new_zeros(logits.shape[:-1], dtype=torch.float32)
        for number, own in enumerate(self.tasks):
            part = losses.restricted(logits, taught, own, temperature, mask)
            rows = rows + weights[..., number] * part
        route = losses.routing(logits, targets.dense, self.tasks, temperature, mask)
        return {"kd": LossTerm(info.mean(rows, mask)), "route": LossTerm(info.mean(route, mask))}

    def _refine(self, logits: Tensor, targets: Targets, batch: Batch, info: StepInfo) -> dict[str, LossTerm]:
        temperature, alpha = self.config.temperature, self.config.alpha
        if self._exclusive:
            rows = losses.whole(logits, targets.dense, temperature, batch.mask)
        else:
            ids = self._ids(batch, info)
            rows = losses.by_task(logits, targets.dense, self.tasks, ids, temperature, batch.mask)
        if self.config.annealing:
            alpha = 1 - info.stage_index / max(info.stage_steps - 1, 1)
        if targets.has_labels and not self._exclusive:
            logits = self._asked(logits, targets, info)
        return self._blend(rows, logits, targets, batch, info, alpha)

    def _blend(
        self, rows: Tensor, logits: Tensor, targets: Targets, batch: Batch, info: StepInfo, alpha: float
    ) -> dict[str, LossTerm]:
        """``alpha`` of the soft labels and ``1 - alpha`` of the label; rows without one have all of the former."""
        labels = targets.labels if targets.probabilities is None else targets.probabilities
        if labels is None or alpha == 1:
            return {"kd": LossTerm(info.mean(rows, batch.mask))}
        known = 1.0 * (labels != IGNORE) if targets.probabilities is None else labels.sum(-1)
        weight = 1 - (1 - alpha) * known
        # Divided by all rows, as the soft part is: a row's two weights then sum to 1.
        ce = cross_entropy(logits, labels, count=info.rows, mask=batch.mask)
        return {"kd": LossTerm(info.mean(rows * weight, batch.mask)), "ce": LossTerm(ce, 1 - alpha)}

    def _asked(self, logits: Tensor, targets: Targets, info: StepInfo) -> Tensor:
        """The logits with the classes of other tasks than the label's absent."""
        labels = targets.labels
        if labels is None:
            raise ConfigError(
                f"{info.caller}: got class probabilities from an earlier plugin, and tasks with heads of their own; expected "
                "class labels there: leave out mixup and label_smoothing"
            )
        owner = self._members[:-1].int().argmax(0)[labels.clamp(min=0)]
        owner = owner.where(labels != IGNORE, -1)
        return logits.where(self._members[owner], logits.new_full((), ABSENT))

    def _ids(self, batch: Batch, info: StepInfo) -> Tensor:
        ids = batch.extra.get("task")
        if ids is None:
            raise ConfigError(
                f"{info.caller}: got a batch without extra['task'], and others had it; expected it in each"
            )
        return ids

    def _taught(self, batch: Batch) -> Tensor:
        """What the frozen specialists say, each of its own task's classes ``(B, C)``."""
        named = batch.inputs if isinstance(batch.inputs, Mapping) else {"inputs": batch.inputs}
        inputs = {name: value for name, value in named.items() if name != "task"}
        with torch.no_grad():
            answers = [part.own_logits(**inputs) for part in self._specialists]
            taught = answers[0].new_full((*answers[0].shape[:-1], self.outputs), ABSENT)
            for own, logits in zip(self.tasks, answers, strict=True):
                taught[..., own] = logits
        return taught

    # What lasts, and what is shown.

    @hookimpl
    def on_run_end(self, run: RunContext) -> None:
        write(run, self.network, self.tasks, exclusive=self._exclusive)

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return {"tasks": [list(own) for own in self.tasks]}

    @hookimpl
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["tasks"] != self.tasks:
            raise ConfigError(
                f"{self._name}: the checkpoint was made with the tasks {state['tasks']}, this run found {self.tasks}; "
                "expected the same: give them in the config"
            )


def _number(stage: Stage) -> int:
    return int(stage.name.removeprefix("specialise-"))
