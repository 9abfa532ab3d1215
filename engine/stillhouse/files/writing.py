"""Writing: a file is replaced whole, or left as it was."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.errors import WriteFailed
from stillhouse.files.seals import BLANK, seal

_HALF = re.compile(r"\..+\.[0-9a-f]{12}\.part")
"""Names of files that are being written."""
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def write_bytes(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace ``path`` atomically, with the permissions that the umask leaves of ``mode``; folders are made.

    Raises WriteFailed (an OSError too), naming the file and what to do; what was there before stays as it was, and
    nothing is left behind.
    """
    half = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(half, _FLAGS, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except OSError as error:
        _discard(half)
        raise failed(path, error) from error
    except BaseException:
        _discard(half)
        raise


def _discard(half: Path) -> None:
    with contextlib.suppress(OSError):
        half.unlink(missing_ok=True)


def failed(path: Path, error: OSError) -> WriteFailed:
    """The error that says which file could not be written, why, and what to do."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        remedy = "free some space; what was written before is whole"
    elif error.errno == errno.EFBIG:
        remedy = "raise the limit on a file's size (ulimit -f); what was written before is whole"
    else:
        remedy = "expected a place that can be written to: mend its permissions, or choose another"
    return WriteFailed(f"{path} can't be written ({error.strerror or error}); {remedy}", error.errno)


def write_text(path: Path, content: str) -> None:
    """Replace ``path`` by text in UTF-8, atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any, *, sealed: bool = False) -> None:
    """Replace ``path`` by indented JSON, atomically.

    A number that is not finite, which JSON has no word for, is written as null.

    sealed
        With a last key ``seal`` that holds the digest of the file; ``content`` is a mapping.
    """
    if sealed:
        content = {**content, "seal": BLANK}
    text = json.dumps(plain(content), indent=2, default=str, allow_nan=False) + "\n"
    write_bytes(path, seal(text.encode()) if sealed else text.encode())


def plain(content: Any) -> Any:
    """``content`` with None for every number that is not finite."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        return [plain(value) for value in content]
    return content


def is_half_written(name: str) -> bool:
    """Whether a file of this name is one that is being written, or was when its process was killed."""
    return _HALF.fullmatch(name) is not None


def sweep(folder: Path, *, older: float = 0.0) -> None:
    """Remove what a kill in the middle of writing left in ``folder``.

    older
        Seconds since it was last written to: where others may be writing, take what no write takes.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if is_half_written(path.name) and time.time() - path.lstat().st_mtime >= older:
                path.unlink(missing_ok=True)
