"""What a cell's figures are made from besides its config: sources, versions, the machine.

The sources are what counts: a plugin that is edited makes its cells anew, and an edit of the report or the command line
makes none. They are digested by package, Stillhouse less what only plans, places and shows runs, and the package of
every plugin in use; beside them stand the versions of the libraries that those packages import.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path
from sys import stdlib_module_names
from typing import Any

import torch
from pydantic import BaseModel

import stillhouse
from stillhouse.config import STRICT
from stillhouse.plugin.catalog import entries
from stillhouse.runs.resolve import pick_device

LIBRARIES = ("torch", "numpy", "numba", "torchmetrics")
"""Of those that Stillhouse imports: what figures depend on."""
BESIDE = ("bench", "cli", "scaffold", "study", "testing")
"""Parts of Stillhouse that make no figure, less ``study/work.py``, which takes them from a run."""
NOT_INSTALLED = "not installed"
_IMPORT = re.compile(rb"^\s*(?:from|import)\s+([A-Za-z_]\w*)", re.MULTILINE)


class Origin(BaseModel):
    """What one config's figures depend on here.

    code
        By package: a digest of its sources.
    versions
        By distribution, and ``python``'s.
    machine
        The GPU's name or ``cpu``, and the CPU threads in force.
    """

    model_config = STRICT
    code: dict[str, str]
    versions: dict[str, str]
    machine: dict[str, str | int]


class Sources:
    """The packages of plugins and of Stillhouse, each read once: one of these serves a whole plan."""

    def __init__(self) -> None:
        self._packages: dict[str, tuple[str, set[str]]] = {}
        self._versions: dict[str, tuple[str, str]] = {}
        self._plugins = entries()

    def of(self, config: Mapping[str, Any]) -> Origin:
        """The origin of a resolved config's figures."""
        named = _named(config)
        used = [entry for entry in self._plugins if entry.name in named]
        packages = {"stillhouse", *(entry.value.partition(":")[0].partition(".")[0] for entry in used)}
        libraries = {*LIBRARIES, "stillhouse", *(entry.distribution for entry in used)}
        read: dict[str, tuple[str, set[str]]] = {}
        while missing := sorted(packages - set(read)):  # a module that no distribution brings is source too
            for name in missing:
                read[name] = self._package(name)
                imported = read[name][1] if name != "stillhouse" else set()
                loose = {one for one in imported if self._version(one)[1] == NOT_INSTALLED}
                packages |= {one for one in loose if _files(one)[1]}
                libraries |= imported - loose
        device = pick_device(config["device"])
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return Origin(
            code={name: digest for name, (digest, _) in read.items()},
            versions={"python": ".".join(platform.python_version_tuple()[:2])}
            | dict(sorted(self._version(name) for name in libraries)),
            machine={"device": name, "threads": config.get("threads") or torch.get_num_threads()},
        )

    def _version(self, name: str) -> tuple[str, str]:
        """The distribution that is called so, or brings the module, with its version."""
        if name not in self._versions:
            self._versions[name] = _version(name)
        return self._versions[name]

    def _package(self, name: str) -> tuple[str, set[str]]:
        if name not in self._packages:
            self._packages[name] = _read(name)
        return self._packages[name]


def _named(config: Any) -> set[str]:
    """Whatever a config calls by name, in a method's settings too: some are plugins."""
    if isinstance(config, Mapping):
        own = {config["name"]} if isinstance(config.get("name"), str) else set()
        return own.union(*(_named(value) for value in config.values()))
    return set().union(*(_named(value) for value in config)) if isinstance(config, list | tuple) else set()


def _read(package: str) -> tuple[str, set[str]]:
    """A digest of the package's sources, and the outside modules that they import."""
    made, imported = hashlib.sha256(), set()
    root, files = _files(package)
    for path in sorted(files):
        content = path.read_bytes()
        made.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
        if path.suffix == ".py":
            imported |= {match.decode() for match in _IMPORT.findall(content)}
    return made.hexdigest()[:16], imported - {package, "stillhouse"} - stdlib_module_names


def _files(package: str) -> tuple[Path, list[Path]]:
    """Where the package is, and its files, tables and the like among them; of a module alone, that."""
    if package == "stillhouse":
        root = Path(stillhouse.__file__).parent
        return root, [
            path
            for path in root.rglob("*.py")
            if (place := path.relative_to(root).parts)[0] not in BESIDE or place == ("study", "work.py")
        ]
    spec = find_spec(package)
    roots = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or []]
    if roots:
        return roots[0], [
            path for path in roots[0].rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
    if spec is None or spec.origin is None:
        return Path(), []
    return Path(spec.origin).parent, [Path(spec.origin)]


def _version(name: str) -> tuple[str, str]:
    try:
        return name, version(name)
    except PackageNotFoundError:  # a module of another name, as sklearn is scikit-learn's
        for installed in distributions():
            if f"\n{name}/__init__.py," in f"\n{installed.read_text('RECORD')}":
                return installed.metadata["Name"], installed.version
        return name, NOT_INSTALLED


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], there: str = "there") -> list[str]:
    """In words, what two cells of one config are made from that is not the same: each ``made_from``."""
    told = []
    for part, what in (
        ("versions", ""),
        ("code", "the code of "),
        ("machine", "the machine's "),
        ("data", ""),
    ):
        for name in sorted({*ours[part], *theirs[part]}):
            if ours[part].get(name) != theirs[part].get(name):
                told.append(f"{what}{name} is {theirs[part].get(name)} {there}, {ours[part].get(name)} here")
    if ours["teacher"] != theirs["teacher"]:
        told.append(f"the teacher is {theirs['teacher']} {there}, {ours['teacher']} here")
    return told
