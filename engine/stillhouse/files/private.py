"""Folders and files that nobody else may write to: for what is run when it is read, such as machine code."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from stillhouse.errors import NotPrivate


def private_folder(path: Path) -> Path:
    """Make ``path`` (and its parents) for this user alone (0700), and check it.

    A folder that is there already is used if it is this user's, or root's, and nobody else may write to it.

    Raises NotPrivate otherwise, and WriteFailed (an OSError) where it can't be made.
    """
    from stillhouse.files.writing import failed

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise failed(path, error) from error
    if problem := not_private(path):
        raise NotPrivate(f"{problem}; expected a folder of your own that nobody else may write to")
    return path


def not_private(path: Path) -> str:
    """Why somebody else could have written ``path``, or could put another in its place; empty where nobody could.

    The path itself must be this user's or root's, and writable by nobody else; so must every folder above it, save that
    a shared folder with the sticky bit (as /tmp) is good enough above a folder: nobody can rename what is not theirs
    there. Windows has no such bits, and its user folders are private by default: nothing is refused there.
    """
    if not hasattr(os, "getuid"):
        return ""
    own = (0, os.getuid())
    try:
        path = Path(os.path.realpath(path))
        for here in (path, *path.parents):
            about = here.stat()
            if about.st_uid not in own:
                return f"{here} belongs to another user ({about.st_uid})"
            sticky = stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX and here != path
            # A file in a shared folder is another matter: anyone may have put it there before.
            direct = here == path.parent and not path.is_dir()
            if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and (direct or not sticky):
                return f"{here} may be written to by others (mode {stat.S_IMODE(about.st_mode):o})"
    except OSError as error:
        return f"{path} can't be looked at ({error.strerror or error})"
    return ""
