"""The errors that a user can mend. Each message says what was got, what was expected, how to mend it."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


def printable(text: str) -> str:
    """``text`` with control characters as escapes: names in files and configs may be written to move a terminal's cursor.

    Line ends and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in _CONTROL
        else _escaped(character)
        for character in text
    )


_CONTROL = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories: control, format (among them those that turn the direction of text), lone surrogates."""


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]


class StillhouseError(ValueError):
    """Something that a user can mend; the command line prints it without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(StillhouseError):
    """A configuration that can't be run as it stands."""


class PluginError(StillhouseError):
    """A plugin that can't be found, loaded or trusted; the message names it and its distribution."""


class StillhouseWarning(UserWarning):
    """Something to know that stops nothing; the command line prints it as a note."""


class PluginWarning(StillhouseWarning):
    """A plugin that works and behaves badly, named with its distribution."""


class DataError(StillhouseError):
    """Data that can't be trained on."""


class Diverged(StillhouseError):
    """A loss term is NaN or infinite; the last good checkpoint is kept."""


class CheckpointError(StillhouseError):
    """A checkpoint or a run directory that can't be read, or is another run's."""


class DamagedFile(CheckpointError):
    """A file of a run or of a cache that is missing, cut short, changed since it was written, or something else."""


class WriteFailed(CheckpointError, OSError):
    """A file that could not be written (a full disk, no permission); an OSError too, with its ``errno``."""

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.message, self.errno = message, number

    def __str__(self) -> str:
        return printable(self.message)


class NotPrivate(StillhouseError):
    """A folder or file that others may write to, where one's own was expected."""


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
