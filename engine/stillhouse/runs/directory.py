"""The run directory: what is in it, whose it is, and the manifest that explains it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from stillhouse.config import RunConfig, dump, to_yaml
from stillhouse.errors import CheckpointError
from stillhouse.files import write_text
from stillhouse.kernels import explain
from stillhouse.plugin.dispatch import Plugins

CONFIG, MANIFEST, METRICS, SUMMARY = "config.yaml", "manifest.json", "metrics.jsonl", "summary.json"
STUDENT, CURVE, REPORT = "student.safetensors", "curve.png", "README.md"
CHECKPOINTS, SOFT_LABELS = "checkpoints", "soft-labels"
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


def look(config: RunConfig, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The summary of a run that has already finished, else None. Nothing is written.

    Raises CheckpointError where the directory can't be this run's: it holds another config, or an unfinished
    run and ``resume`` is False, or no file can be written there.
    """
    folder = config.run_dir
    if (folder / CONFIG).is_file():
        if not overwrite:
            _same_config(config, folder)
            if (folder / SUMMARY).is_file():
                finished: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
                return finished
            if not resume:
                raise CheckpointError(
                    f"{folder} holds an unfinished run of this config; --resume goes on with it, --overwrite starts "
                    f"over, out=DIR puts this one elsewhere{IN_PYTHON}"
                )
    # A name with a dot: a file that a kill cut short, or the file manager's.
    elif folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty and holds no run; choose another with out=DIR")
    _writable(folder)
    return None


def claim(config: RunConfig, *, overwrite: bool) -> None:
    """Make the directory this run's, once nothing can be refused any more: what was there stays until then."""
    folder = config.run_dir
    if overwrite and (folder / CONFIG).is_file():
        shutil.rmtree(folder)
    if not (folder / CONFIG).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, to_yaml(dump(config)))


def _writable(folder: Path) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "is no folder" if not there.is_dir() else "is not writable"
        raise CheckpointError(f"{folder} can't be made, {there} {problem}; choose another with out=DIR")


def _same_config(config: RunConfig, folder: Path) -> None:
    if found := differing(yaml.safe_load((folder / CONFIG).read_text()) or {}, config):
        raise CheckpointError(
            f"{folder} holds a run of another config ({found}); "
            f"out=DIR puts this one elsewhere, --overwrite replaces it{IN_PYTHON}"
        )


def differing(kept: Mapping[str, Any], config: RunConfig) -> str:
    """Where a kept config differs from this one in what enters the weights; empty where it does not."""
    found = [
        f"{path}: {old!r} there, {new!r} here"
        for path, old, new in differences(kept, dump(config))
        if path.partition(".")[0] not in FREE
    ]
    return "; ".join(found[:5])


def same_origin(folder: Path, data: Mapping[str, str], teacher: str | None) -> None:
    """Raise CheckpointError where the directory's run was made from other data or another teacher.

    A config names both; objects that were handed over, and files that a config names, may change under it.
    """
    if not (folder / MANIFEST).is_file():
        return
    kept = json.loads((folder / MANIFEST).read_text())
    before = {**kept["data"], "teacher": kept["teacher"].get("digest")}
    for name, new in {**data, "teacher": teacher}.items():
        if before.get(name) != new:
            what = name if name == "teacher" else f"{name} split"
            raise CheckpointError(
                f"{folder} holds a run with another {what} (digest {before.get(name)} there, {new} here); "
                f"out=DIR puts this one elsewhere, --overwrite replaces it{IN_PYTHON}"
            )


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Paths at which two configs differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if old == new else [(path, old, new)]


def manifest(config: RunConfig, plugins: Plugins, device: torch.device, **facts: Any) -> dict[str, Any]:
    """What made the run: versions, plugins, seeds, fingerprints, git state, machine, defaults chosen."""
    backend, why = explain(device)
    return {
        "name": config.name,
        "seed": config.seed,
        "versions": {"python": platform.python_version(), **_versions()},
        "plugins": {plugin.name: plugin.distribution for plugin in plugins.plugins},
        "git": git_state(),
        "machine": machine(device),
        "kernel": {"backend": backend, "why": why},
        **facts,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("stillhouse", "torch", "numpy", "numba", "pluggy", "pydantic", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The machine as far as results and times depend on it."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def git_state() -> dict[str, Any]:
    """Commit of the working directory's repository, and whether it had changes; empty outside of one."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}
