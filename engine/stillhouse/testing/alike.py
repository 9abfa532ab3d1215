"""Random numbers that are the same for every row, so that rows may be split, moved and padded under a method that draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SEED = 7919
_ELEMENTWISE = frozenset({"bernoulli", "normal", "poisson", "binomial", "_standard_gamma"})


class DrawnAlike(TorchDispatchMode):
    """Within it a draw has one value for each place on the last axis, the same for all rows before it.

    A draw depends on how many were made since it was entered, and not on how many rows there are: enter it anew for
    each micro-batch. What is drawn by a row's own content (``multinomial``) is drawn for each row with the same seed.
    A permutation leaves all where it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._draws = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **given)
        self._draws += 1
        generator = next(
            (item for item in (*args, *given.values()) if isinstance(item, torch.Generator)), None
        )
        with _seeded(generator, _SEED + self._draws):
            return _alike(func, args, given)


def _alike(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    first = next((item for item in args if isinstance(item, Tensor)), None)
    if name == "randperm":
        options = {key: kwargs[key] for key in ("dtype", "device") if kwargs.get(key) is not None}
        return torch.arange(args[0], **options)
    if first is None:
        place = next(number for number, item in enumerate(args) if isinstance(item, list | tuple))
        size = list(args[place])
        return func(*args[:place], size[1:][-1:], *args[place + 1 :], **kwargs).expand(size).clone()
    if name.endswith("_like"):
        return func(first.new_empty(_last(first)), *args[1:], **kwargs).expand(first.shape).clone()
    tensors = sum(isinstance(item, Tensor) for item in args)
    if name.endswith("_") and tensors == 1:
        return first.copy_(func(first.new_empty(_last(first)), *args[1:], **kwargs).expand(first.shape))
    if first.dim() < 2 and name not in _ELEMENTWISE:
        return func(*args, **kwargs)
    return _row_by_row(func, first, args, kwargs)


def _row_by_row(func: Any, first: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The draw of each row alone, from one state of the generator."""
    last = first.shape[-1:] if first.dim() > 1 else (1,)
    rows = [
        item.reshape(-1, *last) if isinstance(item, Tensor) and item.shape == first.shape else item
        for item in args
    ]
    state, drawn = torch.get_rng_state(), []
    for number in range(first.numel() // max(1, int(last[0]))):
        torch.set_rng_state(state)
        drawn.append(
            func(
                *(item[number] if isinstance(item, Tensor) and item.dim() == 2 else item for item in rows),
                **kwargs,
            )
        )
    if not drawn:
        return func(*args, **kwargs)
    made = torch.stack(drawn)
    return made.reshape(*first.shape[:-1], -1) if first.dim() > 1 else made.reshape(first.shape)


def _last(value: Tensor) -> Sequence[int]:
    return value.shape[-1:] if value.dim() > 1 else ()


@contextmanager
def _seeded(generator: torch.Generator | None, seed: int) -> Iterator[None]:
    """The generator, or the default one, from a seed; as it was afterwards."""
    used = torch.default_generator if generator is None else generator
    state = used.get_state()
    used.manual_seed(seed)
    try:
        yield
    finally:
        used.set_state(state)
