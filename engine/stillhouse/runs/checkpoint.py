"""Checkpoints: written whole, read without pickle, bound to the run's config."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stillhouse.errors import CheckpointError
from stillhouse.files import write_bytes

KEEP = 2
"""How many checkpoints stay on disk: should the newest be damaged, the one before is still there."""


def write(folder: Path, step: int, content: Mapping[str, Any]) -> Path:
    """Write ``step-N.pt`` atomically, then drop all but the newest two.

    A failure (a full disk) leaves the earlier ones as they were and raises CheckpointError.
    """
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    path = folder / f"step-{step:09d}.pt"
    try:
        write_bytes(path, buffer.getvalue())
    except OSError as error:
        kept = newest(folder)
        still = f"the one of step {step_of(kept)} is still good" if kept else "there was none before"
        raise CheckpointError(
            f"checkpoint {path} could not be written ({error.strerror or error}); {still}: "
            "free some space, then go on with --resume"
        ) from error
    for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
        old.unlink()
    return path


def tidy(folder: Path) -> None:
    """Remove what a kill in the middle of writing left behind."""
    for half in folder.glob(".step-*"):
        half.unlink()


def newest(folder: Path) -> Path | None:
    """The newest checkpoint, or None."""
    return max(folder.glob("step-*.pt"), default=None)


def step_of(path: Path) -> int:
    """The update that a checkpoint was written after."""
    return int(path.stem.removeprefix("step-"))


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint; tensors and plain values only, no code.

    Raises CheckpointError for one that is truncated or was not written by this engine.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever a damaged file makes torch raise
        earlier = [step_of(p) for p in sorted(path.parent.glob("step-*.pt")) if p < path]
        then = f"the run then goes on from step {earlier[-1]}" if earlier else "the run then starts over"
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoint {path} can't be read ({problem}); it is truncated or was not written by "
            f"stillhouse. Remove it and call --resume again: {then}"
        ) from None
    if not isinstance(content, dict) or "position" not in content or "config" not in content:
        raise CheckpointError(f"{path} holds no checkpoint of stillhouse; remove it")
    return content
