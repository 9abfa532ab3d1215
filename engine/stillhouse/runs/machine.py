"""What results and times depend on besides the config: versions, the machine, the state of the working directory."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

NAMES = ("stillhouse", "torch", "numpy", "numba", "pluggy", "pydantic", "safetensors")


def versions() -> dict[str, str]:
    """Versions of python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in NAMES:
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


_NOTHING_RUN = (
    "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "protocol.allow=never",
)  # fmt: skip
"""A repository's own config names programs that git runs; none of them may run because somebody trains there."""


def git_state() -> dict[str, Any]:
    """Commit of the working directory's repository, and whether it had changes; empty outside of one.

    The repository may be a stranger's: nothing that its config names is run, and nothing is fetched.
    """
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *_NOTHING_RUN, *words],
            capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=10, check=True, env=env,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        off: list[str] = []
        for name in _filters(git):
            off += ["-c", f"{name}="]
        return {
            "commit": commit,
            "changed": bool(git(*off, "status", "--porcelain", "--ignore-submodules=all")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def _filters(git: Any) -> list[str]:
    """Filters that the config names: git runs one over a file to see whether it changed."""
    try:
        return str(
            git("config", "--name-only", "--get-regexp", r"^filter\..*\.(clean|smudge|process)$")
        ).split("\n")
    except subprocess.CalledProcessError:  # none
        return []
