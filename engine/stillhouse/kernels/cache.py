"""Where compiled kernels are kept: a folder of the user's own, read only where nobody else can have written to it."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path


def folder() -> Path:
    """``kernels`` in Stillhouse's cache folder, which ``STILLHOUSE_CACHE`` moves; links are followed."""
    from stillhouse.cache import cache_dir

    return (cache_dir() / "kernels").resolve()


def read(name: str) -> bytes | None:
    """What was kept under ``name``; None where there is nothing, where it is damaged, or where others may have written it.

    Machine code is run as it is, and LLVM ends the process over what is damaged: so its digest is looked at, and who owns it.
    """
    path = folder() / name
    if not path.exists():
        return None
    try:
        for place in path.parents:
            _check_owner(place, inner=place == path.parent)
        content = _read_own(path)
    except OSError as error:
        _say_refused(str(path.parent), str(error))
        return None
    digest, _, code = content.partition(b"\n")
    return code if hashlib.sha256(code).hexdigest().encode() == digest else None


def write(name: str, code: bytes) -> bool:
    """Keep ``code``, for this user alone; False where the folder can't be written to.

    Under another name first: a process that looks meanwhile finds all of it or nothing.
    """
    path = folder() / name
    content = hashlib.sha256(code).hexdigest().encode() + b"\n" + code
    try:
        for place in reversed(path.parent.parents):
            if not place.exists():
                place.mkdir(mode=0o755, exist_ok=True)  # whatever the umask leaves open
        path.parent.mkdir(mode=0o700, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{name}")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError:
        return False
    return True


def _read_own(path: Path) -> bytes:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(handle, "rb") as file:
        _check(os.fstat(handle), path)
        return file.read()


def _check_owner(place: Path, *, inner: bool) -> None:
    """The folder itself is writable by its owner alone; in one above it, others may not replace what they don't own."""
    found = place.stat()
    if inner or not found.st_mode & stat.S_ISVTX:
        _check(found, place, others_only=not inner)


def _check(found: os.stat_result, place: Path, *, others_only: bool = False) -> None:
    if os.name != "posix":
        return
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{place} belongs to another user")
    if found.st_mode & (stat.S_IWOTH if others_only else stat.S_IWOTH | stat.S_IWGRP):
        raise PermissionError(f"{place} can be written to by other users")


@lru_cache(maxsize=8)
def _say_refused(where: str, why: str) -> None:
    warnings.warn(
        f"compiled kernels in {where} are not loaded: {why}; expected a folder and files that are your own and that nobody else "
        f"can write to. Fix: chmod -R go-w {where}, or set STILLHOUSE_CACHE to a folder of your own",
        RuntimeWarning,
        stacklevel=2,
    )
