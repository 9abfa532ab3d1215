"""What is made once and kept on disk by what it was made from: trained teachers, generated data."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

from platformdirs import user_cache_dir
from torch import Tensor

from stillhouse.errors import DamagedFile, StillhouseWarning, WriteFailed
from stillhouse.files import sweep
from stillhouse.files.tensors import read_tensors, write_tensors

CACHE = "STILLHOUSE_CACHE"
_KEY = "made_from"
_ABANDONED = 24 * 3600.0
"""Seconds after which a file that is still being written is what a kill left."""


def cache_dir() -> Path:
    """The folder: ``$STILLHOUSE_CACHE``, else the user's cache folder."""
    return Path(os.environ.get(CACHE) or user_cache_dir("stillhouse")).expanduser()


class Cache:
    """One kind of thing in the cache, such as ``data``: tensors by what they were made from."""

    def __init__(self, kind: str, say: Callable[[str], None] | None = None) -> None:
        self.folder = cache_dir() / kind
        self._say = say or (lambda message: warnings.warn(message, StillhouseWarning, stacklevel=4))

    def path(self, made_from: Mapping[str, object]) -> Path:
        """Where the tensors that are made from this are kept."""
        return self.folder / f"{_digest(_key(made_from))}.safetensors"

    def read(self, made_from: Mapping[str, object]) -> dict[str, Tensor] | None:
        """The tensors as they were kept, or None. A damaged file is told, and taken for none."""
        path = self.path(made_from)
        if not path.exists():
            return None
        try:
            tensors, about = read_tensors(path)
        except DamagedFile as error:
            self._say(f"{error}; it is made anew")
            return None
        return tensors if about.get(_KEY) == _key(made_from) else None

    def write(self, made_from: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors; where that can't be done, say so: what was made is not lost."""
        try:
            write_tensors(self.path(made_from), tensors, {_KEY: _key(made_from)})
        except WriteFailed as error:
            self._say(f"not kept for the next time: {error} (${CACHE} names the folder)")
        sweep(self.folder, older=_ABANDONED)


def made_once(
    kind: str, made_from: Mapping[str, object], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The CPU tensors that ``make`` gives, by name; kept on disk, and read from there the next time.

    kind
        Names the folder, such as ``data``.
    made_from
        All that the tensors depend on, as JSON values: settings, seeds, versions of the libraries that make them
        (torch's and Stillhouse's are added). Where any of it changes, they are made anew.

    A file that is damaged is made anew, and a folder that can't be written to costs only the time; either is told by a
    StillhouseWarning.
    """
    cache = Cache(kind)
    found = cache.read(made_from)
    if found is None:
        found = make()
        cache.write(made_from, found)
    return found


def _key(made_from: Mapping[str, object]) -> str:
    versions = {name: version(name) for name in ("torch", "stillhouse")}
    return json.dumps({**made_from, "versions": versions}, sort_keys=True)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]
