"""Cells on a Ray cluster (extra ``ray``): the machines of ``RAY_ADDRESS``, else this one.

Ray places the cells; each runs in a process of its own as it would here (``Processes``), so that figures are the same.
Every machine has Stillhouse and the plugins installed, in the same versions: each cell compares them first. Teachers are made once, by the study's process, and sent; data are
made by each machine and compared with the study's fingerprints. What comes back is written here.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillhouse.cache import cache_dir
from stillhouse.files import write_bytes
from stillhouse.runs.directory import CHECKPOINTS
from stillhouse.study import extra
from stillhouse.study.directory import RESULT, write_result
from stillhouse.study.plan import Plan
from stillhouse.study.processes import Processes, lost
from stillhouse.study.work import RUN, TEACHERS, Order


class Ray:
    """As many cells at once as the cluster has processors for."""

    stopping = "cells on the cluster are ended, and are begun again by --resume"

    def __init__(
        self,
        plan: Plan,
        threads: int,
        devices: Collection[str],
        modules: Sequence[str],
        limit: float | None = None,
    ) -> None:
        ray: Any = extra.ray()
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(include_dashboard=False, log_to_driver=False)
        gpus = int(any(device.startswith("cuda") for device in devices))
        there = ray.cluster_resources()
        room = [int(there.get("CPU", 1)) // threads, *([int(there.get("GPU", 0))] if gpus else [])]
        self.workers = max(1, min(room))
        teachers = ray.put(_teachers(plan))
        kind = ray.remote(num_cpus=threads, num_gpus=gpus)(_Place)

        def place() -> Any:
            return kind.remote(list(modules), teachers, limit)

        self._place = place
        self._idle = [self._place() for _ in range(self.workers)]
        self._running: dict[Any, tuple[Order, Any, float]] = {}

    def start(self, order: Order) -> None:
        """Begin a cell."""
        place = self._idle.pop()
        self._running[place.make.remote(order)] = (order, place, time.time())

    def finished(self, timeout: float) -> list[tuple[Order, int]]:
        """The cells that have ended by now, waiting for one at most ``timeout`` seconds, with their exit codes."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
        ended = []
        for reference in ready:
            order, place, began = self._running.pop(reference)
            try:
                code, files = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:  # its machine is gone
                code, files, place = 0, {}, self._place()
                write_result(
                    Path(order.folder),
                    lost(order, (str(error).strip() or type(error).__name__).splitlines()[0], began),
                )
            for name, content in files.items():
                write_bytes(Path(order.folder) / name, content)
            self._idle.append(place)
            ended.append((order, code))
        return ended

    def stop(self) -> None:
        """End what runs."""
        for _, place, _ in self._running.values():
            self._ray.kill(place)
        self._running.clear()
        self.close()

    def close(self) -> None:
        """Leave the cluster, where it was joined here."""
        for place in self._idle:
            self._ray.kill(place)
        if self._ours:
            self._ray.shutdown()


def _teachers(plan: Plan) -> dict[str, bytes]:
    """The plan's trained teachers as they are kept, by file name."""
    names = sorted({name for entry in plan.entries for name in entry.facts.teacher_files})
    folder = cache_dir() / TEACHERS
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


class _Place:
    """Room for one cell at a time on one of the machines."""

    def __init__(self, modules: Sequence[str], teachers: Mapping[str, bytes], limit: float | None) -> None:
        for name, content in teachers.items():
            path = cache_dir() / TEACHERS / name
            if not path.is_file():
                write_bytes(path, content)
        self._processes = Processes(1, [*modules, "ray"], limit)

    def make(self, order: Order) -> tuple[int, dict[str, bytes]]:
        """The exit code of the cell's process, and its files: result, log, and the run where that is kept."""
        folder = Path(tempfile.mkdtemp(prefix="stillhouse-cell-")) / order.digest
        try:
            self._processes.start(replace(order, folder=str(folder), elsewhere=True))
            while not (ended := self._processes.finished(1.0)):
                pass
            files = {}
            # The result comes last: it says that the cell is whole.
            for path in sorted(folder.rglob("*"), key=lambda path: path == folder / RESULT):
                name = path.relative_to(folder)
                if path.is_file() and CHECKPOINTS not in name.parts and (order.keep or name.parts[0] != RUN):
                    files[name.as_posix()] = path.read_bytes()
            return ended[0][1], files
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)
