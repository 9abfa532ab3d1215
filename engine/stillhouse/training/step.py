"""The embeddable unit: a student and a batch give a loss, its terms and the student's outputs.

No loop, no optimizer. ``stillhouse.Distillation(...).attach(student, ...)`` makes one::

    with distillation.attach(student, probe=batch, steps=1000) as step:
        optimizer = torch.optim.AdamW(step.parameter_groups(), lr=1e-3)
        for batch in loader:
            loss, metrics = step(student, batch)
            loss.backward()
            optimizer.step()
            step.zero_grad()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from stillhouse.contract.batch import Batch
from stillhouse.contract.context import STUDENT, TARGET, RunContext, Stage, StepInfo
from stillhouse.contract.kinds import TaskKind, kind_of
from stillhouse.contract.outputs import StudentOut, Targets
from stillhouse.contract.splits import Splits
from stillhouse.errors import CheckpointError, ConfigError, PluginError
from stillhouse.models.calling import unwrapped
from stillhouse.models.captures import Captures
from stillhouse.models.heads import Heads
from stillhouse.models.integrity import StillHeld
from stillhouse.plugin.dispatch import Plugin, Plugins
from stillhouse.plugin.load import MethodLike, as_plugins
from stillhouse.plugin.watch import UPDATES, check_kept, guarded, watched
from stillhouse.softlabels import SoftLabels
from stillhouse.training.answers import Answers
from stillhouse.training.compatibility import EMBEDDED, check_fit, check_stages, row_shape
from stillhouse.training.host import StepHost
from stillhouse.training.output import StepOutput, diverged, refuse_dead, total_of
from stillhouse.training.stages import StageSchedule
from stillhouse.training.teaching import Teachers
from stillhouse.training.update import Reduce, Update
from stillhouse.training.wiring import Wiring


class DistillStep:
    """One method, or several, at work on one student.

    method
        A name, ``{"name": ..., setting: ...}``, a Method, or a list of these, in order.
    student, teacher, target
        Modules. A teacher is frozen: no gradient, eval mode. Several: a mapping by name. ``self``: the student's base
        with its adapters off. ``target``: another model to end with.
    probe
        A few rows of the data, as a loader gives them: shapes are found with it, and whether the teacher is
        deterministic.
    task
        What a batch means, see ``stillhouse.api.KINDS``. Without it labels are classes, or numbers where they are
        floats; a batch of tokens is refused.
    splits
        The data where the caller has it whole; methods that need more than batches ask for it.
    steps
        Student updates of the whole run; stages share them. None: one stage without an end.
    offers
        Capabilities of the surrounding trainer.
    build
        How methods make further models by name; see RunContext.
    soft_labels
        The teacher's kept outputs, read by sample id in place of calling it.
    reduce
        Sums a tensor over the ranks that make one update together; None: this process alone.
    divided_by
        What the surrounding trainer divides the loss or the gradient by on its own: accumulation steps (Lightning,
        Accelerate), the number of ranks (DistributedDataParallel). The loss is multiplied by it.
    teacher_moves
        Says that the teacher is changed from outside while the student trains (a moving average).

    Raises PluginError for a plugin that can't be trusted, ConfigError or DataError where capabilities, outputs, labels
    or features don't fit: all of it here, before the first step.
    """

    def __init__(
        self,
        method: MethodLike | Sequence[MethodLike | Plugin],
        *,
        student: nn.Module,
        probe: Any,
        teacher: nn.Module | Mapping[str, nn.Module] | str | None = None,
        target: nn.Module | None = None,
        task: str | TaskKind | None = None,
        splits: Splits | None = None,
        steps: int | None = None,
        batch_size: int = 1,
        seed: int = 0,
        dir: Path | None = None,
        offers: Iterable[str] = EMBEDDED,
        say: Callable[[str], None] = lambda message: None,
        build: Callable[[Mapping[str, Any]], nn.Module] | None = None,
        soft_labels: SoftLabels | None = None,
        reduce: Reduce | None = None,
        divided_by: float = 1.0,
        teacher_moves: bool = False,
    ) -> None:
        loaded = (
            isinstance(method, list) and bool(method) and all(isinstance(item, Plugin) for item in method)
        )
        self.plugins = Plugins(method if loaded else as_plugins(method))  # type: ignore[arg-type]
        self.kind = kind_of(task, probe)
        self.divided_by, self.host = divided_by, StepHost(self, say)
        models = {STUDENT: student} if target is None else {STUDENT: student, TARGET: target}
        # The first parameter says where the student is, and what its numbers are; it goes along when the student moves.
        self._like = next((p for p in student.parameters() if p.is_floating_point()), torch.zeros(()))
        self.teachers = Teachers(teacher, models, moving=teacher_moves)
        self.captures = Captures({**models, **self.teachers.models})
        self.answers = Answers(self, self.teachers, soft_labels)
        self._rows: Callable[[Batch], tuple[int, ...]] | None = None
        self._held = StillHeld()
        self.heads = Heads()
        self.info = StepInfo(kind=self.kind)
        self.update = Update(self, reduce)
        self.run = RunContext(
            models,
            self.teachers.first,
            splits,
            None,
            self.kind,
            steps or 1,
            batch_size,
            seed,
            dir,
            build,
            method_names=tuple(plugin.name for plugin in self.plugins.plugins),
            with_losses=self.plugins.implementing("loss_terms"),
            teachers=self.teachers.models,
            host=self.host,
        )
        try:
            self._set_up(self.read(probe).to(self.device), steps, frozenset(offers), soft_labels)
        except BaseException:
            self.close()  # a refused plugin leaves no hook on models that others go on using
            raise

    def _set_up(
        self, probe: Batch, steps: int | None, offers: frozenset[str], stored: SoftLabels | None
    ) -> None:
        run, models = self.run, self.run.models
        self._rows = row_shape(self.kind, models[STUDENT], probe)
        run.probe = probe = self.complete(probe)
        check_fit(self.plugins, models, self.teachers.first, run, offers=offers, stored=stored)
        self.plugins.wrap(lambda call: guarded(call, run))
        self.plugins.notify("on_run_start", run=run)
        self.auxiliary = self.plugins.auxiliary_modules(run)
        for name, auxiliary in self.auxiliary.items():
            models[name] = auxiliary.module.to(self.device, auxiliary.dtype or self._like.dtype)
            self.captures.offer(name, auxiliary.module)
        stages, owner = self.plugins.stages(run)
        check_stages(self.plugins, stages, owner, run, self.host.captured)
        self.plugins.wrap(None)
        self.teachers.check(self.plugins, whole=True)
        if not self.plugins.implements("student_forward"):
            self.heads.offer(models, probe.inputs, self.kind)
        if not self.plugins.implements("teacher_forward") and stored is None:
            self.heads.offer(self.teachers.models, probe.for_teacher, self.kind)
        self.teachers.counter.calls = 0
        self.stages = stages
        self.schedule = StageSchedule(stages, steps, self.trained)
        self.driven = False  # whether a loop of ours enters and leaves the stages
        self._started = self._finished = False
        self._watched, self.closed = 0, False
        self._wiring = Wiring(self)
        self._hold(stages[0])

    # One step, as the paper writes it.

    def __call__(self, model: nn.Module, batch: Any) -> StepOutput:
        """The loss of one micro-batch, its named terms, and the student's outputs.

        model
            The student, or a wrapper of it (DistributedDataParallel, torch.compile), called as a whole.
        batch
            What the loader gives. Unless ``begin_update`` said otherwise, it is one whole update.

        Without a graph (``no_grad``, ``inference_mode``) this evaluates: the loss of this batch alone, no update
        counted, inputs as they are.
        """
        if not torch.is_grad_enabled():
            return self._evaluated(model, batch)
        if self.closed:
            raise ConfigError(
                "the step was closed, by close() or at the end of its with, and a training batch came; expected it inside "
                "the with, or another attach()"
            )
        try:
            if not self.update.open:
                self.update.refuse_more()
                self.begin_update([batch])
            if STUDENT not in self.trained(
                self.info.stage
            ):  # a trainer's model.train() wakes what the stage holds still
                self._held.hold(self.run.models, self.trained(self.info.stage))
            output = self._computed(model, self.update.part(batch).to(self.device))
        except BaseException:
            self.update.abandon()
            raise
        if self._watched <= UPDATES and output.loss.requires_grad:
            self._wiring.watch(output.loss)
        self.update.made(output.metrics)
        return output

    def _computed(self, model: nn.Module, batch: Batch) -> StepOutput:
        info, plugins = self.info, self.plugins
        info.logged = {}
        with torch.no_grad():
            teacher_out = self.answers.give(batch)
            soft = None if teacher_out is None else teacher_out.logits
            targets = Targets(batch.labels, soft, batch.probabilities)
            targets = plugins.label_transform(targets, batch, teacher_out, info)
            if plugins.implements("label_transform"):
                self.update.recount(batch, targets)
        student_out = self._student_out(model, batch)
        try:
            terms = plugins.loss_terms(student_out, teacher_out, targets, batch, info)
        except ValueError as error:
            diverged(error, student_out, info)
            raise
        loss = total_of(terms := plugins.combine_terms(terms, info))
        self.heads.learn()
        metrics = {name: term.value.detach() for name, term in terms.items()} | info.logged
        metrics["loss"] = loss.detach()
        given_back = (
            self.divided_by if torch.is_grad_enabled() else 1.0
        )  # nobody divides what is only looked at
        return StepOutput(loss if given_back == 1.0 else loss * given_back, metrics, student_out)

    def _student_out(self, model: nn.Module, batch: Batch) -> StudentOut | None:
        name = self.info.stage.model
        if name is None:
            return None
        called = self._wrapper(model, name)
        with self.captures.collecting(name):
            out = self.plugins.student_forward(called, batch, self.info)
            if out is None:
                answer = self.heads.call(name, called, batch.inputs, self.kind, self.captures.asks(name))
                out = StudentOut(answer.logits, self.captures.take(name, answer))
            elif taken := self.captures.take(name):
                out = StudentOut(out.logits, {**taken, **out.features})
        self.kind.check(batch, out.logits, f"the {name}")
        if torch.is_grad_enabled() and name in self.trained(self.info.stage):
            refuse_dead(name, out)
        return out

    def _wrapper(self, model: nn.Module, name: str) -> nn.Module:
        """What is called for the stage's model: what the trainer gave, unless that is another model of the run."""
        own, inner = self.run.models[name], unwrapped(model)
        others = [other for role, other in self.run.models.items() if role != name]
        return own if inner is not own and any(inner is other for other in others) else model

    # An update: its micro-batches, its rows, its end.

    def begin_update(
        self,
        batches: Sequence[Any] | None = None,
        *,
        rows: float | None = None,
        labelled: float | None = None,
        micros: int = 1,
    ) -> None:
        """Say what makes up the next update; the one before is ended.

        batches
            Its micro-batches, as they will be handed in, in order. Batch transforms are applied to them here, and
            the rows that come out are counted (on the CPU, where the batches are there), over all ranks.
        rows, labelled, micros
            In place of them, where the trainer has counted: rows of the whole update over all ranks, those of them
            with a label (default: all), and how many micro-batches will come.
        """
        self._next_update()
        if self._watched <= UPDATES:
            self._watch()
        if batches is not None:
            self.update.announce(batches)
        elif rows is not None:
            self.update.expect(rows, rows if labelled is None else labelled, micros)
            self.update.by_trainer = True
        else:
            raise ConfigError(
                "begin_update() got neither batches nor rows; expected the micro-batches, or rows="
            )

    def end_update(self, metrics: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Tell the plugins of an update that was made, and move on. Called on its own when the next one begins.

        Returns its metrics: the terms summed over its micro-batches.
        """
        made = self.update.close()
        if made:
            self.plugins.on_update_end(self.info, made if metrics is None else metrics)
            self.schedule.advance()
            self.info.index, self.info.stage_index = self.schedule.at.step, self.schedule.at.stage_step
        return made

    def _next_update(self) -> None:
        self.end_update()
        self.teachers.check(self.plugins)
        if self.driven:
            return
        if not self._started:
            if not self.schedule.known and len(self.stages) > 1:
                names = ", ".join(stage.name for stage in self.stages)
                raise ConfigError(
                    f"the method has the stages {names}; expected steps=, the updates that they share"
                )
            self.begin(self.schedule.stage)
        while self.schedule.stage_done and self.schedule.at.stage + 1 < len(self.stages):
            self._leave_stage()
            self.begin(self.schedule.stage)

    def _evaluated(self, model: nn.Module, given: Any) -> StepOutput:
        batch, info = self.complete(self.read(given)), self.info
        rows, labelled = self.kind.rows(batch), self.kind.labelled(batch)
        self.info = replace(
            info, rows=max(rows, 1.0), labelled=labelled, share=1.0, micro=0, micros=1, logged={}
        )
        try:
            return self._computed(model, batch.to(self.device))
        finally:
            self.info = info

    def read(self, given: Any) -> Batch:
        """A Batch from what a loader gives, by the task's kind."""
        batch = self.kind.read(given)
        if self.kind.name == "seq2seq_lm" and isinstance(batch.inputs, Mapping):
            batch = _with_decoder_inputs(batch, unwrapped(self.run.models[STUDENT]))
        return batch

    def complete(self, batch: Batch) -> Batch:
        """The batch with a mask wherever its rows are positions."""
        return self.kind.complete(batch, None if self._rows is None else self._rows(batch))

    def _watch(self) -> None:
        """Look at what the plugins do to what they are handed, in the first updates of a stage."""
        if self._watched:
            self.teachers.check(self.plugins, whole=True)
        for plugin in self.plugins.plugins if self._watched else ():
            check_kept(plugin)
        first, done = self._watched == 0, self._watched == UPDATES
        if first or done:
            self.plugins.wrap(None if done else lambda call: watched(call, self.teachers.first))
        self._watched += 1

    def idle(self) -> PluginError:
        """The refusal of a loss that no weight of the stage has a part in, naming who gave its terms."""
        giving = self.plugins.implementing("loss_terms")
        who = ", ".join(str(plugin) for plugin in self.plugins.plugins if plugin.name in giving)
        return PluginError(
            f"the loss of stage '{self.info.stage.name}' has no gradient, with terms of {who}; expected one that "
            "depends on what the stage trains: compute it from student_out, with no detach() or item()"
        )

    # Stages.

    def begin(self, stage: Stage, kept: SoftLabels | None = None) -> None:
        """Enter a stage at its beginning: the plugins are told, and it is set up."""
        if self.schedule.stage is not stage:
            self.schedule.jump(stage)
        self.plugins.notify("on_stage_start", run=self.run, stage=stage)
        self.set_up(stage, kept)

    def set_up(self, stage: Stage, kept: SoftLabels | None = None) -> None:
        """What is trained, what is held still, and who answers in the teacher's place.

        kept
            Soft labels of the stage's split, read in place of a call. Without them, a stage against a
            model's outputs keeps a frozen copy of that model.
        """
        at = self.schedule.at
        self.info.stage, self.info.stage_steps = stage, self.schedule.lengths[self.stages.index(stage)]
        self.info.index, self.info.stage_index = at.step, at.stage_step
        self._started, self._watched = True, 0
        self._hold(stage)
        self.answers.set_up(stage, kept)

    def _hold(self, stage: Stage) -> None:
        self.info.stage = stage
        self._held.hold(self.run.models, self.trained(stage))
        self.answers.hold(stage)

    def _leave_stage(self) -> None:
        self.teachers.check(self.plugins, whole=True)
        self.plugins.notify("on_stage_end", run=self.run, stage=self.info.stage)
        self.schedule.leave()

    def trained(self, stage: Stage) -> tuple[str, ...]:
        """Names of the modules that a stage trains."""
        if stage.train is not None:
            return stage.train
        return (*((stage.model,) if stage.model else ()), *self.auxiliary)

    def model(self, stage: Stage | None = None) -> nn.Module:
        """The model whose outputs the stage's losses read; the student where they read none."""
        return self.run.models[(stage or self.info.stage).model or STUDENT]

    def drive(self, steps: int) -> StageSchedule:
        """From now on a loop enters and leaves the stages, which share ``steps``; the schedule that it follows."""
        self.driven = True
        self.schedule = StageSchedule(self.stages, steps, self.trained)
        return self.schedule

    # What a trainer does with it.

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        return self._like.device

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher; the first where there are several."""
        return self.teachers.first

    @property
    def teacher_calls(self) -> int:
        """Forward passes of the teachers since the set-up."""
        return self.teachers.counter.calls

    @teacher_calls.setter
    def teacher_calls(self, calls: int) -> None:
        self.teachers.counter.calls = calls

    @contextmanager
    def released(self) -> Iterator[None]:
        """Nothing is held still while a trainer looks for what can be trained (an optimizer, a wrapper over ranks)."""
        self._held.release()
        try:
            yield
        finally:
            self._held.hold(self.run.models, self.trained(self.info.stage))

    def parameters(self, name: str) -> list[nn.Parameter]:
        """A module's parameters that are trained, now or in another stage."""
        return [p for p in self.run.models[name].parameters() if p.requires_grad or self._held.holds(p)]

    def parameter_groups(self, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """An optimizer group for each trained module, with its own options; a shared parameter stands in the first.

        names
            Default: every module that some stage trains.
        """
        every = dict.fromkeys(name for stage in self.stages for name in self.trained(stage))
        seen: set[int] = set()
        groups = []
        for name in every if names is None else names:
            own = [p for p in self.parameters(name) if id(p) not in seen]
            seen.update(map(id, own))
            if own:
                options = self.auxiliary[name].options if name in self.auxiliary else {}
                groups.append({"params": own, **options})
        return groups

    def zero_grad(self) -> None:
        """Clear the gradients of everything that is trained: the student, the target and the auxiliary modules."""
        for model in self.run.models.values():
            model.zero_grad(set_to_none=True)

    def to(self, device: torch.device | str) -> DistillStep:
        """Move teachers, target and auxiliary modules; the student is its owner's to move."""
        for name, model in {**self.run.models, **self.teachers.models}.items():
            if name != STUDENT:
                model.to(device)
        return self

    def finish(self) -> None:
        """End the last update, the last stage and the run; done at the end of a ``with``."""
        self.end_update()
        if self._finished or self.driven or not self._started:
            return
        self._finished = True
        self._leave_stage()
        self.plugins.notify("on_run_end", run=self.run)

    def close(self) -> None:
        """Remove the hooks from the models; what a stage held still can be trained again."""
        self.closed = True
        self._held.release()
        self.captures.close()
        self.teachers.close()

    def __enter__(self) -> Self:
        """Use it in a ``with``: finished and closed at the end."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish where nothing went wrong, close in any case."""
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs and the trainer does not hold: everything but the student and the teachers.

        An update whose micro-batches have all been made is ended first: the plugins' state is that after it.
        """
        if not self.update.open:
            self.end_update()
        stand = self.answers.stand_in
        return {
            "made_for": self._made_for(),
            "started": self._started,
            "position": self.schedule.state_dict(),
            "models": {
                name: model.state_dict() for name, model in self.run.models.items() if name != STUDENT
            },
            "plugins": self.plugins.state_dict(),
            "teacher_calls": self.teacher_calls,
            # A model that was copied when the stage began: it can't be made again from the model trained since.
            "stand_in": None if stand is None else stand.state_dict(),
        }

    def _made_for(self) -> dict[str, Any]:
        return {"methods": list(self.run.method_names), "stages": list(self.schedule.lengths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken; the student's weights are there already."""
        made_for, own = state["made_for"], self._made_for()
        for what, value in own.items():
            if made_for.get(what) != value:
                raise CheckpointError(
                    f"the state was made with {what} {made_for.get(what)}, this step has {value}; expected the same: attach "
                    "with the methods and steps of the run that goes on"
                )
        self.update.abandon()
        for name, content in state["models"].items():
            self.run.models[name].load_state_dict(content)
        self.plugins.load_state_dict(state["plugins"])
        self.schedule.load_state_dict(state["position"])
        self.teacher_calls = state["teacher_calls"]
        if not state["started"]:  # the first update begins the stage, and tells the plugins
            self._hold(self.schedule.stage)
            return
        self.set_up(self.schedule.stage)
        if state["stand_in"] is not None and self.answers.stand_in is not None:
            self.answers.stand_in.load_state_dict(state["stand_in"])


def _with_decoder_inputs(batch: Batch, student: nn.Module) -> Batch:
    """The decoder's inputs, made from the labels as the model makes them, where the batch has none."""
    make = getattr(student, "prepare_decoder_input_ids_from_labels", None)
    if "decoder_input_ids" in batch.inputs or batch.labels is None or make is None:
        return batch
    return replace(batch, inputs={**batch.inputs, "decoder_input_ids": make(labels=batch.labels)})
