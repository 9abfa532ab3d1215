"""Where compiled kernels are kept: a folder of the user's own, read only where nobody else can have written to it."""

from __future__ import annotations

import hashlib
import os
import stat
from functools import lru_cache
from pathlib import Path

from stillhouse.files.writing import sweep, write_bytes
from stillhouse.kernels.errors import warn

ABANDONED = 3600.0  # seconds after which what is half written is what a kill left


def folder() -> Path:
    """``kernels`` in Stillhouse's cache folder, which ``STILLHOUSE_CACHE`` moves; links are followed."""
    from stillhouse.cache import cache_dir

    return Path(os.path.realpath(cache_dir() / "kernels"))


def read(name: str) -> bytes | None:
    """What was kept under ``name``; None where there is nothing, where it is damaged, or where others may have written it.

    Machine code is run as it is, and LLVM ends the process over what is damaged: so its digest is looked at, and who owns it.
    """
    path = folder() / name
    try:
        path.lstat()
        for place in path.parents:
            _check(place.stat(), place, others_only=place != path.parent)
        content = _read_own(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        _say_refused(str(path), str(error))
        return None
    digest, _, code = content.partition(b"\n")
    return code if _digest(name, code) == digest else None


def write(name: str, code: bytes) -> bool:
    """Keep ``code``, for this user alone; False where the folder can't be written to."""
    path = folder() / name
    try:
        for place in reversed(path.parent.parents):
            if not place.exists():
                place.mkdir(mode=0o755, exist_ok=True)  # whatever the umask leaves open
        path.parent.mkdir(mode=0o700, exist_ok=True)
        sweep(path.parent, older=ABANDONED)
        write_bytes(path, _digest(name, code) + b"\n" + code, mode=0o600)
    except OSError:
        return False
    return True


def _digest(name: str, code: bytes) -> bytes:
    """Of the name too: another kernel's code under it takes other arguments."""
    return hashlib.sha256(name.encode() + b"\n" + code).hexdigest().encode()


def _read_own(path: Path) -> bytes:
    if path.is_symlink():
        raise PermissionError(f"{path} is a symbolic link")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(handle, "rb") as file:
        _check(os.fstat(handle), path)
        return file.read()


def _check(found: os.stat_result, place: Path, *, others_only: bool = False) -> None:
    """``others_only``: of a folder above, in which others may not replace what they don't own."""
    if os.name != "posix" or (others_only and found.st_mode & stat.S_ISVTX):
        return
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{place} belongs to another user")
    if found.st_mode & (stat.S_IWOTH if others_only else stat.S_IWOTH | stat.S_IWGRP):
        raise PermissionError(f"{place} can be written to by other users (chmod go-w {place})")


@lru_cache(maxsize=8)
def _say_refused(path: str, why: str) -> None:
    warn(
        f"the compiled kernel {path} is not loaded: {why}; expected a folder and a file that are your own and that nobody else can "
        "write to. Fix: mend that, or delete what is there, so that it is compiled anew; or set STILLHOUSE_CACHE to a folder of your own"
    )
