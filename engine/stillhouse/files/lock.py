"""One run at a time in a directory: a file that is locked for the run's life, and says who holds it.

The lock is the operating system's (flock): it ends with the process, however that ends, so a file that a killed run
left behind holds nobody up. On network file systems it holds only as far as they keep flock between machines.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stillhouse.errors import CheckpointError
from stillhouse.files.writing import failed

LOCK = ".stillhouse.lock"
_GLANCE = 0.5
"""Seconds for which whoever only looks may hold the file."""
_ORPHANS = 10.0
"""Seconds for which the workers of a process that was killed may outlive it."""
_HELD = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class InUse(CheckpointError):
    """Another process runs in this directory."""


class Lock(contextlib.AbstractContextManager["Lock"]):
    """The directory, held by this process; made where it was not there. Use ``with``, or ``release``."""

    def __init__(self, folder: Path) -> None:
        """Raises InUse where another process (or another run of this one) holds the directory."""
        self.folder = folder
        self._made = _make(folder)
        try:
            self._handle = self._take()
        except BaseException:
            self._unmake()
            raise
        _write_who(self._handle)

    def _take(self) -> int:
        path, started = self.folder / LOCK, time.monotonic()
        while True:
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            except OSError as error:
                raise failed(path, error) from error
            taken = _locked(handle, path)
            if taken and _same_file(handle, path):
                return handle
            os.close(handle)
            if taken:  # whoever held it removed the file meanwhile
                continue
            who = _who(path)
            patience = _ORPHANS if who and not alive(who) else _GLANCE
            if time.monotonic() - started > patience:
                raise in_use(self.folder, who)
            time.sleep(0.02)

    def check(self) -> None:
        """Raise CheckpointError where the directory is no longer the one that was locked: what is written goes by its path."""
        if self._handle >= 0 and not _same_file(self._handle, self.folder / LOCK):
            raise CheckpointError(
                f"{self.folder} is no longer the directory that this run holds: it was moved, or removed, while the run went "
                "on; nothing more is written. Go on with --resume where it lies now"
            )

    def release(self) -> None:
        """Let others run there; a directory that was made and that nothing was written to is removed."""
        if self._handle < 0:
            return
        with contextlib.suppress(OSError):
            if _same_file(self._handle, self.folder / LOCK):  # else it is another run's by now
                (self.folder / LOCK).unlink()
        os.close(self._handle)
        self._handle = -1
        self._unmake()

    def _unmake(self) -> None:
        with contextlib.suppress(OSError):  # one that is not empty stays
            for folder in reversed(self._made):
                folder.rmdir()

    def __exit__(self, *error: object) -> None:
        self.release()


def holder(folder: Path) -> dict[str, Any] | None:
    """Who runs in the directory now; None where nobody does. Nothing is written."""
    path = folder / LOCK
    try:
        handle = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return None
    try:
        return None if _locked(handle, path, shared=True) else _who(path)
    finally:
        os.close(handle)


def in_use(folder: Path, who: dict[str, Any] | None) -> InUse:
    """The error that says who runs in the directory."""
    return InUse(
        f"{folder} is in use: {described(who)} runs there; wait for it, stop it, or choose another place with out=DIR "
        "(in Python: dir=DIR)"
    )


def described(who: dict[str, Any] | None) -> str:
    """``process 12 on host, since ...``."""
    if not who:
        return "another process"
    return f"process {who.get('pid')} on {who.get('host')}, since {who.get('started')},"


def alive(who: dict[str, Any]) -> bool:
    """Whether the process that wrote this may still run: yes where another machine can't be asked."""
    if who.get("host") != socket.gethostname():
        return True
    if who.get("boot") != _boot():
        return False
    try:
        os.kill(int(who["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, KeyError, ValueError, TypeError):
        return True
    return True


def _make(folder: Path) -> list[Path]:
    """Make the folder with its parents; those that were made, the outermost first."""
    made: list[Path] = []
    try:
        for path in reversed([folder, *folder.parents]):
            if not path.is_dir():
                path.mkdir(exist_ok=True)
                made.append(path)
    except OSError as error:
        raise failed(folder, error) from error
    return made


def _locked(handle: int, path: Path, *, shared: bool = False) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, 1 << 30, os.SEEK_SET)  # far behind what stands there, which others may read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _NO_LOCKS:  # a file system without locks: what the file says is all there is
            who = _who(path)
            return who is None or not alive(who)
        raise
    return True


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _write_who(handle: int) -> None:
    who = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "boot": _boot(),
    }
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, (json.dumps(who) + "\n").encode())


def _who(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _boot() -> str:
    """Names this start of the machine, where the system tells: a process id from before is nobody's."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
