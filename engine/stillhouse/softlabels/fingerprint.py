"""What soft labels were made from, and whether that is what they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.contract.splits import Split
from stillhouse.errors import CheckpointError

BLOCK = 64
"""Rows that are hashed at a time, from a shard's first."""
PLAIN = {"transform": "none", "temperature": "1"}
"""Log-probabilities are the teacher's own, of inputs that nothing changes at random."""


def rows_digest(split: Split, ids: Tensor) -> str:
    """The SHA-256 (16 hex digits) of what a teacher reads of these rows: its inputs and the mask, every row of them.

    Labels are left out: they may be mended without making the teacher's answers wrong.
    """
    found = hashlib.sha256()
    for block in torch.split(ids, BLOCK):
        batch = split.batch(block)
        for name, tensor in (*_named("inputs", batch.for_teacher), *_named("mask", batch.mask)):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def parts_digests(split: Split, ids: Tensor, data: Sequence[Sequence[Any]]) -> list[tuple[int, str]]:
    """The digests of a split's rows for the parts that a manifest lists; ``ids`` are those of all parts, in order."""
    sizes = [int(count) for count, _ in data] or [len(ids)]
    return [(len(part), rows_digest(split, part)) for part in torch.split(ids, sizes)]


def with_data(made_from: Mapping[str, str], data: Sequence[tuple[int, str]]) -> dict[str, str]:
    """A fingerprint with its field ``data``: the digest of one part of the rows, or of the digests of several."""
    found = [digest for _, digest in data]
    one = found[0] if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()[:16]
    return {**made_from, "data": one} if found else dict(made_from)


def _named(name: str, value: Any) -> list[tuple[str, Tensor]]:
    if isinstance(value, Mapping):
        return [pair for key in sorted(value) for pair in _named(f"{name}.{key}", value[key])]
    if isinstance(value, tuple | list):
        return [pair for number, item in enumerate(value) for pair in _named(f"{name}.{number}", item)]
    return [(name, value)] if isinstance(value, Tensor) else []


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer: its whole vocabulary, and its rules where it tells them; ``none`` for None."""
    if tokenizer is None:
        return "none"
    found = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    rules = getattr(tokenizer, "backend_tokenizer", None)
    if rules is not None:
        found.update(rules.to_str().encode())
    return found.hexdigest()[:16]


def differs(where: str, field: str, stored: object, asked: object, mend: str = "") -> CheckpointError:
    """The refusal that names the field, what is stored and what was asked for."""
    mend = mend or f"remove them, or use the {field} that made them"
    return CheckpointError(
        f"soft labels {where} were made with {field} = {stored!r}, this run has {asked!r}; {mend}"
    )


def check_same(where: str, stored: Mapping[str, str], asked: Mapping[str, str]) -> None:
    """Raise CheckpointError for the first field, by name, that is not the same on both sides."""
    for field in sorted({*stored, *asked}):
        if stored.get(field) != asked.get(field):
            raise differs(where, field, stored.get(field), asked.get(field))
