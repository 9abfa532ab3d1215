"""``metrics.jsonl``: a row for each logged update and each look at the validation split, in the order they came."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.errors import DamagedFile
from stillhouse.files import read_bytes, write_bytes
from stillhouse.files.writing import failed, plain


class Metrics:
    """Writes the rows (nowhere where ``path`` is None), and knows the digest of what it wrote.

    A checkpoint holds the length and the digest of the file as it was: a resume drops what came after, and finds out
    if anything before was changed.
    """

    def __init__(self, path: Path | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = path
        self._length, self._digest = 0, hashlib.sha256()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; WriteFailed where the disk is full, and a resume then drops what was cut short."""
        self.rows.append(dict(row))
        if self._path is None:
            return
        line = (json.dumps(plain(row), allow_nan=False) + "\n").encode()
        try:
            with self._path.open("ab") as file:
                file.write(line)
        except OSError as error:
            raise failed(self._path, error) from error
        self._length += len(line)
        self._digest.update(line)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"bytes": self._length, "sha256": self._digest.hexdigest()}

    def resume(self, state: Mapping[str, Any] | None) -> str:
        """Cut the file back to what it was at a checkpoint (None: to nothing), and read its rows.

        Returns what there is to say. Raises DamagedFile where the rows before are not as they were written.
        """
        if self._path is None:
            return ""
        if state is None:
            self._path.unlink(missing_ok=True)
            return ""
        if not self._path.exists():
            return "" if not state["bytes"] else f"{self._path} is gone: its rows begin here"
        content = read_bytes(self._path)[: state["bytes"]]
        if hashlib.sha256(content).hexdigest() != state["sha256"]:
            raise DamagedFile(
                f"{self._path} was changed or damaged since it was written: its first {state['bytes']} bytes are not those "
                "that the checkpoint knows of; put them back, or move the file away: the run goes on, and its rows begin there"
            )
        self.rows = rows(content, self._path)
        write_bytes(self._path, content)
        self._length, self._digest = len(content), hashlib.sha256(content)
        return ""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; none where there is no such file.

    A last line without an end, which a kill cut short, is left out. Raises DamagedFile, naming the line, for any other
    line that is no row.
    """
    return rows(read_bytes(path, what="metrics"), path) if path.exists() else []


def rows(content: bytes, path: Path) -> list[dict[str, Any]]:
    """The rows in ``content``; see ``read_rows``."""
    found = []
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DamagedFile(
                f"{path}:{number} is no row of metrics: it was changed or damaged; mend the line, or move the file away"
            )
        found.append(row)
    return found
