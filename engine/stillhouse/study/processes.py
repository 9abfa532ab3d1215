"""Cells as processes of this machine, each forked from a server that has imported everything.

A cell's process ends with the study's, however that ends: none goes on writing where the next one reads.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from stillhouse.errors import StillhouseError, WriteFailed
from stillhouse.runs.interrupts import Interrupted
from stillhouse.study.directory import LOG, read_result, write_result
from stillhouse.study.plan import Facts
from stillhouse.study.preload import MODULES
from stillhouse.study.work import FAILED, Order, prepare_pair, work

UNWRITABLE = 74
"""The exit code of a cell that could not write: EX_IOERR of sysexits.h."""
PATIENCE = 60.0
"""Seconds for which interrupted cells may write their checkpoints."""
ALSO = ("matplotlib.backends.backend_agg", "matplotlib.figure", "torch._dynamo")
"""What a run imports after its preparation: the picture's parts, and what torch's optimizers load at their first step."""


def default_workers(threads: int, devices: Collection[str]) -> int:
    """As many cells at once as the processors that this process may use have room for, ``threads`` each.

    devices
        Those that cells use; one cell at once on a GPU.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = max(1, usable // threads)
    gpus = sum(device.startswith("cuda") for device in devices)
    return min(room, gpus) if gpus else room


def prepared(
    pairs: Sequence[Sequence[tuple[str, Mapping[str, Any]]]], workers: int
) -> tuple[list[dict[str, Facts]], list[str]]:
    """Facts of each pair's methods, and the modules that cells will want, in the order of their import."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(pairs)), mp_context=context) as pool:
        made = list(pool.map(prepare_pair, pairs))
    modules = dict.fromkeys(name for _, names in made for name in names)
    return [facts for facts, _ in made], list(modules)


class Processes:
    """Up to ``workers`` cells at once, each for at most ``limit`` seconds: then it is killed."""

    stopping = (
        f"cells write their checkpoints, for at most {PATIENCE:.0f} s; Ctrl-C once more ends all at once"
    )

    def __init__(self, workers: int, modules: Iterable[str] = (), limit: float | None = None) -> None:
        self.workers = workers
        self._limit = math.inf if limit is None else limit
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            with tempfile.NamedTemporaryFile("w", prefix="stillhouse-", suffix=".json", delete=False) as file:
                json.dump([*modules, *ALSO], file)
            self._names = file.name
            os.environ[MODULES] = file.name  # read by the server when the first cell starts it
            self._context.set_forkserver_preload(["stillhouse.study.preload"])
        self._running: dict[Any, tuple[Order, float]] = {}

    def start(self, order: Order) -> None:
        """Begin a cell."""
        Path(order.folder).mkdir(parents=True, exist_ok=True)
        process = self._context.Process(target=_child, args=(order,), name=f"cell {order.digest}")
        process.start()
        self._running[process] = (order, time.time())

    def finished(self, timeout: float) -> list[tuple[Order, int]]:
        """The cells that have ended by now, waiting for one at most ``timeout`` seconds, with their exit codes.

        One that left no result has that of a lost cell.
        """
        ready = (
            set(wait([process.sentinel for process in self._running], timeout)) if self._running else set()
        )
        ended = []
        for process, (order, began) in list(self._running.items()):
            late = time.time() - began > self._limit and process.sentinel not in ready
            if late:
                process.kill()
            elif process.sentinel not in ready:
                continue
            process.join()
            del self._running[process]
            code = process.exitcode
            process.close()
            if late or (code != UNWRITABLE and (code or read_result(Path(order.folder)) is None)):
                why = f"it was killed after {self._limit:g} s, the limit of a cell" if late else _died(code)
                write_result(Path(order.folder), lost(order, why, began))
                code = 0
            ended.append((order, code))
        return ended

    def stop(self) -> None:
        """Interrupt what runs, once: each cell finishes its update and writes a checkpoint. Kill what is left."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
        until = time.monotonic() + PATIENCE
        for process in self._running:
            process.join(max(0.0, until - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        self._running.clear()
        self.close()

    def close(self) -> None:
        """Forget what was to be imported; the server itself ends with this process."""
        if os.environ.pop(MODULES, None) is not None:
            Path(self._names).unlink(missing_ok=True)


def _child(order: Order) -> None:
    """A cell's process, from its beginning to its end."""
    _end_with_parent()
    os.setpgid(0, 0)  # Ctrl-C on a terminal goes to the study alone, which hands it on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(Path(order.folder) / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - a descriptor, for as long as the process lives
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    try:
        write_result(Path(order.folder), work(order))
    except (Interrupted, KeyboardInterrupt):
        sys.exit(130)
    except WriteFailed as error:
        print(error, flush=True)
        sys.exit(UNWRITABLE)


def last_words(folder: Path) -> str:
    """The last line of a cell's log."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    return next((line for line in reversed(lines) if line.strip()), f"{folder} can't be written")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _died(code: int) -> str:
    """How a process ended that had this exit code."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"its process ended with exit code {code} and no result"


def lost(order: Order, why: str, began: float) -> dict[str, Any]:
    """The result of a cell that left none for this reason; a resume makes it again.

    began
        When, in seconds of ``time.time()``: the time until now is what it cost.
    """
    error: dict[str, Any] = {
        "type": "Died",
        "message": f"{why}; see {Path(order.folder) / LOG}",
        "notes": [],
        "where": None,
    }
    return {
        "digest": order.digest,
        "made_from": order.made_from,
        "started": began,
        "status": FAILED,
        "error": error,
        "again": True,
        "wall_seconds": round(time.time() - began, 3),
        "cpu_seconds": 0.0,
    }


class Stopped(StillhouseError):
    """A study that was interrupted; what is finished is kept.

    number
        The signal that ended it, as of a run.
    """

    number = signal.SIGINT
