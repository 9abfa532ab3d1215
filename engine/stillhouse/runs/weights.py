"""A model's weights in a file: under the plain model's names, and only into a model that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stillhouse.errors import CheckpointError, ConfigError, Diverged
from stillhouse.files.tensors import read_tensors

WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing call the module that they wrap."""


def plain_names(model: nn.Module) -> dict[str, str]:
    """Names of ``state_dict`` to those of the model without wrappers (compile, DataParallel, DDP, FSDP)."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    wrappers = {
        f"{path}.module" if path else "module"
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, parallel)
    }
    names = {}
    for name in model.state_dict():
        parts = name.split(".")
        kept = [
            part
            for number, part in enumerate(parts)
            if part not in WRAPPED and ".".join(parts[: number + 1]) not in wrappers
        ]
        names[name] = ".".join(kept)
    return names if len(set(names.values())) == len(names) else {name: name for name in names}


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights on the CPU, by their plain names."""
    names = plain_names(model)
    return {names[name]: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def check_saveable(model: nn.Module) -> None:
    """ConfigError where the model's state can't be written as tensors: told before training, not after it."""
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"'{name}' of the model's state_dict is {type(value).__name__}; expected tensors alone, for the weights "
                "are kept as safetensors: leave out get_extra_state, or run without a run directory"
            )
        if value.layout != torch.strided or value.is_quantized:
            kind = "quantized" if value.is_quantized else str(value.layout)
            raise ConfigError(
                f"'{name}' of the model is {kind}; expected a dense tensor, for the weights are kept as safetensors"
            )


def load(model: nn.Module, path: Path) -> None:
    """Read weights from a safetensors file; CheckpointError where they are not this model's.

    Floats of another width are cast as ``load_state_dict`` does; numbers of another kind are refused.
    """
    weights, _ = read_tensors(path, what="weights", mend="expected a safetensors file", sealed=False)
    fill(model, weights, f"weights {path}")


def fill(model: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Put ``weights``, by their plain names, into the model; CheckpointError where they don't fit."""
    names = plain_names(model)
    state = model.state_dict()
    expected = {names[name]: tensor for name, tensor in state.items()}
    for name in sorted({*expected, *weights}):
        got = tuple(weights[name].shape) if name in weights else "missing"
        wanted = tuple(expected[name].shape) if name in expected else "no such entry"
        if got != wanted:
            raise CheckpointError(
                f"{what}: '{name}' is {got}, the model has {wanted}; "
                "give the builder the arguments that these weights were made with"
            )
        if _kind(weights[name]) != _kind(expected[name]):
            raise CheckpointError(
                f"{what}: '{name}' is {weights[name].dtype}, the model has {expected[name].dtype}; expected numbers of "
                "the same kind (float, integer, complex): a cast would change them"
            )
    model.load_state_dict({name: weights[names[name]] for name in state})
    refuse_broken(model, f"{what}:", "expected finite ones")


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    if tensor.is_floating_point():
        return "float"
    return "bool" if tensor.dtype == torch.bool else "integer"


def refuse_broken(model: nn.Module, what: str, fix: str) -> None:
    """Diverged where a weight is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise Diverged(f"{what} '{name}' holds NaN or infinity; {fix}")
