"""Cells as tasks of a Ray cluster (extra ``ray``): the machines of ``RAY_ADDRESS``, else this one.

Every machine has Stillhouse and the plugins installed. The teachers are made once, by the study's process, and sent; data
are made by each machine and compared with the study's fingerprints. What comes back is written here.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stillhouse.cache import cache_dir
from stillhouse.errors import MissingExtra
from stillhouse.files import write_bytes
from stillhouse.runs.directory import CHECKPOINTS
from stillhouse.study.directory import write_result
from stillhouse.study.plan import Plan
from stillhouse.study.work import RUN, Order, work

TEACHERS = "teachers"


class Ray:
    """As many cells at once as the cluster has processors for, each in a worker of its own."""

    def __init__(self, plan: Plan, threads: int) -> None:
        try:
            import ray
        except ImportError:
            raise MissingExtra("--ray", "ray", "ray") from None
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(include_dashboard=False, log_to_driver=False)
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        # max_calls: a process a cell, as on one machine; no retry of what failed: the study says what did
        self._cell = ray.remote(num_cpus=threads, max_calls=1, max_retries=0)(_remote)
        self._teachers = ray.put(_teachers(plan))
        self._running: dict[Any, Order] = {}

    def start(self, order: Order) -> None:
        """Begin a cell."""
        self._running[self._cell.remote(order, self._teachers)] = order

    def finished(self, timeout: float) -> list[tuple[Order, int]]:
        """The cells that have ended by now, waiting for one at most ``timeout`` seconds, with 0, or 1 where nothing came back."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
        ended = []
        for reference in ready:
            order = self._running.pop(reference)
            try:
                result, files = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                print(f"cell {order.digest}: {error}", flush=True)
                ended.append((order, 1))
                continue
            for name, content in files.items():
                write_bytes(Path(order.folder) / RUN / name, content)
            write_result(Path(order.folder), result)
            ended.append((order, 0))
        return ended

    def stop(self) -> None:
        """Cancel what runs."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self.close()

    def close(self) -> None:
        """Leave the cluster, where it was joined here."""
        if self._ours:
            self._ray.shutdown()


def _teachers(plan: Plan) -> dict[str, bytes]:
    """The plan's trained teachers as they are kept, by file name."""
    wanted = {entry.facts.teacher for entry in plan.entries if entry.facts.teacher}
    folder = cache_dir() / TEACHERS
    return {
        path.name: path.read_bytes() for name in sorted(wanted) for path in sorted(folder.glob(f"{name}*"))
    }


def _remote(order: Order, teachers: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The cell's result, and the files of a run that is kept; in a Ray worker."""
    for name, content in teachers.items():
        path = cache_dir() / TEACHERS / name
        if not path.is_file():
            write_bytes(path, content)
    folder = Path(tempfile.mkdtemp(prefix="stillhouse-cell-"))
    try:
        result = work(replace(order, folder=str(folder)))
        run = folder / RUN
        kept = [
            path
            for path in (run.rglob("*") if run.is_dir() and order.keep else [])
            if path.is_file() and CHECKPOINTS not in path.relative_to(run).parts
        ]
        return result, {str(path.relative_to(run)): path.read_bytes() for path in kept}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
