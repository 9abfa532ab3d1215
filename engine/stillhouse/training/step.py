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

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from stillhouse.errors import ConfigError, DataError, PluginError
from stillhouse.models.calling import unwrapped
from stillhouse.models.captures import Captures
from stillhouse.models.heads import Heads
from stillhouse.models.integrity import reshard
from stillhouse.plugin.dispatch import Plugin, Plugins
from stillhouse.plugin.load import MethodLike, as_plugins
from stillhouse.plugin.watch import UPDATES, check_kept, guarded, watched
from stillhouse.softlabels import SoftLabels
from stillhouse.training.answers import Answers
from stillhouse.training.batches import Batches
from stillhouse.training.compatibility import EMBEDDED, check_fit, check_stages
from stillhouse.training.host import StepHost
from stillhouse.training.modules import TrainedModules
from stillhouse.training.output import StepOutput, diverged, refuse_dead, total_of
from stillhouse.training.progress import Progress
from stillhouse.training.resuming import restore, state_of
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
        if not divided_by > 0:
            raise ConfigError(f"divided_by is {divided_by}; expected what the trainer divides by, above 0")
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise ConfigError(f"steps is {steps!r}; expected the number of updates, 1 at least, or None")
        self.plugins = Plugins(method if loaded else as_plugins(method))  # type: ignore[arg-type]
        self.kind = kind_of(task, probe)
        self.divided_by, self.host = divided_by, StepHost(self, say)
        models = {STUDENT: student} if target is None else {STUDENT: student, TARGET: target}
        # The first parameter says where the student is, and what its numbers are; it goes along when the student moves.
        self._like = next((p for p in student.parameters() if p.is_floating_point()), torch.zeros(()))
        self.teachers = Teachers(teacher, models, moving=teacher_moves)
        self.captures = Captures({**models, **self.teachers.models})
        self.answers = Answers(self, self.teachers, soft_labels)
        self.batches = Batches(self.kind, student)
        self.heads = Heads()
        self.info = StepInfo(kind=self.kind)
        self.modules = TrainedModules(models)
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
            self._set_up(self.batches.read(probe).to(self.device), steps, frozenset(offers), soft_labels)
        except BaseException:
            self.close()  # a refused plugin leaves no hook on models that others go on using
            raise

    def _set_up(
        self, probe: Batch, steps: int | None, offers: frozenset[str], stored: SoftLabels | None
    ) -> None:
        run, models = self.run, self.run.models
        run.probe = probe = self.batches.learn(probe)
        if self.kind.rows(probe) == 0:
            raise DataError(
                f"no {'position' if self.kind.positions else 'row'} of the probe counts: its mask, its attention mask and "
                "labels of -100 leave none; expected one at least: look at how the data set masks"
            )
        self.batches.classes = check_fit(
            self.plugins, models, self.teachers.models, run, offers=offers, stored=stored
        )
        self.plugins.wrap(lambda call: guarded(call, run))
        self.plugins.notify("on_run_start", run=run)
        self.auxiliary = self.modules.auxiliary = self.plugins.auxiliary_modules(run)
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
        self.stages = self.modules.stages = stages
        self.progress = Progress(self, stages, steps)
        self._watched, self.closed = 0, False
        self._wiring = Wiring(self)
        for model in (*models.values(), *self.teachers.models.values()):
            reshard(model)
        self.progress.hold(stages[0])

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
            return self.evaluate(model, batch)
        if self.closed:
            raise ConfigError(
                "the step was closed, by close() or at the end of its with, and a training batch came; expected it inside "
                "the with, or another attach()"
            )
        try:
            if not self.update.open:
                self.update.refuse_more()
                self.begin_update([batch])
            self.modules.hold_again()
            output = self._computed(model, self.update.part(batch).to(self.device))
        except BaseException:
            self.update.abandon()
            raise
        if self.watching and output.loss.requires_grad:
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
            try:
                targets = plugins.label_transform(targets, batch, teacher_out, info)
            except (ValueError, IndexError, RuntimeError):
                self.batches.refuse_labels(batch)
                raise
            if plugins.implements("label_transform"):
                self.update.recount(batch, targets)
        student_out = self._student_out(model, batch)
        try:
            terms = plugins.loss_terms(student_out, teacher_out, targets, batch, info)
        except (ValueError, IndexError, RuntimeError) as error:
            self.batches.refuse_labels(batch)
            if isinstance(error, ValueError):
                diverged(error, student_out, info)
            raise
        loss = total_of(terms := plugins.combine_terms(terms, info))
        self.heads.learn()
        metrics = {name: term.value.detach() for name, term in terms.items()} | info.logged
        metrics["loss"] = loss.detach()
        given_back = (
            self.divided_by if torch.is_grad_enabled() else 1.0
        )  # nobody divides what is only looked at
        evaluating = not torch.is_grad_enabled()
        parts = {name: term.weight * term.value for name, term in terms.items()} if evaluating else {}
        return StepOutput(loss if given_back == 1.0 else loss * given_back, metrics, student_out, parts)

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
        if torch.is_grad_enabled() and name in self.modules.of(self.info.stage):
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
            with a label (default: all, which is checked), and how many micro-batches will come.
        """
        self.end_update()
        self.teachers.check(self.plugins)
        self.progress.next()
        if self.watching:
            self._watch()
        if batches is not None:
            self.update.announce(batches)
        elif rows is not None:
            self.update.expect(rows, labelled, micros)
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
            self.progress.advance()
        return made

    def evaluate(self, model: nn.Module, batch: Any, *, labelled: float | None = None) -> StepOutput:
        """What a call without a graph gives: the loss of this batch alone, with its ``counts``.

        labelled
            What losses on labels are divided by; default: the batch's rows with a label.
        """
        given, info = self.batches.complete(self.batches.read(batch)), self.info
        rows, own = self.kind.rows(given), self.kind.labelled(given)
        count = own if labelled is None else labelled
        self.info = replace(
            info, rows=max(rows, 1.0), labelled=count, share=1.0, micro=0, micros=1, logged={}
        )
        try:
            with torch.no_grad():
                output = self._computed(model, given.to(self.device))
            return replace(output, counts=(rows, self.info.labelled))
        finally:
            self.info = info

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

    @property
    def schedule(self) -> StageSchedule:
        """The stages, their lengths, and where the step stands."""
        return self.progress.schedule

    def begin(self, stage: Stage) -> None:
        """Go to the beginning of a stage out of turn: the plugins are told, and it is set up."""
        self.progress.begin(stage)

    def model(self, stage: Stage | None = None) -> nn.Module:
        """The model whose outputs the stage's losses read; the student where they read none."""
        return self.run.models[(stage or self.info.stage).model or STUDENT]

    @property
    def watching(self) -> bool:
        """Whether this is one of a stage's first updates, in which more is looked at."""
        return self._watched <= UPDATES

    def watch_anew(self) -> None:
        """Look at what the plugins do in the next few updates: a stage begins."""
        self._watched = 0

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

    def parameter_groups(self, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """An optimizer group for each trained module, with its own options; a shared parameter stands in the first.

        names
            Default: every module that some stage trains.
        """
        return self.modules.groups(names)

    def zero_grad(self) -> None:
        """Clear the gradients of everything that is trained: the student, the target and the auxiliary modules."""
        self.modules.zero_grad()

    def to(self, device: torch.device | str) -> DistillStep:
        """Move teachers, target and auxiliary modules; the student is its owner's to move."""
        for name, model in {**self.run.models, **self.teachers.models}.items():
            if name != STUDENT:
                model.to(device)
        return self

    def finish(self) -> None:
        """End the last update, the last stage and the run; done at the end of a ``with``."""
        self.end_update()
        self.progress.finish()

    def close(self) -> None:
        """Remove the hooks from the models; what a stage held still can be trained again."""
        self.closed = True
        self.modules.release()
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
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken; the student's weights are there already.

        Raises CheckpointError where it is of other methods or another number of steps.
        """
        restore(self, state)
