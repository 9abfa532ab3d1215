"""What a person sees of a run: a progress bar on a terminal, plain lines when piped, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO, cast

from stillhouse.errors import printable
from stillhouse.terminal import Steady, show


class Display:
    """Shows nothing; the base of the others."""

    def say(self, message: str) -> None:
        """One line."""

    def stage(self, name: str, start: int, end: int) -> None:
        """A stage makes the updates from ``start`` to ``end``."""

    def advance(self, step: int) -> None:
        """An update was made. Called after each one: it must cost nothing."""

    def terms(self, values: Mapping[str, float]) -> None:
        """The loss terms of the last logged update."""

    def validated(self, step: int, scores: Mapping[str, float]) -> None:
        """Scores on the validation split."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Lines(Display):
    """Plain lines, for a pipe or a log file."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix, self._stage, self._end, self._terms = prefix, "", 0, ""
        self._started = time.perf_counter()

    def say(self, message: str) -> None:
        show(f"{self._prefix}{message}")

    def stage(self, name: str, start: int, end: int) -> None:
        self._stage, self._end = name, end
        self.say(f"stage {name}: updates {start} to {end}")

    def terms(self, values: Mapping[str, float]) -> None:
        self._terms = numbers(values)

    def validated(self, step: int, scores: Mapping[str, float]) -> None:
        seconds = time.perf_counter() - self._started
        self.say(
            f"{self._stage} {step}/{self._end}  {self._terms}  validation {numbers(scores)}  {seconds:.1f} s"
        )


class Bars(Display):
    """A progress bar with stage, step, loss terms and the time left."""

    EVERY = 0.1
    """Seconds between two redraws."""

    def __init__(self, prefix: str = "") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._prefix = prefix
        from rich.console import Console

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}"),
            console=Console(file=cast("TextIO", Steady(sys.stdout))),
        )
        self._bar.start()
        self._task: Any = None
        self._terms = self._scores = ""
        self._drawn = 0.0

    def say(self, message: str) -> None:
        self._bar.console.print(printable(f"{self._prefix}{message}"), highlight=False, markup=False)

    def stage(self, name: str, start: int, end: int) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=self._bar.tasks[-1].total)
        self._terms = ""
        self._start = start
        self._task = self._bar.add_task(f"{self._prefix}{name}", total=end - start, terms="")

    def advance(self, step: int) -> None:
        now = time.monotonic()
        if now - self._drawn > self.EVERY and self._task is not None:
            self._drawn = now
            self._bar.update(self._task, completed=step - self._start, terms=f"{self._terms} {self._scores}")

    def terms(self, values: Mapping[str, float]) -> None:
        self._terms = numbers(values)

    def validated(self, step: int, scores: Mapping[str, float]) -> None:
        self._scores = f"validation {numbers(scores)}"

    def close(self) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=self._bar.tasks[-1].total)
        self._bar.stop()


def numbers(values: Mapping[str, float]) -> str:
    """``name 0.1234`` pairs."""
    return " ".join(f"{name} {value:.4g}" for name, value in values.items())


def display(prefix: str = "") -> Display:
    """Bars on a terminal, lines otherwise."""
    terminal = sys.stdout is not None and sys.stdout.isatty()  # None: closed before we were started
    return Bars(prefix) if terminal else Lines(prefix)
