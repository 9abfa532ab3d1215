"""Models: built by name, run on a batch, watched by forward hooks, checked for randomness."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillhouse.models.calling import evaluating, forward


def freeze(model: nn.Module) -> nn.Module:
    """No gradient, eval mode."""
    return model.requires_grad_(False).eval()


def versions(model: nn.Module) -> int:
    """A count that grows whenever a parameter or buffer is written to."""
    return sum(tensor._version for tensor in (*model.parameters(), *model.buffers()))  # noqa: SLF001


def checksum(model: nn.Module) -> int:
    """A sum over the bits of every parameter and buffer: it sees writes that ``versions`` does not (``.data``)."""
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        bits = tensor.detach().contiguous().reshape(-1)
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(bits.element_size(), torch.int64)
        total += int(bits.view(whole).sum(dtype=torch.int64)) if bits.device.type != "meta" else 0
    return total


def digest(model: nn.Module) -> str:
    """A digest of the model's parameters and buffers, bit for bit."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def stochastic_module(model: nn.Module, inputs: Any) -> str | None:
    """Call the model twice on the same inputs; None if the outputs are the same bit for bit.

    Otherwise the name and class of the first module whose output differed while its inputs did not.
    """
    seen: list[list[tuple[str, Any, Any]]] = []

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            seen[-1].append((name, given, output))

        return module.register_forward_hook(keep)

    outputs = []
    with torch.random.fork_rng(), evaluating(model):
        for _ in range(2):
            outputs.append(forward(model, inputs))
        if _same(outputs[0], outputs[1]):
            return None
        handles = [watch(name, module) for name, module in model.named_modules()]
        try:
            for _ in range(2):
                seen.append([])
                forward(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    # Hooks fire when a module is left, so inner modules come first.
    for (name, given, output), (_, given_again, output_again) in zip(*seen, strict=False):
        if _same(given, given_again) and not _same(output, output_again):
            kind = type(dict(model.named_modules())[name]).__name__
            return f"{name} ({kind})" if name else f"{kind} itself"
    return type(model).__name__


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return True
