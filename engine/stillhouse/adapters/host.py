"""What every adapter does: attach under generators of its own, count over ranks, sum what the trainer does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from stillhouse.contract.context import STUDENT
from stillhouse.errors import ConfigError
from stillhouse.models.calling import unwrapped
from stillhouse.training.distillation import Distillation
from stillhouse.training.random_state import RandomState
from stillhouse.training.step import DistillStep


@contextmanager
def own_generators(seed: int) -> Iterator[None]:
    """Random numbers from ``seed``; the caller's generators go on as if nothing had been drawn."""
    outside = RandomState.capture()
    RandomState.seeded(seed).restore()
    try:
        yield
    finally:
        outside.restore()


def ranks() -> int:
    """Processes that make one update together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of ``values`` over the ranks; ``values`` themselves where there is one."""
    if ranks() == 1:
        return values
    on_gpu = dist.get_backend() == "nccl"
    total = values.cuda() if on_gpu else values.clone()
    dist.all_reduce(total)
    return total.to(values.device)


def attach(
    distillation: Distillation,
    student: nn.Module,
    *,
    trainer: str,
    probe: Any,
    steps: int | None,
    seed: int,
    divided_by: float,
    say: Callable[[str], None] = lambda message: None,
) -> DistillStep:
    """The step in a trainer that clears, clips and steps by itself, and averages gradients over its ranks.

    What is drawn here (the weights of auxiliary modules) comes from ``seed`` alone, on every rank alike.

    trainer
        As messages name it.
    divided_by
        What the trainer divides a micro-batch's loss by; the number of ranks comes on top.

    Raises ConfigError for a description of something that is no Distillation, and for one with a ``target``; else as
    Distillation.attach.
    """
    if not isinstance(distillation, Distillation):
        raise ConfigError(
            f"distillation is {type(distillation).__name__}; expected a stillhouse.Distillation, as in "
            "stillhouse.Distillation('kd', teacher=teacher, task='causal_lm')"
        )
    if distillation.target is not None:
        raise ConfigError(
            f"the distillation has a target, another model to end with, and {trainer} trains, saves and evaluates one "
            "model; expected none: train the target by a second distillation, its teacher the student of this one"
        )
    world = ranks()
    with own_generators(seed):
        step = distillation.attach(
            unwrapped(student),
            probe=probe,
            steps=steps,
            seed=seed,
            say=say,
            reduce=sum_over_ranks if world > 1 else None,
            divided_by=divided_by * world,
        )
    if world > 1:
        for module in step.auxiliary.values():
            for tensor in (*module.module.parameters(), *module.module.buffers()):
                dist.broadcast(tensor.detach(), 0)
    return step


def place(distillation: Distillation, device: torch.device) -> None:
    """Move the teachers to the student's device, save those that were spread over several or are quantised."""
    given = distillation.teacher
    models = given.values() if isinstance(given, Mapping) else [given]
    for model in models:
        if not isinstance(model, nn.Module) or hasattr(model, "hf_device_map"):
            continue
        if getattr(model, "hf_quantizer", None) is None and any(
            p.device != device for p in model.parameters()
        ):
            model.to(device)


def beside(step: DistillStep) -> list[nn.Parameter]:
    """Parameters that are trained beside the student."""
    return [parameter for name in step.auxiliary for parameter in step.modules.parameters(name)]


def add_groups(optimizer: torch.optim.Optimizer, step: DistillStep, *, scheduled: bool) -> None:
    """Give the optimizer what is trained beside the student, where it does not hold it.

    scheduled
        Whether a schedule of learning rates was made for the optimizer's groups as they are.

    Raises ConfigError where that is so, and a group is missing.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for group in step.parameter_groups(list(step.auxiliary)):
        if all(id(parameter) in held for parameter in group["params"]):
            continue
        if scheduled:
            raise ConfigError(
                f"the optimizer that was given lacks what the method trains beside the student "
                f"({', '.join(step.auxiliary)}), and its schedule was made without them; expected no scheduler, or no "
                "optimizer: the trainer makes both"
            )
        optimizer.add_param_group(group)


def sum_when_differentiated(step: DistillStep, loss: Tensor) -> None:
    """At the end of the backward pass of the update's last micro-batch, average over ranks what no wrapper averages.

    DistributedDataParallel does so for the student; auxiliary modules are called by the methods, beside it.
    """
    if ranks() == 1 or step.update.open or not loss.requires_grad or not step.auxiliary:
        return

    def average() -> None:
        for parameter in beside(step):
            if not parameter.requires_grad:
                continue
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = sum_over_ranks(own) / ranks()

    engine: Any = Variable._execution_engine  # noqa: SLF001 - torch has no other place for "after this backward"
    loss.register_hook(lambda gradient: engine.queue_callback(average))  # type: ignore[no-untyped-call]


def refuse_unused(step: DistillStep, model: nn.Module) -> None:
    """DistributedDataParallel waits for every gradient of the student: refuse stages that leave it alone."""
    finds = getattr(model, "find_unused_parameters", True)
    if not isinstance(model, nn.parallel.DistributedDataParallel) or finds:
        return
    for stage in step.stages:
        if STUDENT not in step.modules.of(stage):
            raise ConfigError(
                f"stage '{stage.name}' does not train the student, and DistributedDataParallel waits for its gradients; "
                "expected find_unused_parameters=True (Trainer: ddp_find_unused_parameters=True)"
            )


class Terms:
    """Loss terms of the updates since they were last shown."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._updates: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """One update's terms, this rank's part of them."""
        for name, value in metrics.items():
            if name != "loss":
                self._sums[name] = self._sums.get(name, torch.zeros(())) + value.detach().float()
                self._updates[name] = self._updates.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The mean over the updates that had the term, summed over ranks, of which some may have had none of it."""
        own = {name: (float(total), self._updates[name]) for name, total in self._sums.items()}
        self._sums, self._updates = {}, {}
        every: list[Any] = [own]
        if ranks() > 1:
            every = [None] * ranks()
            dist.all_gather_object(every, own)
        names = sorted({name for found in every for name in found})
        nothing = (0.0, 0)
        return {
            name: sum(found.get(name, nothing)[0] for found in every)
            / max(found.get(name, nothing)[1] for found in every)
            for name in names
        }
