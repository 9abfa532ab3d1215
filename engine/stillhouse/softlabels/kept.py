"""What a run keeps for itself: one model's outputs over a split, in memory, or above a limit in one file that is mapped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stillhouse.contract.kinds import TaskKind
from stillhouse.contract.splits import Split
from stillhouse.errors import CheckpointError, DamagedFile
from stillhouse.files import BLANK
from stillhouse.files.seals import MARK, ZEROS, check_seal_of
from stillhouse.files.tensors import read_tensors, write_tensors
from stillhouse.files.writing import failed
from stillhouse.models.calling import DEFAULT, evaluating, forward
from stillhouse.softlabels.base import SoftLabels
from stillhouse.softlabels.forms import Form
from stillhouse.softlabels.pages import Held, give_back, mapped

if TYPE_CHECKING:
    from typing_extensions import Self

LIMIT = 512 * 2**20
"""Bytes of outputs that a run holds in memory, the teacher's or another model's; above it they lie in a file."""


class HeldLabels(SoftLabels):
    """Outputs ``(samples, ..., outputs)`` in float32 of the samples 0 to ``len - 1``, in memory or over a mapped file."""

    def __init__(self, logits: Tensor, fingerprint: Mapping[str, str]) -> None:
        self.logits = logits
        self.fingerprint = dict(fingerprint)
        self.form = Form("dense", "float32", logits.shape[-1])
        self._path: Path | None = None
        self._pages: mmap.mmap | None = None
        self._held = Held()

    def __len__(self) -> int:
        return len(self.logits)

    def count(self, first: int, stop: int) -> int:
        return max(0, min(stop, len(self)) - max(first, 0))

    def lookup(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if self._pages is None:
            return self.logits[ids]
        found = self.logits[ids.cpu()].to(ids.device)
        self._touch(len(ids))
        return found

    def blocks(self, size: int = 4096) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self), size):
            logits = self.logits[start : start + size]
            yield torch.arange(start, start + len(logits)), logits
            self._touch(len(logits))

    def _touch(self, samples: int) -> None:
        if self._pages is None:
            return
        if self._held.too_much(samples, 4 * self.logits[0].numel(), 4 * self.logits.numel()):
            give_back(self._pages)

    def save(self, path: Path) -> None:
        """Write one sealed safetensors file, whole or not at all; WriteFailed where it can't be."""
        if self._path == path:
            return
        if self._pages is None:
            write_tensors(path, {"logits": self.logits}, _about(self.fingerprint))
            return
        writing = _File(path, (*self.logits.shape,), self.fingerprint)
        with writing:
            for _, logits in self.blocks():
                writing.add(logits)

    def discard(self) -> None:
        """Let the mapped file go with these labels, however this process ends."""
        assert self._path is not None
        try:
            self._path.unlink()  # the mapping keeps it
        except OSError:  # Windows keeps a mapped file's name too
            weakref.finalize(self, self._path.unlink, missing_ok=True)
        self._path = None

    @classmethod
    def load(cls, path: Path, expected: Mapping[str, str], device: torch.device) -> HeldLabels:
        """A file that ``save`` wrote, made from exactly ``expected``: on ``device``, or mapped where it is above ``LIMIT``.

        Raises CheckpointError if it is unreadable or was changed (DamagedFile), or was made from something else.
        """
        if path.is_file() and path.stat().st_size > LIMIT:
            found = cls._mapped(path)
        else:
            tensors, about = read_tensors(path, what="soft labels", mend="remove the file")
            found = cls(tensors["logits"].to(device), json.loads(about.get("fingerprint", "{}")))
        stored = found.fingerprint
        for field in sorted({*stored, *expected}):
            if stored.get(field) != expected.get(field):
                raise CheckpointError(
                    f"soft labels {path} were made with {field} = {stored.get(field)!r}, this run has "
                    f"{expected.get(field)!r}; remove the file, or use the {field} that made it"
                )
        return found

    @classmethod
    def _mapped(cls, path: Path) -> HeldLabels:
        problem = check_seal_of(path)
        if problem:
            raise DamagedFile(f"soft labels {path} can't be read: {problem}; remove the file")
        pages, tensors, about = mapped(path)
        found = cls(tensors["logits"], json.loads(about.get("fingerprint", "{}")))
        found._pages, found._path = pages, path
        return found


def _about(fingerprint: Mapping[str, str]) -> dict[str, str]:
    return {"fingerprint": json.dumps(dict(fingerprint), sort_keys=True)}


def write_soft_labels(
    model: nn.Module,
    split: Split,
    fingerprint: Mapping[str, str],
    *,
    device: torch.device,
    batch_size: int = 512,
    teacher: bool = True,
    path: Path | None = None,
    scratch: Path | None = None,
    kind: TaskKind = DEFAULT,
) -> tuple[HeldLabels, int]:
    """One pass of ``model`` in eval mode over ``split``, in row order.

    teacher
        Whether the model reads the teacher's inputs where the split holds some.
    path
        Where outputs above ``LIMIT`` bytes go; without it, to a file that goes with them.
    scratch
        The folder of that file; default: the system's for temporary files.
    kind
        What a batch means.

    Returns the outputs, in memory on ``device`` or above ``LIMIT`` bytes in a mapped file, and the forward passes made.
    """
    held: Tensor | None = None
    writing: _File | None = None
    passes = 0
    with evaluating(model), contextlib.ExitStack() as stack:
        for start in range(0, len(split), batch_size):
            batch = split.batch(torch.arange(start, min(start + batch_size, len(split)))).to(device)
            logits = forward(model, batch.for_teacher if teacher else batch.inputs, kind).float()
            if not passes:
                shape = (len(split), *logits.shape[1:])
                if 4 * logits[0].numel() * len(split) <= LIMIT:
                    held = torch.empty(shape, device=device)
                else:
                    writing = stack.enter_context(_File(path or _scratch(scratch), shape, fingerprint))
            if held is not None:
                held[start : start + len(logits)] = logits
            if writing is not None:
                writing.add(logits)
            passes += 1
    if held is not None:
        return HeldLabels(held, fingerprint), passes
    assert writing is not None
    found = HeldLabels._mapped(writing.path)  # noqa: SLF001
    if path is None:
        found.discard()
    return found, passes


def there_is_room(size: int, folder: Path | None) -> bool:
    """Whether so many bytes of outputs fit into memory, or into half of what is free where the file would lie."""
    where = folder or Path(tempfile.gettempdir())
    while not where.exists():
        where = where.parent
    return size <= LIMIT or 2 * size < shutil.disk_usage(where).free


def _scratch(folder: Path | None) -> Path:
    """A name that a sweep of the folder takes for a file half written, should this process be killed."""
    return (folder or Path(tempfile.gettempdir())) / f".soft-labels.{os.urandom(6).hex()}.part"


class _File:
    """A sealed safetensors file with the tensor ``logits``, written a part at a time. Use ``with``."""

    def __init__(self, path: Path, shape: tuple[int, ...], fingerprint: Mapping[str, str]) -> None:
        self.path = path
        size = 4 * torch.Size(shape).numel()
        about = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
        header = json.dumps(
            {"__metadata__": {**_about(fingerprint), "seal": BLANK}, "logits": about}
        ).encode()
        header += b" " * (-len(header) % 8)
        self._head = len(header).to_bytes(8, "little") + header
        self._half = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._half.open("xb+")
            self._file.write(self._head)
        except OSError as error:
            raise failed(self.path, error) from error
        return self

    def add(self, logits: Tensor) -> None:
        """Write the next samples."""
        try:
            self._file.write(logits.detach().float().cpu().contiguous().numpy().data)
        except OSError as error:
            raise failed(self.path, error) from error

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            if kind is None:
                self._publish()
        except OSError as problem:
            raise failed(self.path, problem) from problem
        finally:
            self._file.close()
            self._half.unlink(missing_ok=True)

    def _publish(self) -> None:
        """Put the digest of the whole in its place, flush, and rename."""
        self._file.seek(0)
        found = hashlib.sha256()
        while part := self._file.read(1 << 20):
            found.update(part)
        self._file.seek(self._head.index(MARK + ZEROS) + len(MARK))
        self._file.write(found.hexdigest().encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._half.replace(self.path)
