"""Find, list and load plugins by entry point.

Listing reads the installed distributions' metadata and imports nothing; loading imports the one
module that was named. ``STILLHOUSE_PLUGINS=a,b`` is an allow-list of plugin or distribution names for
what other distributions bring (empty: none of it); Stillhouse's own plugins are always there.
"""

from __future__ import annotations

import io
import os
import re
import time
import traceback
import warnings
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, distributions
from typing import Any, Literal

from stillhouse.errors import PluginError, PluginWarning, nearest

Kind = Literal["method", "task", "observer", "model"]
GROUPS: dict[Kind, str] = {
    "method": "stillhouse.methods",
    "task": "stillhouse.tasks",
    "observer": "stillhouse.observers",
    "model": "stillhouse.models",
}
ALLOW = "STILLHOUSE_PLUGINS"
OWN = "stillhouse"
SLOW = 5.0
"""Seconds of import from which on a plugin is told that it is slow."""


@dataclass(frozen=True)
class Entry:
    """An entry point of one distribution, not imported."""

    kind: Kind
    name: str
    distribution: str
    version: str
    value: str

    def __str__(self) -> str:
        return f"{self.kind} plugin '{self.name}' ({self.distribution} {self.version})"

    def as_dict(self) -> dict[str, str]:
        """The entry as JSON-ready values."""
        return asdict(self)


def entries(kind: Kind | None = None) -> list[Entry]:
    """Every allowed entry, sorted by kind and name; the same name may stand twice.

    A distribution whose metadata can't be read is left out, with a PluginWarning: it is in nobody else's way.
    """
    wanted = {group: name for name, group in GROUPS.items() if kind in (None, name)}
    found = set()
    for installed in distributions():
        try:
            points = [point for point in installed.entry_points if point.group in wanted]
        except Exception as error:  # noqa: BLE001 - importlib.metadata has none of its own for a file it can't parse
            who = f"{installed.metadata['Name']} {installed.version}"
            warnings.warn(
                f"distribution {who}: its entry points can't be read ({type(error).__name__}: {error}); they are left "
                "out: install it again, or uninstall it",
                PluginWarning,
                stacklevel=1,  # one place, so that it is told once
            )
            continue
        # Without a name it is what an interrupted uninstall left behind.
        if not points or "Name" not in installed.metadata:
            continue
        name = installed.metadata["Name"]
        for point in points:
            entry = Entry(wanted[point.group], point.name, name, installed.version, point.value)
            if _allowed(entry):
                found.add(entry)
    order = list(GROUPS)
    return sorted(found, key=lambda entry: (order.index(entry.kind), entry.name, entry.distribution))


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _allowed(entry: Entry) -> bool:
    allow = os.environ.get(ALLOW)
    if allow is None or entry.distribution == OWN:
        return True
    names = {_canonical(name.strip()) for name in allow.split(",") if name.strip()}
    return bool(names & {_canonical(entry.name), _canonical(entry.distribution)})


def duplicates(listed: Iterable[Entry]) -> dict[tuple[Kind, str], list[Entry]]:
    """The names that more than one distribution claims."""
    by_name: dict[tuple[Kind, str], list[Entry]] = {}
    for entry in listed:
        by_name.setdefault((entry.kind, entry.name), []).append(entry)
    return {name: claims for name, claims in by_name.items() if len(claims) > 1}


def find(kind: Kind, name: str) -> Entry:
    """The one entry of that name.

    Raises PluginError for a name that nobody claims (offering the nearest) or that two claim.
    """
    listed = entries(kind)
    claims = [entry for entry in listed if entry.name == name]
    if not claims:
        raise unknown(kind, name, listed)
    if len(claims) > 1:
        who = " and ".join(f"{entry.distribution} {entry.version} ({entry.value})" for entry in claims)
        raise PluginError(
            f"two plugins are called '{name}': {who}; uninstall one, or name the other in {ALLOW}"
        )
    return claims[0]


def unknown(what: str, name: str, listed: Iterable[Entry]) -> PluginError:
    """The refusal of a name that nobody claims, with the nearest one."""
    hidden = f"; {ALLOW}={os.environ[ALLOW]!r} may hide it" if ALLOW in os.environ else ""
    known = {entry.name for entry in listed}
    return PluginError(f"no {what} is called '{name}'{nearest(name, known)}{hidden}")


def load(entry: Entry) -> Any:
    """Import what the entry names.

    Raises PluginError, naming the plugin, its distribution and the line that failed. What the plugin prints
    meanwhile never reaches standard output: it is told in a PluginWarning, as is a slow import.
    """
    if EntryPoint.pattern.match(entry.value) is None:
        raise PluginError(
            f"{entry}: its entry point is '{entry.value}'; expected 'module:Class': mend or uninstall "
            f"{entry.distribution}"
        )
    import stillhouse.api  # noqa: F401 - its time, torch's above all, is none of the plugin's

    printed, started = io.StringIO(), time.perf_counter()
    try:
        with redirect_stdout(printed):
            made = EntryPoint(entry.name, entry.value, GROUPS[entry.kind]).load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may raise anything at import, SystemExit too
        raise _unloadable(entry, error) from error
    seconds = time.perf_counter() - started
    if printed.getvalue():
        first = "".join(printed.getvalue().strip().splitlines()[:1])
        _warn(entry, f"printed {first!r} while it was imported; expected silence: take the print out")
    if seconds > SLOW:
        _warn(
            entry,
            f"took {seconds:.1f} s to import; expected less than {SLOW:.0f}: import heavy packages inside hooks",
        )
    return made


def _warn(entry: Entry, message: str) -> None:
    warnings.warn(f"{entry} {message}", PluginWarning, stacklevel=3)


def _unloadable(entry: Entry, error: BaseException) -> PluginError:
    where = ""
    frames = traceback.extract_tb(error.__traceback__)
    if frames and "importlib" not in frames[-1].filename:
        where = f" at {frames[-1].filename}:{frames[-1].lineno}"
    fix = f"mend or uninstall {entry.distribution}, or drop '{entry.name}' from the config"
    if isinstance(error, ModuleNotFoundError):
        if not _installed(entry.distribution):
            return PluginError(
                f"{entry} was uninstalled after it was listed; install {entry.distribution} again"
            )
        if error.name and error.name != entry.value.partition(":")[0].partition(".")[0]:
            fix = f"install '{error.name}', {fix}"
    what = f"{type(error).__name__}: {error}"
    return PluginError(f"{entry} can't be loaded from {entry.value}: {what}{where}; {fix}")


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
