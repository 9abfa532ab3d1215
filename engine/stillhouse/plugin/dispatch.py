"""The typed facade over pluggy: fold, sum, first result, blame.

pluggy checks and orders the implementations; they are then called here, one by one, because a fold
needs each answer and an error must name its plugin.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pluggy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stillhouse.api import Method
from stillhouse.contract.batch import Batch
from stillhouse.contract.context import TEACHER, Auxiliary, RunContext, Stage, StepInfo
from stillhouse.contract.hooks import FIRST_RESULT, PROJECT, LifeHooks, StepHooks
from stillhouse.contract.outputs import LossTerm, StudentOut, Targets, TeacherOut
from stillhouse.contract.splits import Split
from stillhouse.errors import PluginError
from stillhouse.plugin.validate import check, hook_arguments

T = TypeVar("T")
_MOVE = "make tensors with device=student_out.logits.device, and leave the models where they are"


@dataclass(frozen=True)
class Plugin:
    """A loaded method, with the names that an error needs."""

    name: str
    distribution: str
    method: Method

    def __str__(self) -> str:
        return f"plugin '{self.name}' ({self.distribution})"


@dataclass(frozen=True, slots=True)
class Implementation:
    """One plugin's answer to one hook."""

    plugin: Plugin
    hook: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]
    taken: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    """Of the hook's arguments those that the plugin takes."""

    def __call__(self, *values: Any) -> Any:
        """Call with all of the hook's arguments, in its order."""
        try:
            return self.function(*self.taken(values))
        except Exception as error:
            if str(self.plugin) not in str(error):
                blame(error, f"in hook '{self.hook}' of {self.plugin}")
            raise

    def wrong(self, got: Any, expected: str) -> PluginError:
        return PluginError(f"{self.plugin}: hook '{self.hook}' gave {_describe(got)}; expected {expected}")


def _taking(taken: tuple[str, ...], order: tuple[str, ...]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Picks the values of the arguments ``taken`` from those of ``order``; no loop in Python at each step."""
    if taken == order:
        return tuple
    places = [order.index(name) for name in taken]
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


def blame(error: BaseException, note: str) -> None:
    """Attach ``note`` to the error (PEP 678; by hand before Python 3.11)."""
    notes = [*getattr(error, "__notes__", []), note]
    error.__notes__ = notes  # type: ignore[attr-defined]


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"[:120]


class Plugins:
    """The methods of one step object, checked and frozen: nothing is registered after construction."""

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        self.plugins = tuple(plugins)
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(StepHooks)
        self._manager.add_hookspecs(LifeHooks)
        for plugin in self.plugins:
            check(plugin, type(plugin.method))
        # pluggy calls the last registered first; registered backwards, it keeps the config's order.
        for plugin in reversed(self.plugins):
            if self._manager.has_plugin(plugin.name):
                raise PluginError(
                    f"{plugin} is named twice; give the second a name of its own: {{name: {plugin.name}, as: another}}"
                )
            self._manager.register(plugin.method, plugin.name)
        self._all = {name: self._implementations(name) for name in hook_arguments()}
        self._calls = self._all
        for name in FIRST_RESULT:
            if name not in ("stages", "stage_rows"):  # a method may leave these to another by its answer
                _one_claim(name, self._calls[name])

    def _implementations(self, hook: str) -> tuple[Implementation, ...]:
        by_name = {plugin.name: plugin for plugin in self.plugins}
        order = hook_arguments()[hook]
        calls = []
        for impl in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            taken = tuple(impl.argnames)
            call = Implementation(
                by_name[impl.plugin_name], hook, impl.function, taken, _taking(taken, order)
            )
            calls.append(call)
        return tuple(calls)

    def wrap(self, wrapper: Callable[[Implementation], Implementation] | None) -> None:
        """Call every implementation through ``wrapper`` from now on; None: as they are."""
        self._calls = self._all
        if wrapper is not None:
            self._calls = {name: tuple(map(wrapper, calls)) for name, calls in self._all.items()}

    def implements(self, hook: str) -> bool:
        """Whether any plugin implements ``hook``."""
        return bool(self._calls[hook])

    def implementing(self, hook: str) -> tuple[str, ...]:
        """The names of the plugins that implement ``hook``, in order."""
        return tuple(call.plugin.name for call in self._all[hook])

    @property
    def requires(self) -> frozenset[str]:
        """The capabilities that the plugins need together."""
        return frozenset().union(*(plugin.method.requires for plugin in self.plugins))

    # The hooks of a step.

    def batch_transform(self, batch: Batch, info: StepInfo) -> Batch:
        for call in self._calls["batch_transform"]:
            info.caller = call.plugin.name
            batch = _kept(call, call(batch, info), batch, Batch)
        return batch

    def teacher_forward(self, teacher: nn.Module | None, batch: Batch, info: StepInfo) -> TeacherOut | None:
        for call in self._calls["teacher_forward"]:
            info.caller = call.plugin.name
            given = call(teacher, batch, info)
            return None if given is None else _kept(call, given, given, TeacherOut)
        return None

    def student_forward(self, student: nn.Module, batch: Batch, info: StepInfo) -> StudentOut | None:
        for call in self._calls["student_forward"]:
            info.caller = call.plugin.name
            given = call(student, batch, info)
            return None if given is None else _kept(call, given, given, StudentOut)
        return None

    def label_transform(
        self, targets: Targets, batch: Batch, teacher_out: TeacherOut | None, info: StepInfo
    ) -> Targets:
        for call in self._calls["label_transform"]:
            info.caller = call.plugin.name
            given = call(targets, batch, teacher_out, info)
            targets = _kept(call, given, targets, Targets)
        return targets

    def loss_terms(
        self,
        student_out: StudentOut | None,
        teacher_out: TeacherOut | None,
        targets: Targets,
        batch: Batch,
        info: StepInfo,
    ) -> dict[str, LossTerm]:
        terms: dict[str, LossTerm] = {}
        device = None if student_out is None else student_out.logits.device
        for call in self._calls["loss_terms"]:
            info.caller = call.plugin.name
            given = call(student_out, teacher_out, targets, batch, info)
            for name, term in _terms(call, given).items():
                if device is not None and term.value.device != device:
                    raise call.wrong(term.value, f"'{name}' on the student's device, {device}: {_MOVE}")
                terms[f"{call.plugin.name}.{name}"] = term
        return terms

    def combine_terms(self, terms: dict[str, LossTerm], info: StepInfo) -> dict[str, LossTerm]:
        for call in self._calls["combine_terms"]:
            info.caller = call.plugin.name
            given = call(terms, info)
            if given is not None:
                terms = _terms(call, given)
        return terms

    def student_update(self, student: nn.Module, optimizer: Optimizer, loss: Tensor, info: StepInfo) -> bool:
        for call in self._calls["student_update"]:
            info.caller = call.plugin.name
            return bool(call(student, optimizer, loss, info))
        return False

    def on_update_end(self, info: StepInfo, metrics: Mapping[str, Tensor]) -> None:
        for call in self._calls["on_update_end"]:
            info.caller = call.plugin.name
            call(info, metrics)

    # The life of a run.

    def notify(self, hook: str, run: RunContext, **given: Any) -> None:
        """Call a hook that gives nothing: on_run_start, on_stage_start, on_stage_end, on_run_end."""
        given["run"] = run
        for call in self._calls[hook]:
            run.caller = call.plugin.name
            call(*(given[name] for name in hook_arguments()[hook]))
        run.caller = ""

    def stages(self, run: RunContext) -> tuple[tuple[Stage, ...], str | None]:
        """The stages that a plugin gives and its name, else one on the labelled data; PluginError where two give some."""
        answers = []
        for call in self._calls["stages"]:
            run.caller = call.plugin.name
            if (given := call(run)) is not None:
                answers.append((call, given))
        run.caller = ""
        _one_claim("stages", [call for call, _ in answers])
        for call, given in answers:
            whole = isinstance(given, Sequence) and all(isinstance(stage, Stage) for stage in given)
            if not given or not whole:
                raise call.wrong(given, "a list of Stage")
            return tuple(_in_full(stage, call.plugin.name, run) for stage in given), call.plugin.name
        teacher = TEACHER if run.teacher is not None or self.requires & {"logits"} else None
        return (_in_full(Stage("train", teacher=teacher), "", run),), None

    def stage_rows(self, run: RunContext, stage: Stage, split: Split) -> Tensor | None:
        """The sample numbers that a plugin chose for the stage, checked; None for all of them."""
        answers = []
        for call in self._calls["stage_rows"]:
            run.caller = call.plugin.name
            if (given := call(run, stage, split)) is not None:
                answers.append((call, given))
        run.caller = ""
        _one_claim("stage_rows", [call for call, _ in answers])
        for call, given in answers:
            if not isinstance(given, Tensor) or given.dtype != torch.long or given.dim() != 1:
                raise call.wrong(given, "sample numbers: a long tensor of one axis, or None")
            if not len(given) or int(given.min()) < 0 or int(given.max()) >= len(split):
                raise call.wrong(given, f"at least one sample number, each from 0 to {len(split) - 1}")
            return given
        return None

    def auxiliary_modules(self, run: RunContext) -> dict[str, Auxiliary]:
        """Every plugin's auxiliary modules, under ``plugin.name``."""
        modules: dict[str, Auxiliary] = {}
        for call in self._calls["auxiliary_modules"]:
            run.caller = call.plugin.name
            given = call(run) or {}
            if not isinstance(given, Mapping):
                raise call.wrong(given, "a mapping from name to nn.Module or Auxiliary")
            for name, made in given.items():
                item = Auxiliary(made) if isinstance(made, nn.Module) else made
                if not isinstance(item, Auxiliary):
                    raise call.wrong(item, f"an nn.Module or Auxiliary under '{name}'")
                modules[f"{call.plugin.name}.{name}"] = item
        run.caller = ""
        return modules

    def state_dict(self) -> dict[str, Any]:
        """Each plugin's state under its name."""
        return {call.plugin.name: call() or {} for call in self._calls["state_dict"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hand each plugin its own state back."""
        for call in self._calls["load_state_dict"]:
            if call.plugin.name in state:
                call(state[call.plugin.name])


def _in_full(stage: Stage, plugin: str, run: RunContext) -> Stage:
    """The stage with the plugin's own modules under their full names, and every teacher where there are several."""

    def full(name: str | None) -> str | None:
        return f"{plugin}.{name}" if f"{plugin}.{name}" in run.models and name not in run.models else name

    teacher = full(stage.teacher) if isinstance(stage.teacher, str | None) else stage.teacher
    several = tuple(name for name in run.teachers if name != TEACHER)
    if teacher == TEACHER and len(several) > 1:
        teacher = several
    train = None if stage.train is None else tuple(str(full(name)) for name in stage.train)
    return replace(stage, model=full(stage.model), teacher=teacher, train=train)


def _one_claim(hook: str, claims: Sequence[Implementation]) -> None:
    if len(claims) > 1:
        who = " and ".join(str(call.plugin) for call in claims)
        raise PluginError(f"hook '{hook}' is claimed by {who}; a run may have one: drop a method")


def _kept(call: Implementation, given: object, otherwise: T, kind: type[T]) -> T:
    """The hook's answer, checked, or ``otherwise`` where it gave None."""
    if given is None:
        return otherwise
    if not isinstance(given, kind):
        raise call.wrong(given, f"a {kind.__name__} or None")
    return given


def _terms(call: Implementation, given: Any) -> dict[str, LossTerm]:
    if given is None:
        return {}
    if type(given) is not dict and not isinstance(given, Mapping):  # asking an abstract class takes longer
        raise call.wrong(given, "a mapping from name to LossTerm")
    for name, term in given.items():
        if not isinstance(term, LossTerm):
            raise call.wrong(term, f"a LossTerm under '{name}'")
        if not isinstance(term.value, Tensor) or term.value.dim() != 0:
            raise call.wrong(
                term.value, f"a scalar tensor as value of '{name}' (info.mean makes one of a value a row)"
            )
    return dict(given)
