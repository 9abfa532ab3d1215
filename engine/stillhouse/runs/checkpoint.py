"""Checkpoints: written whole, with a digest, read without pickle, bound to the run's config."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from stillhouse.errors import CheckpointError, DamagedFile, WriteFailed
from stillhouse.files import BLANK, check_seal, read_bytes, seal, sweep, write_bytes

KEEP = 2
"""How many checkpoints stay on disk: should the newest be damaged, the one before is still there."""
NAME = re.compile(r"step-\d{9,}\.pt")
_END = b"PK\x05\x06"
"""How the last record of a zip without a comment begins, 22 bytes before its end."""


def write(folder: Path, step: int, content: Mapping[str, Any], keep: Collection[int] = ()) -> Path:
    """Write ``step-N.pt`` atomically, then drop all but the newest two.

    keep
        Steps of further checkpoints that stay: the rest of the run may have to go on from them.

    A failure (a full disk) leaves the earlier ones as they were and raises CheckpointError.
    """
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    path = folder / f"step-{step:09d}.pt"
    try:
        write_bytes(path, _sealed(buffer.getvalue()))
    except WriteFailed as error:
        kept = newest(folder)
        still = f"the one of step {step_of(kept)} is still good" if kept else "there was none before"
        raise CheckpointError(f"checkpoint {error}; {still}: then go on with --resume") from error
    for old in checkpoints(folder)[:-KEEP]:
        if step_of(old) not in keep:
            old.unlink(missing_ok=True)
    return path


def _sealed(content: bytes) -> bytes:
    """The archive with its digest as the zip's comment: torch reads it as before."""
    assert content[-22:-18] == _END, "torch.save writes a zip without a comment"
    comment = BLANK.encode()
    return seal(content[:-2] + len(comment).to_bytes(2, "little") + comment)


def tidy(folder: Path) -> None:
    """Remove what a kill in the middle of writing left behind."""
    sweep(folder)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), key=step_of)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint, or None."""
    return max(checkpoints(folder), default=None, key=step_of)


def step_of(path: Path) -> int:
    """The update that a checkpoint was written after."""
    return int(path.stem.removeprefix("step-"))


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint as it was written; tensors and plain values only, no code.

    Raises DamagedFile for one that is truncated, changed, or was not written by this engine.
    """
    content = read_bytes(path, what="checkpoint")
    if problem := check_seal(content):
        raise DamagedFile(
            f"checkpoint {path} can't be read: {problem}; it is truncated, or was not written by stillhouse"
        )
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever a file of another version makes torch raise
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFile(
            f"checkpoint {path} can't be read ({problem}); it was written by another version"
        ) from None
    if not isinstance(found, dict) or "position" not in found or "config" not in found:
        raise DamagedFile(f"{path} holds no checkpoint of stillhouse")
    return found
