"""The embeddable unit: (student, batch) -> (loss, metrics). No loop, no optimizer, no device.

In a trainer of your own::

    step = DistillStep("kd", student=student, teacher=teacher, probe=next(iter(loader)))
    for batch in loader:
        loss, metrics = step(student, batch)
        loss.backward()
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.api import Auxiliary
from stillhouse.contract.batch import Batch
from stillhouse.contract.context import STUDENT, TARGET, TEACHER, RunContext, Stage, StepInfo
from stillhouse.contract.outputs import LossTerm, StudentOut, Targets, TeacherOut
from stillhouse.contract.splits import Splits
from stillhouse.errors import ConfigError, Diverged, PluginError, StillhouseError, nearest
from stillhouse.models.calling import forward
from stillhouse.models.captures import Captures
from stillhouse.models.integrity import checksum, freeze, versions
from stillhouse.plugin.dispatch import Plugin, Plugins
from stillhouse.plugin.load import MethodLike, as_plugins
from stillhouse.plugin.watch import UPDATES, check_kept, guarded, watched
from stillhouse.softlabels import SoftLabels
from stillhouse.training.compatibility import OFFERED, check_fit, outputs


class DistillStep:
    """One method, or several, at work on one student.

    method
        A name, ``{"name": ..., setting: ...}``, a Method, or a list of these, in order.
    student, teacher, target
        Modules. The teacher is frozen: no gradient, eval mode. ``target``: another model to end with.
    probe
        A few rows of the data (a Batch, ``(inputs, labels)`` or inputs) on the models' device: shapes
        are found with it, and whether the teacher is deterministic.
    splits
        The data where the caller has it whole; methods that need more than batches ask for it.
    steps
        Student updates of the whole run; stages share them.
    offers
        Capabilities of the surrounding trainer.
    build
        How methods make further models by name; see RunContext.

    Raises PluginError for a plugin that can't be trusted and ConfigError where capabilities, outputs
    or features don't fit, all of it here, before the first step.
    """

    def __init__(
        self,
        method: MethodLike | Sequence[MethodLike | Plugin],
        *,
        student: nn.Module,
        probe: Any,
        teacher: nn.Module | None = None,
        target: nn.Module | None = None,
        splits: Splits | None = None,
        steps: int = 1,
        batch_size: int = 1,
        seed: int = 0,
        dir: Path | None = None,
        offers: Iterable[str] = OFFERED,
        say: Callable[[str], None] = lambda message: None,
        build: Callable[[Mapping[str, Any]], nn.Module] | None = None,
    ) -> None:
        loaded = (
            isinstance(method, list) and bool(method) and all(isinstance(item, Plugin) for item in method)
        )
        self.plugins = Plugins(method if loaded else as_plugins(method))  # type: ignore[arg-type]
        models = {STUDENT: student} if target is None else {STUDENT: student, TARGET: target}
        if teacher is not None:
            _refuse_shared(models, teacher)
        self.teacher = None if teacher is None else freeze(teacher)
        watched = models if teacher is None else {**models, TEACHER: teacher}
        probe = as_batch(probe)
        self.captures = Captures(watched)
        self.run = RunContext(
            models,
            self.teacher,
            splits,
            probe,
            steps,
            batch_size,
            seed,
            dir,
            self.captures,
            say=say,
            build=build,
            look=self._look,
            method_names=tuple(plugin.name for plugin in self.plugins.plugins),
            with_losses=self.plugins.implementing("loss_terms"),
        )
        self._count = None if teacher is None else teacher.register_forward_pre_hook(self._called)
        self._teacher_version = 0 if teacher is None else versions(teacher)
        self._teacher_bits = 0 if teacher is None else checksum(teacher)
        self.teacher_calls = 0
        try:
            self._set_up(probe, models, frozenset(offers))
        except BaseException:
            self.close()  # a refused plugin leaves no hook on models that others go on using
            raise

    def _set_up(self, probe: Batch, models: dict[str, nn.Module], offers: frozenset[str]) -> None:
        check_fit(self.plugins, models, self.teacher, probe, splits=self.run.splits, offers=offers)
        self.plugins.wrap(lambda call: guarded(call, self.run))
        self.plugins.notify("on_run_start", run=self.run)
        self.auxiliary = self.plugins.auxiliary_modules(self.run)
        for name, auxiliary in self.auxiliary.items():
            models[name] = auxiliary.module
            self.captures.offer(name, auxiliary.module)
        self.trainable = {
            name: [parameter for parameter in model.parameters() if parameter.requires_grad]
            for name, model in models.items()
        }
        self.stages = self._checked(self.plugins.stages(self.run))
        self.plugins.wrap(None)
        self.check_teacher()
        self.teacher_calls = 0
        self.info = StepInfo()
        self._open = 0
        self._kept: SoftLabels | None = None
        self._stand_in: nn.Module | None = self.teacher
        self._watched = 0
        self.begin(self.stages[0])

    # One step, as the paper writes it.

    def __call__(self, student: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch, and its named terms detached.

        student
            The stage's model, or a wrapper of it (DistributedDataParallel), called as a whole.
        batch
            A Batch, ``(inputs, labels)`` or inputs. Unless ``begin_update`` said otherwise, it is one
            whole update.

        Returns the loss, a scalar with a graph: summed over the update's micro-batches it is the mean
        over the update's valid rows. And the terms by ``plugin.term``, and ``loss``.
        """
        batch = as_batch(batch)
        if not self._open:
            self.begin_update([batch])
        step = self.info
        step.share = batch.rows / step.rows if step.micros > 1 else 1.0
        batch = self.plugins.batch_transform(batch, step)
        with torch.no_grad():
            teacher_out = self._teacher_out(batch)
            soft = None if teacher_out is None else teacher_out.logits
            targets = self.plugins.label_transform(Targets(batch.labels, soft), batch, teacher_out, step)
        student_out = self._student_out(student, batch)
        try:
            terms = self.plugins.loss_terms(student_out, teacher_out, targets, batch, step)
        except ValueError as error:
            _diverged(error, student_out, step)
            raise
        loss = _total(terms := self.plugins.combine_terms(terms, step))
        self._open -= 1
        metrics = {name: term.value.detach() for name, term in terms.items()}
        metrics["loss"] = loss.detach()
        return loss, metrics

    def begin_update(self, batches: Sequence[Batch]) -> None:
        """Say which micro-batches make up the next update: their rows are what the loss divides by."""
        rows = sum(batch.rows for batch in batches)
        self.info.rows = max(rows, 1.0)
        self.info.labelled = sum(batch.labelled for batch in batches)
        self.info.micro, self.info.micros = 0, len(batches)
        self._open = len(batches)
        if self._watched <= UPDATES:
            self._watch()

    def end_update(self, metrics: Mapping[str, Tensor]) -> None:
        """Tell the plugins, and move on by one update."""
        self.plugins.on_step_end(self.info, metrics)
        self.info.index += 1
        self.info.stage_index += 1

    def _teacher_out(self, batch: Batch) -> TeacherOut | None:
        if self.info.stage.teacher is None:
            return None
        if self._kept is not None:
            if batch.ids is None:
                raise ConfigError("kept soft labels are found by sample id; got a batch without ids")
            return TeacherOut(self._kept.targets(batch.ids))
        given = self.plugins.teacher_forward(self._stand_in, batch, self.info)
        if given is not None:
            return given
        if self._stand_in is None:
            return None
        logits = forward(self._stand_in, batch.for_teacher)
        return TeacherOut(logits, self.captures.take(TEACHER))

    def _student_out(self, student: nn.Module, batch: Batch) -> StudentOut | None:
        name = self.info.stage.model
        if name is None:
            return None
        return StudentOut(forward(student, batch.inputs), self.captures.take(name))

    def _watch(self) -> None:
        """Look at what the plugins do to what they are handed, in the first updates of a stage."""
        if self._watched:
            self.check_teacher()
        for plugin in self.plugins.plugins if self._watched else ():
            check_kept(plugin)
        first, done = self._watched == 0, self._watched == UPDATES
        if first or done:
            self.plugins.wrap(None if done else lambda call: watched(call, self.teacher))
        self._watched += 1

    def idle(self) -> PluginError:
        """The refusal of a loss that no weight of the stage has a part in, naming who gave its terms."""
        giving = self.plugins.implementing("loss_terms")
        who = ", ".join(str(plugin) for plugin in self.plugins.plugins if plugin.name in giving)
        return PluginError(
            f"the loss of stage '{self.info.stage.name}' has no gradient, with terms of {who}; expected one that "
            "depends on what the stage trains: compute it from student_out, with no detach() or item()"
        )

    def _look(self, role: str, batch: Batch) -> StudentOut:
        """A model's outputs and features, in eval mode and without a graph."""
        model = self.teacher if role == TEACHER else self.run.models.get(role)
        if model is None:
            raise ConfigError(f"outputs of '{role}': no such model{nearest(role, self.run.models)}")
        logits = outputs(model, batch.for_teacher if role == TEACHER else batch.inputs)
        return StudentOut(logits, self.captures.take(role))

    # Stages.

    def begin(self, stage: Stage, steps: int = 0, kept: SoftLabels | None = None) -> None:
        """Set up a stage: what is trained and frozen, and who stands where the teacher does.

        kept
            Soft labels of the stage's split, read in place of a call. Without them, a stage against a
            model's outputs keeps a frozen copy of that model.
        """
        self.info.stage, self.info.stage_index, self.info.stage_steps = stage, 0, steps
        self._watched = 0
        trained = self.trained(stage)
        for name, model in self.run.models.items():
            model.train(name in trained)
            for parameter in self.trainable[name]:
                parameter.requires_grad_(False)
        for name in trained:
            self.run.models[name].train()
            for parameter in self.trainable[name]:
                parameter.requires_grad_(True)
        self._kept = kept
        self._stand_in = self.teacher
        if kept is None and stage.teacher not in (TEACHER, None):
            self._stand_in = freeze(copy.deepcopy(self.run.models[str(stage.teacher)]))

    @property
    def stand_in(self) -> nn.Module | None:
        """The frozen copy of a model that stands where the teacher does; None where the teacher itself does."""
        return None if self._stand_in is self.teacher else self._stand_in

    def trained(self, stage: Stage) -> tuple[str, ...]:
        """Names of the modules that a stage trains."""
        if stage.train is not None:
            return stage.train
        return (*((stage.model,) if stage.model else ()), *self.auxiliary)

    def options(self, name: str) -> Mapping[str, float]:
        """Optimizer options of a module's own."""
        return self.auxiliary.get(name, Auxiliary(nn.Identity())).options

    def model(self, stage: Stage | None = None) -> nn.Module:
        """The model whose outputs the stage's losses read; the student where they read none."""
        return self.run.models[(stage or self.info.stage).model or STUDENT]

    def check_teacher(self) -> None:
        """Raise if anything wrote to the frozen teacher, or made it another than frozen. One pass over its weights."""
        if self.teacher is None:
            return
        loose = [f"'{name}'" for name, weight in self.teacher.named_parameters() if weight.requires_grad]
        if loose or any(module.training for module in self.teacher.modules()):
            what = f"unfroze the teacher's {loose[0]}" if loose else "put the teacher into train mode"
            who = ", ".join(str(plugin) for plugin in self.plugins.plugins)
            raise ConfigError(
                f"one of {who} {what}; a teacher stays frozen and in eval mode: copy it to train it"
            )
        if versions(self.teacher) != self._teacher_version or checksum(self.teacher) != self._teacher_bits:
            who = ", ".join(str(plugin) for plugin in self.plugins.plugins)
            raise ConfigError(
                f"the teacher's weights or buffers were written to, by one of: {who}; "
                "a teacher stays as it is, bit for bit: copy it to train it"
            )

    def close(self) -> None:
        """Remove the hooks from the models; what a stage froze can be trained again."""
        for parameters in getattr(self, "trainable", {}).values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        self.captures.close()
        if self._count is not None:
            self._count.remove()

    def _called(self, module: nn.Module, given: Any) -> None:
        self.teacher_calls += 1

    def _checked(self, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        for stage in stages:
            for name in (*(stage.train or ()), stage.model, stage.teacher):
                if name not in (None, TEACHER, *self.run.models):
                    known = ", ".join(self.run.models)
                    raise ConfigError(f"stage '{stage.name}' names '{name}'; known models: {known}")
        return stages


def _diverged(error: ValueError, student_out: StudentOut | None, step: StepInfo) -> None:
    """Raise Diverged in place of an error of a loss whose cause is that the model's outputs are not finite."""
    if isinstance(error, StillhouseError) or student_out is None or student_out.logits.isfinite().all():
        return
    where = "; ".join(getattr(error, "__notes__", [])) or "in a loss term"
    raise Diverged(
        f"the outputs of the {step.stage.model} are not finite in update {step.index}, found {where} ({error}). The "
        "last checkpoint is kept: lower optimizer.lr, or set clip"
    ) from error


def _refuse_shared(models: Mapping[str, nn.Module], teacher: nn.Module) -> None:
    frozen = {id(parameter) for parameter in teacher.parameters()}
    for role, model in models.items():
        for name, parameter in model.named_parameters():
            if id(parameter) in frozen:
                raise ConfigError(
                    f"the {role}'s '{name}' is the same tensor as one of the teacher's, which stays frozen; "
                    "expected models of their own: copy.deepcopy one of them"
                )


def _total(terms: Mapping[str, LossTerm]) -> Tensor:
    if not terms:
        raise ConfigError("no plugin gave a loss term for this step; expected at least one")
    total: Tensor | None = None
    for term in terms.values():
        # 1.0 * x is x: skip it, it costs a kernel and a node in the graph
        value = (
            term.value if isinstance(term.weight, float) and term.weight == 1.0 else term.weight * term.value
        )
        total = value if total is None else total + value
    assert total is not None
    return total


def as_batch(given: Any) -> Batch:
    """A Batch from a Batch, ``(inputs, labels)``, ``(inputs,)`` or inputs."""
    if isinstance(given, Batch):
        return given
    if isinstance(given, tuple | list):
        return Batch(given[0], given[1] if len(given) > 1 else None)
    if isinstance(given, Mapping) and "labels" in given:
        return Batch({name: value for name, value in given.items() if name != "labels"}, given["labels"])
    return Batch(given)
