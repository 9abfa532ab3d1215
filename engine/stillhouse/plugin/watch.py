"""What a plugin may not do to what it is handed, looked for in the first updates of every stage.

A tensor written to in place, a teacher that changes and a graph that is kept show in every update alike, so
that looking at the first ones finds them, and the others cost nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor, nn

from stillhouse.contract.batch import Batch
from stillhouse.contract.context import RunContext
from stillhouse.contract.outputs import StudentOut, Targets, TeacherOut
from stillhouse.contract.splits import TensorSplit
from stillhouse.errors import PluginError
from stillhouse.models.integrity import version, versions
from stillhouse.plugin.dispatch import Implementation, Plugin

UPDATES = 2
"""How many updates of a stage are watched."""


def watched(call: Implementation, teacher: nn.Module | None) -> Implementation:
    """The same implementation; PluginError after a call that wrote to its arguments or to the teacher."""

    def function(*values: Any) -> Any:
        given = [
            (f"{name}{where}", tensor)
            for name, value in zip(call.arguments, values, strict=True)
            if isinstance(value, Batch | StudentOut | TeacherOut | Targets)
            for where, tensor in tensors(value)
        ]
        before = [version(tensor) for _, tensor in given]
        frozen = 0 if teacher is None else versions(teacher)
        answer = call.function(*values)
        for (name, tensor), count in zip(given, before, strict=True):
            if version(tensor) != count:
                raise PluginError(
                    f"{call.plugin}: hook '{call.hook}' wrote to {name} in place, which other plugins and the next "
                    f"epoch read too; expected it untouched: work on {name}.clone()"
                )
        if teacher is not None and versions(teacher) != frozen:
            raise PluginError(
                f"{call.plugin}: hook '{call.hook}' wrote to the teacher's weights or buffers; a teacher stays as "
                "it is, bit for bit: copy it to train it"
            )
        devices = {tensor.device for _, tensor in given}
        for where, tensor in tensors(answer) if isinstance(answer, Batch | TeacherOut | Targets) else ():
            if devices and tensor.device not in devices:
                raise call.wrong(tensor, f"{where[1:]} on the batch's device, {given[0][1].device}")
        return answer

    return replace(call, function=function)


def guarded(call: Implementation, run: RunContext) -> Implementation:
    """The same implementation; PluginError after a call that moved a model or wrote to the data of the run."""

    def function(*values: Any) -> Any:
        before, data = _devices(run), _data(run)
        answer = call.function(*values)
        for name, device in _devices(run).items():
            if device != before.get(name, device):
                raise PluginError(
                    f"{call.plugin}: hook '{call.hook}' moved the {name} from {before[name]} to {device}; expected "
                    "models left where they are: move what is the plugin's own"
                )
        for name, count in _data(run).items():
            if count != data[name]:
                raise PluginError(
                    f"{call.plugin}: hook '{call.hook}' wrote to the {name} in place, which other runs may read too; "
                    "expected them untouched: give a new Batch from batch_transform"
                )
        return answer

    return replace(call, function=function)


def _devices(run: RunContext) -> dict[str, str]:
    models = run.models if run.teacher is None else {**run.models, "teacher": run.teacher}
    found = {name: sorted({str(p.device) for p in model.parameters()}) for name, model in models.items()}
    return {name: ", ".join(devices) for name, devices in found.items()}


def _data(run: RunContext) -> dict[str, int]:
    """How often the tensors of the run's data were written to."""
    splits = () if run.splits is None else run.splits.items()
    return {
        f"{what} of the {name} split": version(tensor)
        for name, split in splits
        if isinstance(split, TensorSplit)
        for what, tensor in split.named()
    }


def check_kept(plugin: Plugin) -> None:
    """PluginError if the method holds a tensor with its graph between two updates."""
    for where, tensor in tensors(vars(plugin.method)):
        if tensor.grad_fn is not None:
            raise PluginError(
                f"{plugin} keeps a tensor with its graph from one update to the next in self{where}, and with it "
                "every activation; expected nothing that needs a gradient: keep tensor.detach()"
            )


def tensors(value: Any, where: str = "", depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """The tensors in plain containers and dataclasses, each with its path; modules are not looked into."""
    if isinstance(value, Tensor):
        yield where, value
    elif depth and isinstance(value, Mapping):
        for name, item in list(value.items()):
            yield from tensors(item, f"{where}.{name}", depth - 1)
    elif depth and isinstance(value, list | tuple | set | deque):
        for number, item in enumerate(list(value)):
            yield from tensors(item, f"{where}[{number}]", depth - 1)
    elif depth and is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from tensors(getattr(value, part.name), f"{where}.{part.name}", depth - 1)
