"""Small networks: their parameters, their outputs, the flow between their layers, and whether they can be mapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from stillhouse.api import ConfigError
from stillhouse.kernels import softmax_kl

Parameters = dict[str, Tensor]


def parameters_of(network: nn.Module) -> Parameters:
    """Its parameters by name, detached."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def outputs_of(model: nn.Module, inputs: Any, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """Its outputs; with ``parameters`` in the place of its own, through ``torch.func.functional_call``."""
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    out = functional_call(model, dict(parameters), args, kwargs) if parameters else model(*args, **kwargs)
    out = getattr(out, "logits", out)
    outputs: Tensor = out[0] if isinstance(out, tuple) else out
    return outputs


def mappable(networks: Sequence[tuple[str, nn.Module]]) -> dict[str, list[tuple[int, ...]]]:
    """Each parameter's shape in every one of the named networks, in order.

    Layers are paired by name; widths may differ. Raises ConfigError, naming both networks and shapes, where one
    has a layer that the other lacks, or where more than widths differ (another kernel, another number of axes).
    """
    first, network = networks[0]
    known = {name: [tuple(tensor.shape)] for name, tensor in network.named_parameters()}
    for other, network in networks[1:]:
        found = {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}
        for name in sorted({*known, *found}):
            before, after = known.get(name, ["no such layer"])[0], found.get(name, "no such layer")
            if isinstance(before, str) or isinstance(after, str) or not _alike(before, after):
                raise ConfigError(
                    f"the path can't be mapped: {name} is {before} in {first} and {after} in {other}; expected the "
                    "same layers, differing in numbers of units alone: change arguments of one, or leave it out"
                )
            known[name].append(after)
    return known


def _alike(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) and a[2:] == b[2:]


@contextmanager
def watching(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Outputs of the modules that have a weight of two or more axes, by name in the order of their calls."""
    seen: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            seen.pop(name, None)
            if isinstance(output, Tensor):
                seen[name] = output

        return keep

    handles = [
        module.register_forward_hook(keeper(name))
        for name, module in network.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1  # type: ignore[operator]
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def units(network: nn.Module, name: str, output: Tensor) -> Tensor:
    """A layer's output as ``(observations, units)``: positions count as observations."""
    if isinstance(network.get_submodule(name), _ConvNd):
        output = output.movedim(1, -1)
    return output.reshape(-1, output.shape[-1])


def flow(
    network: nn.Module, inputs: Any, parameters: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and the FSP matrix ``(units, next units)`` of each pair of successive hidden layers.

    ``F_a^T F_b / B`` over the batch, F the layers' units averaged over positions (Yim et al. 2017, CVPR; theirs
    keeps positions, which asks for layers of one resolution).
    """
    with watching(network) as seen:
        outputs = outputs_of(network, inputs, parameters)
    hidden, rows = [], len(outputs)
    for name, output in list(seen.items())[:-1]:
        if len(output) != rows:  # no value a sample: an embedding of positions
            continue
        flat = units(network, name, output)
        hidden.append(flat.view(len(output), -1, flat.shape[-1]).mean(1))
    return outputs, [a.T @ b / len(a) for a, b in pairwise(hidden)]


def relative_error(made: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> Tensor:
    """Squared error of each tensor over its squared norm, the mean over tensors: a scalar, 0 where equal."""
    errors = []
    for name, wanted in real.items():
        scale = wanted.square().sum() + 1e-6 * wanted.numel()
        errors.append((made[name] - wanted).square().sum() / scale)
    return torch.stack(errors).mean()


def output_error(made: Tensor, real: Tensor, *, regression: bool) -> Tensor:
    """KL(real || made) of the softmaxes in nats, or the squared error for regression: ``(...)``, a value a row."""
    if regression:
        return (made - real).square().mean(-1)
    return softmax_kl(made, real, reduction="none")


class PathOutputs(nn.Module):
    """The outputs of the path's last networks together: what the target is trained against.

    The log of their mean probability; for regression their mean; of one network its own outputs. The networks
    are not submodules: they stand among the run's models under names of their own.
    """

    def __init__(self, networks: Sequence[nn.Module], *, regression: bool) -> None:
        super().__init__()
        self._networks, self.regression = tuple(networks), regression

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        for network in self._networks:
            network.eval()
        given = [outputs_of(network, kwargs or args[0]) for network in self._networks]
        if len(given) == 1:
            return given[0]
        if self.regression:
            return torch.stack(given).mean(0)
        together = torch.stack([F.log_softmax(logits.float(), -1) for logits in given])
        return together.logsumexp(0) - torch.tensor(float(len(given))).log()
