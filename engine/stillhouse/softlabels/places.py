"""Where a store lies: a folder, or a URI that fsspec opens. Files are whole or not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from stillhouse.cache import cache_dir
from stillhouse.errors import DamagedFile, MissingExtra, WriteFailed
from stillhouse.files import BLANK, check_seal, read_bytes, seal, sweep, write_bytes


class Place(Protocol):
    """A flat folder of files."""

    def __str__(self) -> str: ...

    def names(self) -> list[str]:
        """Every file's name, sorted; empty where there is no such folder."""

    def write(self, name: str, content: bytes) -> None:
        """Publish a file whole; WriteFailed where it can't be."""

    def read(self, name: str) -> bytes:
        """A file's content; DamagedFile where it is missing or can't be read."""

    def local(self, name: str, sha256: str, *, anew: bool = False) -> Path:
        """A file of this digest on this machine, fetched if need be; whoever reads it checks the digest.

        anew
            Fetch it again, whatever is kept here of it.
        """

    def remove(self, name: str) -> None:
        """Remove a file."""


class Folder:
    """A folder of this machine's file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        try:
            return sorted(item.name for item in self.path.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DamagedFile(f"soft labels {self.path} can't be read: {error.strerror or error}") from None

    def write(self, name: str, content: bytes) -> None:
        write_bytes(self.path / name, content)

    def read(self, name: str) -> bytes:
        return read_bytes(self.path / name, what="soft labels")

    def local(self, name: str, sha256: str, *, anew: bool = False) -> Path:
        return self.path / name

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a killed writer left half written."""
        sweep(self.path)


class Remote:
    """A URI such as ``s3://bucket/labels``. Shards are fetched once into the cache folder, by their digest."""

    def __init__(self, uri: str) -> None:
        try:
            import fsspec
        except ImportError:
            raise MissingExtra(f"soft labels at {uri}", "fsspec", "remote") from None
        self.uri = uri.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.uri)
        except (ImportError, ValueError) as error:
            raise DamagedFile(f"soft labels {uri} can't be reached: {error}") from None

    def __str__(self) -> str:
        return self.uri

    def names(self) -> list[str]:
        try:
            self._files.invalidate_cache()
            found = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        except Exception as error:  # noqa: BLE001 each file system has errors of its own
            raise DamagedFile(f"soft labels {self.uri} can't be read: {error}") from None
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)

    def write(self, name: str, content: bytes) -> None:
        try:
            self._files.pipe_file(f"{self._root}/{name}", content)  # an object is there whole, or not at all
        except Exception as error:  # noqa: BLE001
            raise WriteFailed(f"{self.uri}/{name} can't be written: {error}") from None

    def read(self, name: str) -> bytes:
        try:
            return bytes(self._files.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            raise DamagedFile(f"soft labels {self.uri}/{name} can't be read: it is missing") from None
        except Exception as error:  # noqa: BLE001
            raise DamagedFile(f"soft labels {self.uri}/{name} can't be read: {error}") from None

    def local(self, name: str, sha256: str, *, anew: bool = False) -> Path:
        kept = cache_dir() / "soft-labels" / f"{sha256}.safetensors"
        if anew or not kept.is_file():
            write_bytes(kept, self.read(name))
        return kept

    def remove(self, name: str) -> None:
        self._files.rm_file(f"{self._root}/{name}")


def place(where: str | Path | Place) -> Place:
    """The folder, or the URI, that ``where`` names."""
    if isinstance(where, str | Path):
        return Remote(str(where)) if "://" in str(where) else Folder(Path(where))
    return where


def sealed(content: Mapping[str, Any]) -> bytes:
    """JSON that holds a digest of itself as its last key, ``seal``."""
    return seal((json.dumps({**content, "seal": BLANK}, indent=1) + "\n").encode())


def unsealed(content: bytes, what: str) -> dict[str, Any]:
    """The object that ``sealed`` wrote; DamagedFile, naming ``what``, for anything else."""
    problem = check_seal(content)
    found: Any = None
    if not problem:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            problem = "it is no JSON"
    if not problem and not isinstance(found, dict):
        problem = "it is no JSON object"
    if problem:
        raise DamagedFile(f"{what} can't be read: {problem}")
    found.pop("seal", None)
    return dict(found)


def sha256(content: bytes) -> str:
    """The digest of a file's content."""
    return hashlib.sha256(content).hexdigest()
