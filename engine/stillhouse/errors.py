"""The errors that a user can mend. Each message says what was got, what was expected, how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StillhouseError(ValueError):
    """Something that a user can mend; the command line prints it without a traceback."""


class ConfigError(StillhouseError):
    """A configuration that can't be run as it stands."""


class PluginError(StillhouseError):
    """A plugin that can't be found, loaded or trusted; the message names it and its distribution."""


class PluginWarning(UserWarning):
    """A plugin that works and behaves badly, named with its distribution."""


class DataError(StillhouseError):
    """Data that can't be trained on."""


class Diverged(StillhouseError):
    """A loss term is NaN or infinite; the last good checkpoint is kept."""


class CheckpointError(StillhouseError):
    """A checkpoint or a run directory that can't be read, or is another run's."""


class MissingExtra(StillhouseError):
    """An optional dependency that is not installed; the message names the extra."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f"{feature} needs {package}: pip install 'stillhouse[{extra}]'")


def nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean 'alpha'?`` for the nearest of ``names``, or the list of them."""
    known = sorted(names)
    match = difflib.get_close_matches(name, known, n=1)
    if match:
        return f"; did you mean '{match[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""
