"""Hidden units in the same order along a path.

Two networks that compute alike may hold their units in different orders, and a map between parameters would then
have to learn the permutation. Units are paired by the correlation of their activations (Li et al. 2016,
arXiv:1511.07543; Ainsworth et al. 2023, arXiv:2209.04836) with the Hungarian method, and the later network's are
reordered, which leaves its outputs as they were.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from stillhouse.api import MissingExtra
from stillhouse_pddm.networks import outputs_of, units, watching

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Aligned:
    """What was done at one layer: how many units moved, or why none could."""

    layer: str
    units: int
    moved: int
    note: str = ""


def needs_scipy() -> None:
    """Raise MissingExtra where SciPy is not installed."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise MissingExtra("method 'pddm' with align", "scipy", "study") from None


@torch.no_grad()
def align(network: nn.Module, like: nn.Module, inputs: Any) -> list[Aligned]:
    """Reorder the hidden units of ``network`` in place so that they stand where their partners in ``like`` do.

    inputs
        Rows on which activations are compared. Both networks are read in eval mode and left in it.

    A layer whose reordering would change the outputs (units that another path reads too) stays as it is.
    """
    network.eval()
    like.eval()
    with watching(like) as theirs:
        outputs_of(like, inputs)
    with watching(network) as ours:
        before = outputs_of(network, inputs)
    names = [name for name in ours if name in theirs]
    done = []
    for name, reader in pairwise(names):
        a, b = units(like, name, theirs[name]), units(network, name, ours[name])
        order = matched(a, b)
        moved = int((order != torch.arange(len(order))).sum())
        kept = copy.deepcopy(network.state_dict())
        note = ""
        if moved and not (
            _reorder(network, name, reader, order) and _same(outputs_of(network, inputs), before)
        ):
            network.load_state_dict(kept)
            moved, note = 0, "its units can't be reordered without changing the outputs"
        done.append(Aligned(name, len(order), moved, note))
    return done


def matched(like: Tensor, own: Tensor) -> Tensor:
    """``order`` ``(own units,)``: which own unit to put at each place, by correlation ``(observations, units)``.

    With more own units than partners the rest follow in their order; with fewer, they stand in the order of theirs.
    """
    from scipy.optimize import linear_sum_assignment

    count = min(len(like), len(own))
    a, b = (_standardised(values[:count].double()) for values in (like, own))
    correlation = (a.T @ b / count).cpu().numpy()
    places, chosen = linear_sum_assignment(correlation, maximize=True)
    rest = [unit for unit in range(own.shape[1]) if unit not in set(chosen.tolist())]
    assert list(places) == sorted(places)
    return torch.tensor([*chosen.tolist(), *rest])


def _standardised(values: Tensor) -> Tensor:
    centred = values - values.mean(0)
    return centred / centred.square().mean(0).sqrt().clamp_min(1e-12)


def _reorder(network: nn.Module, name: str, reader: str, order: Tensor) -> bool:
    """Permute a layer's units and the columns that read them; False where the shapes say it can't be."""
    layer, following = network.get_submodule(name), network.get_submodule(reader)
    usable = (nn.Linear, _ConvNd)
    if not isinstance(layer, usable) or not isinstance(following, usable):
        return False
    if getattr(layer, "groups", 1) != 1 or getattr(following, "groups", 1) != 1:
        return False
    columns = following.weight.shape[1]
    if columns % len(order):
        return False
    each = columns // len(order)  # a flattened convolution has a column for each unit and position
    layer.weight.copy_(layer.weight[order])
    if layer.bias is not None:
        layer.bias.copy_(layer.bias[order])
    for norm in _between(network, name, reader):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if tensor is not None and len(tensor) == len(order):
                tensor.copy_(tensor[order])
    wide = (order[:, None] * each + torch.arange(each)).flatten()
    following.weight.copy_(following.weight[:, wide])
    return True


def _between(network: nn.Module, name: str, reader: str) -> list[_BatchNorm]:
    """Batch norms that stand between two layers in the order of definition."""
    names = [found for found, _ in network.named_modules()]
    inner = names[names.index(name) + 1 : names.index(reader)]
    found = [network.get_submodule(each) for each in inner]
    return [module for module in found if isinstance(module, _BatchNorm)]


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max().clamp_min(1.0))
