"""Calling a model on a batch's inputs, and what it answers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.contract.batch import tensors_in
from stillhouse.contract.kinds import KINDS, TaskKind
from stillhouse.errors import ConfigError, DataError

DEFAULT = KINDS["classification"]
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True, slots=True)
class Output:
    """A model's answer: logits with the class axis last, and what was asked for of a transformers model, by name."""

    logits: Tensor
    kept: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


def call(
    model: nn.Module, inputs: Any, kind: TaskKind = DEFAULT, asks: frozenset[str] = frozenset()
) -> Output:
    """One forward pass.

    inputs
        A tensor, a tuple (arguments), or a mapping: keyword arguments, or one dict where the model takes that.
    asks
        ``hidden_states`` and ``attentions``, where the model is one of transformers: of an encoder and a decoder the
        decoder's, and with ``encoder_`` before it the encoder's.

    A model that can keep a cache for generating is told not to: with one, transformers drops the mask of packed rows.

    Raises ConfigError where the answer holds no logits, and where model and inputs are on two devices or of two dtypes;
    DataError for tokens beyond the model's vocabulary or positions.
    """
    caches = _caches(model)
    takes = _parameters(model) if caches or asks or isinstance(inputs, Mapping) else None
    extra: dict[str, Any] = {f"output_{name.removeprefix('encoder_')}": True for name in asks}
    if caches and (takes is None or "use_cache" in takes or None in takes):
        extra["use_cache"] = False
    try:
        if isinstance(inputs, Mapping):
            out = model(dict(inputs), **extra) if _wants_one_dict(takes, inputs) else model(**inputs, **extra)
        elif isinstance(inputs, tuple | list):
            out = model(*inputs, **extra)
        else:
            out = model(inputs, **extra)
    except (IndexError, RuntimeError) as error:
        _explain(model, inputs, error)
        raise
    found = {name: _kept(out, name) for name in asks}
    return Output(kind.aligned(_logits(model, out, inputs, kind)), found)


def _explain(model: nn.Module, inputs: Any, error: Exception) -> None:
    """Raise what lies behind a model's error, where that can be told."""
    name, weights = type(unwrapped(model)).__name__, list(model.parameters())
    given = [tensor for _, tensor in tensors_in(inputs)]
    own, others = {w.device for w in weights}, {tensor.device for tensor in given}
    if own and others and not own & others:
        raise ConfigError(
            f"{name} is on {min(map(str, own))}, and its inputs are on {min(map(str, others))}; expected one device, the "
            "student's: move the model there with .to()"
        ) from error
    floats = {w.dtype for w in weights if w.is_floating_point()}
    odd = {tensor.dtype for tensor in given if tensor.is_floating_point()} - floats
    if floats and odd and not isinstance(error, IndexError):
        raise ConfigError(
            f"{name} has weights of {min(map(str, floats))} and got inputs of {min(map(str, odd))} ({error}); expected one "
            "dtype: cast the model with .to(), or train under autocast"
        ) from error
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(error, IndexError) or not isinstance(ids, Tensor) or ids.device.type == "meta":
        return
    config = getattr(unwrapped(model), "config", None)
    size, positions = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if size is not None and ids.numel() and int(ids.max()) >= size:
        raise DataError(
            f"the inputs hold token {int(ids.max())}, and {name} has a vocabulary of {size}; expected tokens of its own "
            "tokenizer"
        ) from error
    if positions is not None and ids.shape[-1] > positions:
        raise DataError(
            f"the inputs have {ids.shape[-1]} tokens, and {name} has {positions} positions; expected no more: cut the texts"
        ) from error


def _kept(out: Any, name: str) -> tuple[Tensor, ...]:
    return tuple(getattr(out, name, None) or getattr(out, f"decoder_{name}", None) or ())


def forward(model: nn.Module, inputs: Any, kind: TaskKind = DEFAULT) -> Tensor:
    """The model's logits, class axis last; see ``call``."""
    return call(model, inputs, kind).logits


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain model inside of DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        parts = vars(model).get("_modules", {})  # asking the module itself for what it has not takes long
        wrapper = isinstance(model, _WRAPPERS)
        inner = parts.get("module") if wrapper else parts.get("_orig_mod")
        if inner is None:
            return model
        model = inner


def _caches(model: nn.Module) -> bool:
    return hasattr(getattr(unwrapped(model), "config", None), "use_cache")


def _parameters(model: nn.Module) -> dict[str | None, Any] | None:
    """The arguments of the model's forward; the key None for ``**arguments``. None where it can't be known."""
    try:
        found = inspect.signature(getattr(unwrapped(model), "forward", model)).parameters
    except (TypeError, ValueError):  # scripted, or built in C
        return None
    return {None if item.kind is item.VAR_KEYWORD else name: item for name, item in found.items()}


def _wants_one_dict(takes: dict[str | None, Any] | None, inputs: Mapping[str, Any]) -> bool:
    """Whether the model has one argument, and that is none of the batch's names."""
    if not takes or None in takes or any(name in takes for name in inputs):
        return False
    needed = [
        item for item in takes.values() if item.default is item.empty and item.kind is not item.VAR_POSITIONAL
    ]
    return len(needed) == 1


def _logits(model: nn.Module, out: Any, inputs: Any, kind: TaskKind) -> Tensor:
    if isinstance(out, Tensor):
        return out
    if kind.name == "embedding" and (pooled := _pooled(out, inputs)) is not None:
        return pooled
    logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if logits is None and isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        logits = out[0]
    if not isinstance(logits, Tensor):
        named = f" with {', '.join(map(str, out))}" if isinstance(out, Mapping) else ""
        raise ConfigError(
            f"{type(model).__name__} gave {type(out).__name__}{named}; expected a tensor of logits, an object or a dict "
            "with logits, or a tuple that starts with them"
        )
    return logits


def _pooled(out: Any, inputs: Any) -> Tensor | None:
    """One vector a sample: the model's own, else the mean of the last hidden states over the real tokens."""
    own = getattr(out, "sentence_embedding", None)
    own = out.get("sentence_embedding") if own is None and isinstance(out, Mapping) else own
    if isinstance(own, Tensor):
        return own
    states = getattr(out, "last_hidden_state", None)
    if not isinstance(states, Tensor):
        return None
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    weights = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.dtype)
    return (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without a graph; each module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def one_mode(model: nn.Module) -> Iterator[None]:
    """Each module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
