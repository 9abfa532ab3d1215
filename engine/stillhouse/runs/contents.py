"""What in a run directory is Stillhouse's, by name; all else is somebody's, and is never removed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from stillhouse.errors import CheckpointError, PluginError
from stillhouse.files import read_bytes
from stillhouse.files.lock import LOCK
from stillhouse.files.writing import is_half_written

CONFIG, MANIFEST, METRICS, SUMMARY = "config.yaml", "manifest.json", "metrics.jsonl", "summary.json"
STUDENT, CURVE, REPORT, COMPRESSION = "student.safetensors", "curve.png", "README.md", "compression.md"
CHECKPOINTS, SOFT_LABELS = "checkpoints", "soft-labels"
REPORT_MARK = "<!-- written by stillhouse -->"
"""Last line of a run's README.md: one without it is somebody's."""
WRITES = (
    CONFIG, MANIFEST, METRICS, SUMMARY, STUDENT, CURVE, REPORT, COMPRESSION, f"{CHECKPOINTS}/step-*.pt", f"{SOFT_LABELS}/*.safetensors",
    f"{SOFT_LABELS}/*.json",
)  # fmt: skip
"""What the engine writes. Plugins name theirs in ``writes``."""
_PATTERN = re.compile(r"[A-Za-z0-9_][^/\\*]*(/[^/\\*]*\*?[^/\\*]*)?")


def declared(plugins: Iterable[object]) -> tuple[str, ...]:
    """The files that methods and observers say (in ``writes``) that they write to the run directory.

    Each is a file's name or ``folder/name``, in which one ``*`` may stand. Raises PluginError for anything else.
    """
    found: list[str] = []
    for plugin in plugins:
        for pattern in getattr(plugin, "writes", ()):
            if not isinstance(pattern, str) or not _PATTERN.fullmatch(pattern):
                raise PluginError(
                    f"{type(plugin).__name__}.writes holds {pattern!r}; expected names as in 'weights.json' or "
                    "'tensorboard/events.*', inside of the run directory"
                )
            found.append(pattern)
    return tuple(dict.fromkeys(found))


def ours(folder: Path, writes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """What lies in the directory: files that are Stillhouse's, and what is somebody's.

    Hidden entries of others (``.git``) are in neither: they are left where they are.
    """
    known = (*WRITES, *(pattern for pattern in writes if _PATTERN.fullmatch(pattern)))
    folders = {PurePosixPath(pattern).parts[0] for pattern in known if "/" in pattern}
    own: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name == LOCK:
            continue
        if path.name in folders and path.is_dir() and not path.is_symlink():
            for inner in sorted(path.iterdir()):
                (own if _known(f"{path.name}/{inner.name}", inner, known) else others).append(inner)
        elif _known(path.name, path, known):
            own.append(path)
        elif not path.name.startswith("."):
            others.append(path)
    return own, others


def _known(name: str, path: Path, known: Sequence[str]) -> bool:
    if path.is_dir() and not path.is_symlink():
        return False
    if is_half_written(path.name):
        return True
    if name == REPORT:
        return is_our_page(path)
    return any(fnmatchcase(name, pattern) for pattern in known)


def is_our_page(path: Path) -> bool:
    """Whether a README.md may be written there: there is none, or one of ours."""
    return not path.exists() or REPORT_MARK.encode() in read_bytes(path)


def refuse_others(folder: Path, writes: Sequence[str]) -> None:
    """CheckpointError where something lies in the directory that Stillhouse did not write."""
    _, others = ours(folder, writes)
    if others:
        named = ", ".join(str(path.relative_to(folder)) for path in others[:5])
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise CheckpointError(
            f"{folder} holds what stillhouse did not write ({named}{more}), and nothing there was removed; move that "
            "elsewhere, or choose another directory with out=DIR"
        )


def clear(folder: Path, writes: Sequence[str]) -> None:
    """Remove, by name, what Stillhouse wrote, save the manifest: while it is there, the directory is known as a run's."""
    own, _ = ours(folder, writes)
    for path in own:
        if path != folder / MANIFEST:
            path.unlink(missing_ok=True)
    for inner in {path.parent for path in own} - {folder}:
        if not any(inner.iterdir()):
            inner.rmdir()
