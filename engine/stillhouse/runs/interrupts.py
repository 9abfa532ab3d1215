"""Signals that ask a run to end: Ctrl-C, SIGTERM (Slurm, Kubernetes), SIGHUP (the terminal is gone)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stillhouse.errors import StillhouseError

ASKING = [
    number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None
]


class Interrupted(StillhouseError):
    """A signal asked the run to end: the update was finished, and a checkpoint written where there is a run directory.

    number
        The signal; a process that ends because of it has the exit status 128 + number.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = int(number)


class Interrupts:
    """Remembers the first signal that asks to end, so that the update can be finished; the next one is the caller's."""

    def __init__(self) -> None:
        self.asked: int | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """While inside, signals are remembered; afterwards the handlers are as they were.

        Signals that the caller ignores (nohup) or has handlers of its own for stay the caller's, save Ctrl-C.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {}

        def asked(number: int, frame: Any) -> None:
            if self.asked is None:
                self.asked = number
                return
            former = before[number]
            signal.signal(number, former)
            if callable(former):
                former(number, frame)
            else:
                raise KeyboardInterrupt

        for number in ASKING:
            former = signal.getsignal(number)
            if number == signal.SIGINT or former == signal.SIG_DFL or _is_commands(former):
                before[number] = former
                signal.signal(number, asked)
        try:
            yield
        finally:
            for number, former in before.items():
                signal.signal(number, former)


def _is_commands(handler: Any) -> bool:
    return bool(getattr(handler, "ends_the_command", False))
