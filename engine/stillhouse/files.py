"""Files that are whole or not there: written beside, flushed to disk, renamed into place."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Replace ``path`` atomically. When the disk is full, what was there stays and nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)  # mkstemp makes it private
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` by indented JSON, atomically."""
    write_bytes(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def write_text(path: Path, content: str) -> None:
    """Replace ``path`` by text, atomically."""
    write_bytes(path, content.encode())
