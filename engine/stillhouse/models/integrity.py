"""Models that have to stay as they are: frozen, compared, copied, and checked for randomness."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillhouse.contract.kinds import TaskKind
from stillhouse.models.calling import DEFAULT, evaluating, forward


def freeze(model: nn.Module) -> nn.Module:
    """No gradient, eval mode."""
    for parameter in model.parameters():  # a scripted module has no requires_grad_ of its own
        parameter.requires_grad_(False)
    return model.eval()


def _state(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def versions(model: nn.Module) -> int:
    """A count that grows whenever a parameter or buffer is written to (tensors of inference mode keep none)."""
    return sum(map(version, _state(model)))


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for one of inference mode, which keeps no count."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


def sharded(model: nn.Module) -> list[Any]:
    """The modules that fully_shard (FSDP2) was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who shards has imported it; importing it takes seconds
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def reshard(model: nn.Module) -> None:
    """Put the shards back in place.

    A call without a backward pass leaves the outermost module whole; an optimizer that took its parameters then would
    train tensors that nobody reads.
    """
    for module in sharded(model):
        module.reshard()


def checksum(model: nn.Module) -> int:
    """A sum over the bits of every parameter and buffer: it sees writes that ``versions`` does not (``.data``)."""
    return sum(_bits_sum(tensor) for tensor in _state(model))


def _bits_sum(tensor: Tensor) -> int:
    if tensor.device.type == "meta" or not tensor.numel():
        return 0
    held = tensor.detach()
    bits = (held.int_repr() if held.is_quantized else held).contiguous().reshape(-1)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(bits.element_size(), torch.int64)
    return int(bits.view(whole).sum(dtype=torch.int64))


def digest(model: nn.Module) -> str:
    """A digest of the model's parameters and buffers, bit for bit: also of buffers that no checkpoint holds."""
    found = hashlib.sha256()
    state = model.state_dict()
    for name, value in [*state.items(), *((n, b) for n, b in model.named_buffers() if n not in state)]:
        if not isinstance(value, Tensor):  # packed weights of a quantised layer
            found.update(f"{name} {value!r}".encode())
            continue
        held = value.detach().cpu()
        bits = (held.int_repr() if held.is_quantized else held).contiguous().reshape(-1).view(torch.uint8)
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(bits.numpy().tobytes())
    return found.hexdigest()[:16]


def prepare_to_train(model: nn.Module) -> None:
    """Train mode, where a caller hands over a model in eval mode; what was frozen stays in eval mode.

    A model in train mode stays as it is: parts of it may be in eval mode on purpose.
    """

    def wake(module: nn.Module) -> None:
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            return
        module.training = True
        for child in module.children():
            wake(child)

    if not model.training:
        wake(model)


class Counter:
    """A forward hook that counts a model's calls; a copy or a pickle of the model takes along one of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, given: Any) -> None:
        self.calls += 1

    def __deepcopy__(self, memo: Any) -> Counter:
        return Counter()

    def __reduce__(self) -> tuple[Any, ...]:
        return Counter, ()


class StillHeld:
    """What a stage holds still: its parameters without gradient, its modules in eval mode, put back afterwards.

    What the caller had frozen or put into eval mode is left alone, whenever that happened.
    """

    def __init__(self) -> None:
        self._parameters: dict[int, nn.Parameter] = {}
        self._modules: dict[int, nn.Module] = {}

    def hold(self, models: Mapping[str, nn.Module], but: tuple[str, ...]) -> None:
        """Hold all of ``models`` still but the named ones; a part of a named one is not held."""
        trained = [models[name] for name in but]
        moving = {id(part) for model in trained for part in chain(model.parameters(), model.modules())}
        self._release(lambda part: id(part) in moving)
        for name, model in models.items():
            if name in but:
                continue
            for parameter in model.parameters():
                if parameter.requires_grad and id(parameter) not in moving:
                    parameter.requires_grad_(False)
                    self._parameters[id(parameter)] = parameter
            for module in model.modules():
                if module.training and id(module) not in moving:
                    self._modules[id(module)] = module
                    module.training = False

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter is held still for now."""
        return id(parameter) in self._parameters

    def release(self) -> None:
        """Put all of it back."""
        self._release(lambda part: True)

    def _release(self, which: Callable[[Any], bool]) -> None:
        for parameter in [held for held in self._parameters.values() if which(held)]:
            parameter.requires_grad_(True)
            del self._parameters[id(parameter)]
        for module in [held for held in self._modules.values() if which(held)]:
            module.training = True
            del self._modules[id(module)]


def stochastic_module(model: nn.Module, inputs: Any, kind: TaskKind = DEFAULT) -> str | None:
    """Call the model twice on the same inputs; None if the outputs are the same bit for bit.

    Otherwise the name and class of the first module whose output differed while its inputs did not.
    """
    seen: list[list[tuple[str, Any, Any]]] = []

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            seen[-1].append((name, given, output))

        return module.register_forward_hook(keep)

    with torch.random.fork_rng(), evaluating(model):
        first, second = (forward(model, inputs, kind) for _ in range(2))
        if same(first, second):
            return None
        handles = [watch(name, module) for name, module in model.named_modules()]
        try:
            for _ in range(2):
                seen.append([])
                forward(model, inputs, kind)
        finally:
            for handle in handles:
                handle.remove()
    # Hooks fire when a module is left, so inner modules come first.
    for (name, given, output), (_, given_again, output_again) in zip(*seen, strict=False):
        if same(given, given_again) and not same(output, output_again):
            module_kind = type(dict(model.named_modules())[name]).__name__
            return f"{name} ({module_kind})" if name else f"{module_kind} itself"
    return type(model).__name__


def same(a: Any, b: Any) -> bool:
    """Whether two nested answers hold the same bits."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return True
