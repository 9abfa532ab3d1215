"""Stores, teachers and splits that the tests of soft labels share."""

from __future__ import annotations

from pathlib import Path

import torch
import toys
from torch import Tensor, nn

from stillhouse.api import TensorSplit
from stillhouse.softlabels import Form, StoredLabels
from stillhouse.softlabels.label import Recipe
from stillhouse.softlabels.places import place
from stillhouse.softlabels.writer import label_split

V, LENGTH = 40, 7


class Tokens(nn.Module):
    """Logits ``(B, L, V)`` of tokens ``(B, L)``; ``head`` makes them of what ``body`` gives."""

    def __init__(self, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Embedding(V, width)
            self.head = nn.Linear(width, V)
            nn.init.normal_(self.head.weight, std=2.0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(ids).cumsum(1))


def tokens(samples: int = 30, *, ragged: bool = True, seed: int = 1) -> TensorSplit:
    """Token ids, with a mask that leaves 0 to ``LENGTH`` rows of each sample."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (samples, LENGTH), generator=generator)
    lengths = torch.randint(0, LENGTH + 1, (samples, 1), generator=generator)
    lengths[0] = LENGTH
    return TensorSplit(ids, mask=torch.arange(LENGTH)[None] < lengths if ragged else None)


def made(
    where: Path,
    form: Form,
    *,
    split: TensorSplit | None = None,
    teacher: nn.Module | None = None,
    shard_samples: int | None = 8,
    **recipe: object,
) -> StoredLabels:
    """The split labelled; by default tokens of differing length."""
    split = split if split is not None else tokens()
    recipe = Recipe(form, **{"batch_size": 4, **recipe})
    return label_split(place(where), teacher or Tokens(), split, recipe, shard_samples=shard_samples)


def per_sample(samples: int = 30) -> tuple[nn.Module, TensorSplit]:
    """A teacher and inputs with one row a sample."""
    return toys.net(seed=3), TensorSplit(toys.rows(samples, 5)[0])


def files(folder: Path) -> dict[str, bytes]:
    """Every file's content."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
