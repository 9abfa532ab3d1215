"""PDNet: from the parameters of one small network to those of the next along a path.

Every parameter tensor W ``(out, in, ...)`` has a map of its own, ``B W A^T + C``: B mixes output units, A input
units, both the identity plus a learned low-rank matrix (full where a factoring would save nothing), C a learned
offset of low rank. This is the width operator of LiGO (Wang et al. 2023, arXiv:2303.00980) and of Weight
Distillation (Lin et al. 2021, arXiv:2009.09152), with ranks. How far along the map a block of units goes is said by
a small hypernetwork (Ha et al. 2017, arXiv:1609.09106) from embeddings of the layer, the block and the position.

Networks of different widths share one map: it is held for the widest, and a narrower one reads its first rows and
columns. Hidden units therefore have to be aligned along the path first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Shapes = Mapping[str, Sequence[Shape]]
"""Of each parameter, its shape at every point of the path, the last being that of the network after its end."""

EMBEDDING, HIDDEN = 8, 32


class Mixing(nn.Module):
    """The identity plus a learned matrix over up to ``size`` units: of full rank up to ``2 rank`` units."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.size, self.rank = size, rank
        if size <= 2 * rank:
            self.full = nn.Parameter(torch.zeros(size, size))
        else:
            # One factor is 0, so that the map starts as the identity; the other is not, so that it learns.
            self.left = nn.Parameter(torch.zeros(size, rank))
            self.right = nn.Parameter(torch.randn(size, rank) / math.sqrt(size))

    def forward(self, values: Tensor, wanted: int) -> Tensor:
        """From ``(given, n)`` to ``(wanted, n)``."""
        given = len(values)
        if self.size <= 2 * self.rank:
            return resized(values, wanted) + self.full[:wanted, :given] @ values
        return resized(values, wanted) + self.left[:wanted] @ (self.right[:given].T @ values)


class Offset(nn.Module):
    """A learned matrix of up to ``(rows, columns)``, each column ``inner`` numbers; 0 at first."""

    def __init__(self, rows: int, columns: int, inner: int, rank: int) -> None:
        super().__init__()
        self.factored = rank * (rows + columns * inner) < rows * columns * inner
        if self.factored:
            self.left = nn.Parameter(torch.zeros(rows, rank))
            self.right = nn.Parameter(torch.randn(columns, inner, rank) / math.sqrt(columns * inner))
        else:
            self.full = nn.Parameter(torch.zeros(rows, columns, inner))

    def forward(self, rows: int, columns: int) -> Tensor:
        """``(rows, columns, inner)``."""
        if self.factored:
            product: Tensor = torch.einsum("or,ikr->oik", self.left[:rows], self.right[:columns])
            return product
        return self.full[:rows, :columns]


class LayerMap(nn.Module):
    """One parameter's map. A vector has no input side; a scalar is a vector of one."""

    def __init__(self, shapes: Sequence[Shape], rank: int, block: int) -> None:
        super().__init__()
        folded = [fold(shape) for shape in shapes]
        rows, columns = (max(shape[side] for shape in folded) for side in (0, 1))
        self.block, self.blocks = block, -(-rows // block)
        self.outputs = Mixing(rows, rank)
        self.inputs = Mixing(columns, rank) if any(len(shape) > 1 for shape in shapes) else None
        self.offset = Offset(rows, columns, folded[0][2], rank)

    def forward(self, value: Tensor, shape: Shape, gains: Tensor | None) -> Tensor:
        """From a tensor to one of ``shape``; ``gains`` ``(blocks,)``, 1 being the map itself and 0 a plain resize."""
        rows, columns, inner = fold(shape)
        given = value.reshape(fold(tuple(value.shape)))
        plain = resized(resized(given, rows).transpose(0, 1), columns).transpose(0, 1)
        mixed = self.outputs(given.flatten(1), rows).view(rows, *given.shape[1:])
        if self.inputs is not None:
            turned = mixed.transpose(0, 1)
            mixed = self.inputs(turned.flatten(1), columns).view(columns, rows, inner).transpose(0, 1)
        moved = mixed + self.offset(rows, columns)
        if gains is not None:
            moved = plain + gains.repeat_interleave(self.block)[:rows, None, None] * (moved - plain)
        made: Tensor = moved.reshape(shape)
        return made


class PDNet(nn.Module):
    """The path-dependency network.

    shapes
        See Shapes; names are those of ``named_parameters``.
    rank
        Of every learned matrix.
    block
        Output units that share a gain.
    linear
        No gains: the map is then affine in the parameters and the same at each point.

    ``pdnet(parameters, k)`` gives the parameters of point k + 1 from those of point k, from 0.
    """

    def __init__(self, shapes: Shapes, *, rank: int = 8, block: int = 32, linear: bool = False) -> None:
        super().__init__()
        self.shapes = {name: [tuple(shape) for shape in given] for name, given in shapes.items()}
        self.rank, self.block, self.linear = rank, block, linear
        self.steps = len(next(iter(self.shapes.values()))) - 1
        # nn.ModuleList, because a parameter's name has dots in it, which a module's may not.
        self.maps = nn.ModuleList(LayerMap(given, rank, block) for given in self.shapes.values())
        if not linear:
            self.layer = nn.Embedding(len(self.maps), EMBEDDING)
            self.part = nn.Embedding(max(_map(self.maps, i).blocks for i in range(len(self.maps))), EMBEDDING)
            self.position = nn.Linear(4, EMBEDDING)
            self.hidden, self.gain = nn.Linear(EMBEDDING, HIDDEN), nn.Linear(HIDDEN, 1)
            nn.init.zeros_(self.gain.weight)
            nn.init.zeros_(self.gain.bias)

    def forward(self, parameters: Mapping[str, Tensor], point: int) -> dict[str, Tensor]:
        """Parameters by name, each of the shape it has at ``point``, to those of ``point + 1``."""
        made = {}
        for number, (name, shapes) in enumerate(self.shapes.items()):
            gains = None if self.linear else self.gains(number, point)
            made[name] = self.maps[number](parameters[name], shapes[point + 1], gains)
        return made

    def gains(self, layer: int, point: int) -> Tensor:
        """``(blocks,)``: how far the layer's blocks go along the map from ``point`` on; 1 before training."""
        u = point / max(self.steps - 1, 1)
        where = [u, u * u, math.sin(math.pi * u), math.cos(math.pi * u)]
        parts = self.part.weight[: _map(self.maps, layer).blocks]
        code = parts + self.layer.weight[layer] + self.position(parts.new_tensor(where))
        gains: Tensor = 1 + self.gain(self.hidden(code).tanh())[:, 0]
        return gains

    def save(self, path: Path) -> None:
        """Write it with what ``load`` needs to make it again."""
        spec = {"shapes": self.shapes, "rank": self.rank, "block": self.block, "linear": self.linear}
        torch.save({"pdnet": spec, "state": self.state_dict()}, path)

    @classmethod
    def load(cls, path: Path) -> PDNet:
        """Read what ``save`` wrote; tensors and plain values only, no code."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        spec = content["pdnet"]
        made = cls(spec["shapes"], rank=spec["rank"], block=spec["block"], linear=spec["linear"])
        made.load_state_dict(content["state"])
        return made

    @torch.no_grad()
    def describe(self) -> list[dict[str, Any]]:
        """For each parameter: shapes, kind of map, its size, how far it is from the identity, gains by position."""
        rows = []
        for number, (name, shapes) in enumerate(self.shapes.items()):
            own = _map(self.maps, number)
            full = own.outputs.size <= 2 * self.rank
            row: dict[str, Any] = {
                "layer": name,
                "shapes": [list(shape) for shape in shapes],
                "map": "full" if full else f"rank {self.rank}",
                "parameters": sum(parameter.numel() for parameter in own.parameters()),
                "mixing_norm": _distance(own.outputs),
            }
            if not self.linear:
                row["gains"] = [self.gains(number, point).tolist() for point in range(self.steps)]
            rows.append(row)
        return rows


def _map(maps: nn.ModuleList, number: int) -> LayerMap:
    found = maps[number]
    assert isinstance(found, LayerMap)
    return found


def _distance(mixing: Mixing) -> float:
    """Frobenius norm of what is added to the identity."""
    if mixing.size <= 2 * mixing.rank:
        return float(mixing.full.norm())
    squared = ((mixing.left.T @ mixing.left) * (mixing.right.T @ mixing.right)).sum()
    return float(squared.clamp_min(0).sqrt())


def fold(shape: Shape) -> tuple[int, int, int]:
    """A parameter's shape as (output units, input units, numbers for each pair of them)."""
    rows = shape[0] if shape else 1
    columns = shape[1] if len(shape) > 1 else 1
    return rows, columns, math.prod(shape[2:])


def resized(values: Tensor, wanted: int) -> Tensor:
    """The first ``wanted`` rows, with rows of zeros where there are fewer."""
    given = len(values)
    if wanted <= given:
        return values[:wanted]
    return torch.cat([values, values.new_zeros(wanted - given, *values.shape[1:])])
