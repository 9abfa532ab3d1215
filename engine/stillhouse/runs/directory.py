"""The run directory: whose it is, whether a run may be made there, and the manifest that explains it.

A run's directory is known by a manifest of ours: JSON with a digest of itself and a ``stillhouse`` entry.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from stillhouse.config import RunConfig, dump, to_yaml
from stillhouse.errors import CheckpointError, DamagedFile
from stillhouse.files import check_seal, digest, read_json, sweep, write_json, write_text
from stillhouse.files.lock import holder, in_use
from stillhouse.kernels import explain
from stillhouse.plugin.dispatch import Plugins
from stillhouse.runs import checkpoint, contents
from stillhouse.runs.contents import (
    CHECKPOINTS,
    COMPRESSION,
    CONFIG,
    CURVE,
    MANIFEST,
    METRICS,
    REPORT,
    SOFT_LABELS,
    STUDENT,
    SUMMARY,
)
from stillhouse.runs.machine import git_state, machine, versions

__all__ = [
    "CHECKPOINTS",
    "COMPRESSION",
    "CONFIG",
    "CURVE",
    "MANIFEST",
    "METRICS",
    "REPORT",
    "SOFT_LABELS",
    "STUDENT",
    "SUMMARY",
]

FORMAT = 1
LABELS = "soft labels: "
"""Before what an origin says of kept labels."""
IN_PYTHON = " (in Python: resume=True, overwrite=True, dir=DIR)"
FREE = (
    "out",
    "name",
    "observers",
    "threads",
    "log_every",
    "checkpoint_every",
    "device",
    "workers",
    "evaluate_batch_size",
)
"""Config keys that a resumed run may change: they don't enter the weights."""
AFTER_DIVERGENCE = ("optimizer.lr", "clip")
"""What a run that diverged may change besides, to go on: it is written down in the manifest's history."""


def look(
    config: RunConfig, *, resume: bool, overwrite: bool, say: Callable[[str], None] = lambda message: None
) -> dict[str, Any] | None:
    """The summary of a run that has already finished, else None. Nothing is written.

    Raises CheckpointError where the directory can't be this run's: it holds another config, or an unfinished
    run and ``resume`` is False, or something that is no run, or no file can be written there; DamagedFile where a file
    of it is not as it was written.
    """
    folder = config.run_dir
    if not holds_run(folder):
        _refuse_foreign(folder)
        _writable(folder)
        return None
    try:
        kept = read_manifest(folder)
    except DamagedFile as error:
        _go_on_without(folder, error, resume=resume, say=say)
        return None
    if kept["stillhouse"].get("clearing"):
        say(f"{folder}: starting over was cut short there; it is done now")
        contents.refuse_others(folder, kept["stillhouse"]["writes"])
    elif overwrite:
        contents.refuse_others(folder, kept["stillhouse"]["writes"])
        _refuse_edited(folder)
    else:
        same_config(kept["config"], config, folder, diverged=resume and diverged(kept))
        if (folder / SUMMARY).exists():
            return _finished(folder, resume=resume, say=say)
        if not resume:
            if (who := holder(folder)) is not None:
                raise in_use(folder, who)
            raise CheckpointError(
                f"{folder} holds an unfinished run of this config; --resume goes on with it, --overwrite starts "
                f"over, out=DIR puts this one elsewhere{IN_PYTHON}"
            )
    _writable(folder)
    return None


def holds_run(folder: Path) -> bool:
    """Whether a run of ours lies there, be its manifest damaged or not.

    One that says nothing any more (emptied, written over) is ours where a checkpoint lies beside it that is.
    """
    try:
        if not (folder / MANIFEST).is_file():
            return False
        if b'"stillhouse"' in (folder / MANIFEST).read_bytes():
            return True
        return any(not check_seal(path.read_bytes()) for path in (folder / CHECKPOINTS).glob("step-*.pt"))
    except OSError:
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as it was written; DamagedFile otherwise."""
    found = read_json(folder / MANIFEST, what="manifest", sealed=True)
    if found.get("stillhouse", {}).get("format") != FORMAT:
        raise DamagedFile(
            f"{folder / MANIFEST} is of format {found.get('stillhouse', {}).get('format')}, this version reads {FORMAT}; "
            "use the version that wrote it, or choose another directory with out=DIR"
        )
    return found


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run, whose files are all as they were written; DamagedFile otherwise."""
    found = read_json(folder / SUMMARY, what="summary", sealed=True)
    for name in (STUDENT, METRICS):
        if name in found["files"] and digest(folder / name) != found["files"][name]:
            raise DamagedFile(f"{folder / name} was changed or damaged since it was written")
    found["dir"] = str(folder)
    return found


def _finished(folder: Path, *, resume: bool, say: Callable[[str], None]) -> dict[str, Any] | None:
    try:
        return read_summary(folder)
    except DamagedFile as error:
        if resume:
            say(f"{error}; made again from the last checkpoint")
            return None
        raise DamagedFile(
            f"{folder} holds this run, finished, but {error}; --resume makes it again from the last checkpoint, "
            f"--overwrite starts over{IN_PYTHON}"
        ) from None


def _go_on_without(folder: Path, error: DamagedFile, *, resume: bool, say: Callable[[str], None]) -> None:
    """A run whose manifest is damaged is taken up by its checkpoint, which holds the config too; else refused."""
    if resume and checkpoint.newest(folder / CHECKPOINTS) is not None:
        say(f"{error}; it is written anew, and the checkpoint says whose run it is")
        return
    raise DamagedFile(
        f"{error}; --resume goes on from the last checkpoint where there is one; to start over, move the directory away "
        "(it can't be told any more what in it may be removed), or choose another with out=DIR"
    )


def _refuse_foreign(folder: Path) -> None:
    # A name with a dot: a lock, a file that a kill cut short, or the file manager's.
    if folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir()):
        raise CheckpointError(
            f"{folder} is not empty and holds no run of this version of stillhouse; choose another with out=DIR"
        )


def _refuse_edited(folder: Path) -> None:
    """A page that someone wrote into is theirs."""
    try:
        written = read_json(folder / SUMMARY, sealed=True).get("files", {}).get(REPORT)
    except DamagedFile:
        return
    if written is not None and (folder / REPORT).is_file() and digest(folder / REPORT) != written:
        raise CheckpointError(
            f"{folder / REPORT} was changed since the run wrote it; move it elsewhere, or choose another directory with "
            "out=DIR"
        )


def _writable(folder: Path) -> None:
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long
        raise CheckpointError(
            f"{folder} can't be made ({error.strerror}); choose another with out=DIR"
        ) from None
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "is no folder" if not there.is_dir() else "is not writable"
        raise CheckpointError(f"{folder} can't be made, {there} {problem}; choose another with out=DIR")


def kept(folder: Path) -> dict[str, Any] | None:
    """The manifest of the run that lies there; None where there is none, or none that can be read."""
    try:
        return read_manifest(folder) if holds_run(folder) else None
    except DamagedFile:
        return None


def claim(config: RunConfig, manifest: dict[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
    """Make the directory this run's, once nothing can be refused any more: what was there stays until then.

    Returns the manifest of the run that goes on there; None where one begins. ``manifest`` gets its history.

    The caller holds the directory's lock. Killed at any moment in here, the directory can be claimed again.
    """
    folder = config.run_dir
    before = kept(folder)
    if before is not None and (overwrite or before["stillhouse"].get("clearing")):
        ours = before["stillhouse"]
        # From here on whatever a kill leaves is neither the old run nor the new one, and says so.
        write_json(folder / MANIFEST, {**before, "stillhouse": {**ours, "clearing": True}}, sealed=True)
        contents.clear(folder, ours["writes"])
        before = None
    elif before is not None:
        manifest["history"] = [*before.get("history", []), *manifest["history"]]
    for place in (folder, folder / CHECKPOINTS, folder / SOFT_LABELS):
        sweep(place)
    write_json(folder / MANIFEST, manifest, sealed=True)
    # Without ``out``: a run that was moved is where it is.
    write_text(folder / CONFIG, to_yaml({key: value for key, value in dump(config).items() if key != "out"}))
    return before


Changes = dict[str, list[Any]]
"""By path, what it was and what it is."""


def changes(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> tuple[Changes, Changes]:
    """What of the config that may, and what of the versions, has changed since a manifest was written."""
    if before is None:
        return {}, {}
    config = differences(before["config"], now["config"])
    versions_ = differences(before["versions"], now["versions"])
    return (
        {path: [old, new] for path, old, new in config if path in AFTER_DIVERGENCE},
        {path: [old, new] for path, old, new in versions_},
    )


def retreat(manifest: Mapping[str, Any]) -> tuple[tuple[str, ...], float]:
    """For a run that diverged: what may change, and the update of the last good checkpoint (-1 where there is none)."""
    sound = manifest["history"][-1]["sound"]
    return AFTER_DIVERGENCE, -1 if sound is None else sound


def same_config(kept: Mapping[str, Any], config: RunConfig, folder: Path, *, diverged: bool) -> None:
    """Raise CheckpointError where a directory's config differs from this one in what enters the weights."""
    if found := differing(kept, config, AFTER_DIVERGENCE if diverged else ()):
        raise CheckpointError(
            f"{folder} holds a run of another config ({found}); "
            f"out=DIR puts this one elsewhere, --overwrite replaces it{IN_PYTHON}"
        )


def diverged(manifest: Mapping[str, Any]) -> bool:
    """Whether the run's last part ended because its loss was not finite."""
    history = manifest.get("history", [])
    return bool(history) and history[-1]["event"] == "diverged"


def differing(kept: Mapping[str, Any], config: RunConfig, free: Collection[str] = ()) -> str:
    """Where a kept config differs from this one in what enters the weights; empty where it does not."""
    found = [
        f"{path}: {old!r} there, {new!r} here"
        for path, old, new in differences(kept, dump(config))
        if path.partition(".")[0] not in FREE and path not in free
    ]
    return "; ".join(found[:5])


def same_origin(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the directory's run was made from other data or another teacher.

    before, now
        As ``origin`` gives them. A config names both; objects that were handed over, and files that a config names,
        may change under it.
    """
    for name, new in now.items():
        if before.get(name) != new:
            kept = name.removeprefix(LABELS)
            what = (
                f"{kept} of soft labels" if kept != name else name if name == "teacher" else f"{name} split"
            )
            raise CheckpointError(
                f"{folder} holds a run with another {what} ({before.get(name)} there, {new} here); "
                f"out=DIR puts this one elsewhere, --overwrite replaces it{IN_PYTHON}"
            )


def origin(data: Mapping[str, str], teacher: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is made from besides its config: digests of the splits and of the teacher's weights, or of its labels.

    teacher
        What the manifest says of it.
    """
    labels = teacher.get("soft_labels", {})
    kept = {f"{LABELS}{name}": value for name, value in labels.items()}
    return {**data, "teacher": teacher.get("digest"), **kept}


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Paths at which two configs differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if old == new else [(path, old, new)]


def manifest(
    config: RunConfig, plugins: Plugins, device: torch.device, writes: Collection[str] = (), **facts: Any
) -> dict[str, Any]:
    """What made the run: versions, plugins, seeds, fingerprints, git state, machine, defaults chosen.

    writes
        The files that plugins say they write; see ``contents.declared``.
    """
    backend, why = explain(device)
    made = {
        "stillhouse": {"kind": "run", "format": FORMAT, "writes": list(writes)},
        "name": config.name,
        "seed": config.seed,
        "versions": versions(),
        "plugins": {plugin.name: plugin.distribution for plugin in plugins.plugins},
        "git": git_state(),
        "machine": machine(device),
        "kernel": {"backend": backend, "why": why},
        "config": dump(config),
        "history": [],
        **facts,
    }
    # As it will be read back: tuples are lists there.
    return dict(json.loads(json.dumps(made, default=str)))
