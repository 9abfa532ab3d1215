"""One pass of a model over a split, its logits in a safetensors file or in memory, found by sample id.

A file carries the fingerprint of what made it (model, data, stage); reading it for anything else is
refused, naming the field that differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stillhouse.contract.kinds import TaskKind
from stillhouse.contract.splits import Split
from stillhouse.errors import CheckpointError
from stillhouse.files.tensors import read_tensors, write_tensors
from stillhouse.models.calling import DEFAULT, evaluating, forward


class SoftLabels:
    """Logits ``(rows, C)`` of one split in float32, with the fingerprint of what made them."""

    def __init__(self, logits: Tensor, fingerprint: Mapping[str, str]) -> None:
        self.logits = logits
        self.fingerprint = dict(fingerprint)

    def __len__(self) -> int:
        return len(self.logits)

    def lookup(self, ids: Tensor) -> Tensor:
        """The logits of these samples ``(len(ids), C)``, whatever order they come in."""
        return self.logits[ids]

    def save(self, path: Path) -> None:
        """Write atomically, with a digest of the file in it; WriteFailed where it can't be."""
        metadata = {"fingerprint": json.dumps(self.fingerprint, sort_keys=True)}
        write_tensors(path, {"logits": self.logits}, metadata)

    @classmethod
    def load(cls, path: Path, expected: Mapping[str, str], device: torch.device) -> SoftLabels:
        """Read a file that was made from exactly ``expected``.

        Raises CheckpointError if it is unreadable or was changed (DamagedFile), or was made from something else.
        """
        tensors, about = read_tensors(path, what="soft labels", mend="remove the file")
        found = json.loads(about.get("fingerprint", "{}"))
        logits = tensors["logits"].to(device)
        for field in sorted({*found, *expected}):
            if found.get(field) != expected.get(field):
                raise CheckpointError(
                    f"soft labels {path} were made with {field} = {found.get(field)!r}, this run has "
                    f"{expected.get(field)!r}; remove the file, or use the {field} that made it"
                )
        return cls(logits, found)


def write_soft_labels(
    model: nn.Module,
    split: Split,
    fingerprint: Mapping[str, str],
    *,
    device: torch.device,
    batch_size: int = 512,
    teacher: bool = True,
    kind: TaskKind = DEFAULT,
) -> tuple[SoftLabels, int]:
    """One pass of ``model`` in eval mode over ``split``, in row order.

    teacher
        Whether the model reads the teacher's inputs where the split holds some.
    kind
        What a batch means.

    Returns the soft labels and the number of forward passes made.
    """
    found = []
    with evaluating(model):
        for start in range(0, len(split), batch_size):
            batch = split.batch(torch.arange(start, min(start + batch_size, len(split)))).to(device)
            found.append(forward(model, batch.for_teacher if teacher else batch.inputs, kind).float())
    return SoftLabels(torch.cat(found), fingerprint), len(found)
