"""What a person sees while a study runs: how many cells are done, which run, what failed, and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from stillhouse.study.plan import Cell, Plan, cells, ended_by, expected, score
from stillhouse.study.work import DONE, FAILED


class Live:
    """Keeps the counts, and prints a line for each cell that ended: for a pipe or a log file."""

    def __init__(self) -> None:
        self.done = self.failed = self.total = 0
        self.seconds: list[float] = []
        self.active: dict[str, tuple[Cell, float]] = {}
        self.workers = 1
        self.plan: Plan | None = None

    def say(self, message: str) -> None:
        """One line."""
        print(message, flush=True)

    @contextmanager
    def running(self, plan: Plan, results: Mapping[str, Any], workers: int) -> Iterator[None]:
        """Around the running of cells."""
        self.plan, self.workers = plan, workers
        self.total = expected(plan)
        self.done = sum(cell.digest in results for cell in cells(plan, results))
        self._open()
        try:
            yield
        finally:
            self._close()

    def started(self, cell: Cell) -> None:
        """A cell begins."""
        self.active[cell.digest] = (cell, time.monotonic())

    def ended(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """A cell ended, one way or another."""
        self.active.pop(cell.digest)
        self.done += 1
        self.failed += result["status"] == FAILED
        if result["status"] == DONE:
            self.seconds.append(result["wall_seconds"])
        if self.tells(result):
            self.say(
                f"[{self.done}/{self.total}] {label(cell)}: {self._outcome(cell, result)}; {self.left()}"
            )

    def tells(self, result: Mapping[str, Any]) -> bool:
        """Whether the cell that ended is worth a line."""
        return True

    def tick(self) -> None:
        """Time went by."""

    def left(self) -> str:
        """The time that the cells that are left will take, judged by those that ended."""
        if not self.seconds:
            return "time left unknown"
        mean = sum(self.seconds) / len(self.seconds)
        left = max(0, self.total - self.done) * mean / self.workers
        return f"about {duration(left)} left"

    def _outcome(self, cell: Cell, result: Mapping[str, Any]) -> str:
        if result["status"] != DONE:
            return f"{result['status']}, {ended_by(result).splitlines()[0]}"
        assert self.plan is not None
        metric = self.plan.entry(cell.method, cell.pair).facts.metric
        value = score(result, "validation", metric)
        told = f"no finite validation {metric}" if value is None else f"validation {metric} {value:.4f}"
        return f"{told}, {result['wall_seconds']:.1f} s"

    def _open(self) -> None: ...

    def _close(self) -> None: ...


class Screen(Live):
    """A panel that stays at the foot of the terminal: a bar, counts, and the cells that run."""

    def _open(self) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._panel = RichLive(self._drawn(), console=Console(), auto_refresh=False, transient=True)
        self._panel.start()

    def _close(self) -> None:
        self._panel.stop()
        del self._panel

    def say(self, message: str) -> None:
        if hasattr(self, "_panel"):
            self._panel.console.print(message, markup=False, highlight=False)
        else:
            super().say(message)

    def tick(self) -> None:
        self._panel.update(self._drawn(), refresh=True)

    def ended(self, cell: Cell, result: Mapping[str, Any]) -> None:
        super().ended(cell, result)
        self.tick()

    def tells(self, result: Mapping[str, Any]) -> bool:
        """Only what did not work stays on the screen as a line."""
        return bool(result["status"] != DONE)

    def _drawn(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 1))
        failed = Text(f"{self.failed} failed", style="bold red" if self.failed else "dim")
        counts = f"{self.done} of at most {self.total} cells, {len(self.active)} running,"
        head.add_row(
            ProgressBar(total=max(1, self.total), completed=self.done, width=30), counts, failed, self.left()
        )
        now = time.monotonic()
        rows = [
            Text(f"  {label(cell)}  {now - since:.0f} s", style="dim") for cell, since in self.active.values()
        ]
        return Group(head, *rows)


def label(cell: Cell) -> str:
    """The cell in words."""
    what = (
        f"trial {cell.trial}, " if cell.phase == "tuning" else "as given, " if cell.phase == "default" else ""
    )
    return f"{cell.method} on {cell.pair}, {what}seed {cell.seed}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def view() -> Live:
    """A panel on a terminal, lines otherwise."""
    return Screen() if sys.stdout is not None and sys.stdout.isatty() else Live()
