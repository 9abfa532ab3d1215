"""Teachers that are asked elsewhere, and give no logits: only what a ``TopK`` holds."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from stillhouse.contract.batch import Batch
from stillhouse.kernels import TopK


@runtime_checkable
class Served(Protocol):
    """A teacher without weights of its own here; a module that is also this is asked by ``answer`` and not by a call."""

    def answer(self, batch: Batch) -> TopK:
        """The most likely classes of every row ``(B, ..., k)``; what stands at rows that the mask leaves out is not used."""

    def origin(self) -> str:
        """What stands in a fingerprint in the place of a digest of weights."""
