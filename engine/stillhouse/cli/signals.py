"""How a command ends by a signal: without a traceback, with the exit status 128 + its number."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Ended(KeyboardInterrupt):
    """A signal asked the command to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Handler:
    """The first signal raises Ended; a second one, while that is being told, ends the process at once."""

    ends_the_command = True

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, number: int, frame: Any) -> None:
        if self._number:
            os._exit(128 + number)
        self._number = number
        raise Ended(number)


@contextmanager
def handled(*, restore: bool) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP handled while inside, where nobody else handles or ignores them.

    restore
        Put the former handlers back: for a command that is called from Python. A process that is about to end keeps
        these, so that a late signal shows nothing.
    """
    handler, before = Handler(), {}
    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in (
                signal.SIG_DFL,
                signal.default_int_handler,
            ):
                before[number] = signal.signal(number, handler)
    except ValueError:  # another thread than the main one
        pass
    try:
        yield
    finally:
        if restore:
            for number, former in before.items():
                signal.signal(number, former)
