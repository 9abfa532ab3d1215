"""Printing that training outlives: a closed pipe or a lost terminal ends no run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from stillhouse.errors import printable


class Steady:
    """A text stream that training outlives: once nobody reads it any more (a closed pipe, a lost terminal), it takes all
    and shows nothing. What it is asked besides is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._open = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return int(self._do(lambda: self._stream.write(text), len(text)))

    def flush(self) -> None:
        self._do(self._stream.flush, None)

    def _do(self, act: Callable[[], Any], otherwise: Any) -> Any:
        if not self._open:
            return otherwise
        try:
            return act()
        except (OSError, ValueError) as error:
            if isinstance(error, UnicodeError):
                raise
            self._open = False
            _let_go(self._stream)
            return otherwise


def _let_go(stream: TextIO) -> None:
    """Nothing that is left in the stream's buffer is an error when the process ends."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass


def show(text: str) -> None:
    """Print a line to standard output, whatever becomes of it, without control characters."""
    stream = sys.stdout
    if stream is None:  # as where a program has no console
        return
    steady = cast("TextIO", stream if isinstance(stream, Steady) else Steady(stream))
    try:
        print(printable(text), file=steady, flush=True)
    except UnicodeEncodeError:  # a terminal of another encoding
        print(ascii(text), file=steady, flush=True)


@contextmanager
def steady_streams() -> Iterator[None]:
    """Standard output and error as Steady streams while inside."""
    before = sys.stdout, sys.stderr
    if sys.stdout is not None:
        sys.stdout = cast("TextIO", Steady(sys.stdout))
    if sys.stderr is not None:
        sys.stderr = cast("TextIO", Steady(sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
