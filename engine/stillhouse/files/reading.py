"""Reading: one place that says what is wrong with a file, whatever it is."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from stillhouse.errors import DamagedFile
from stillhouse.files.seals import check_seal

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def read_bytes(path: Path, *, what: str = "", mend: str = "", limit: int | None = None) -> bytes:
    """The content of a regular file.

    what, mend
        What the file is, and what to do where it can't be read: they make the message.
    limit
        Most bytes that such a file has.

    Raises DamagedFile for a file that is missing, can't be read, is too large, or is none (a pipe, a device).
    """
    what = what or str(path)
    try:
        handle = os.open(path, _FLAGS)
        with os.fdopen(handle, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise DamagedFile(_said(what, path, "it is no regular file", mend))
            if limit is not None and about.st_size > limit:
                raise DamagedFile(
                    _said(what, path, f"it has {about.st_size:,} bytes, expected at most {limit:,}", mend)
                )
            return file.read()
    except FileNotFoundError:
        raise DamagedFile(_said(what, path, "it is missing", mend)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, DamagedFile):
            raise
        problem = getattr(error, "strerror", None) or str(error)
        raise DamagedFile(_said(what, path, problem, mend)) from None


def read_text(path: Path, *, what: str = "", mend: str = "", limit: int | None = None) -> str:
    """The content of a file in UTF-8, whatever the locale; DamagedFile where it is something else."""
    try:
        return read_bytes(path, what=what, mend=mend, limit=limit).decode()
    except UnicodeDecodeError:
        raise DamagedFile(_said(what or str(path), path, "it is no text in UTF-8", mend)) from None


def read_json(path: Path, *, what: str = "", mend: str = "", sealed: bool = False) -> dict[str, Any]:
    """A JSON object.

    sealed
        Written with a seal, which is checked and left out.

    Raises DamagedFile for anything else.
    """
    content = read_bytes(path, what=what, mend=mend)
    problem = check_seal(content) if sealed else ""
    found: Any = None
    if not problem:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            problem = "it is no JSON"
    if not problem and not isinstance(found, dict):
        problem = f"it holds {type(found).__name__}, expected an object"
    if problem:
        raise DamagedFile(_said(what or str(path), path, problem, mend))
    if sealed:
        found.pop("seal", None)
    return dict(found)


def digest(path: Path) -> str:
    """The SHA-256 of a regular file, read in parts; DamagedFile where it can't be read."""
    found = hashlib.sha256()
    try:
        handle = os.open(path, _FLAGS)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DamagedFile(_said(str(path), path, "it is no regular file", ""))
            while part := file.read(1 << 20):
                found.update(part)
    except FileNotFoundError:
        raise DamagedFile(_said(str(path), path, "it is missing", "")) from None
    except OSError as error:
        raise DamagedFile(_said(str(path), path, error.strerror or str(error), "")) from None
    return found.hexdigest()


def _said(what: str, path: Path, problem: str, mend: str) -> str:
    named = what if str(path) in what else f"{what} {path}"
    return f"{named} can't be read: {problem}{f'; {mend}' if mend else ''}"
