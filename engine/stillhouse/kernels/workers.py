"""Threads for the CPU kernels: torch's number of them, safe after fork and from several Python threads at once.

Numba's own parallel layers are not used: its built-in one must not be entered by two threads at once, and a forked
child that inherits a GNU OpenMP pool is killed. Here the kernels are serial over a range of rows and release the
interpreter lock; which thread takes a row does not change what is computed, so results do not depend on their number.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

SERIAL = 32_768  # logits that one thread finishes sooner than a second one wakes
CHUNK = 131_072  # logits that a thread takes at a time
GUARD = 256  # float32 between scratch and other memory; see Workers.scratch


class Workers:
    """A pool that grows to what torch.get_num_threads() asks for, and scratch memory for each thread."""

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # a child has none of its parent's threads

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0
        self._local = threading.local()

    def scratch(self, elements: int) -> int:
        """Address of this thread's scratch of at least so many float32; kept between calls.

        Nothing else lies within ``GUARD`` of it. LLVM's vector loops fall back to scalar ones, which round otherwise,
        where two arrays are less than a few vectors apart, so that bits would depend on what the allocator did.
        """
        have: torch.Tensor | None = getattr(self._local, "memory", None)
        if have is None or have.numel() < elements + 2 * GUARD:
            have = torch.empty(elements + 2 * GUARD, dtype=torch.float32)
            self._local.memory = have
        return have.data_ptr() + GUARD * have.element_size()

    def run(self, rows: int, width: int, kernel: Callable[[int, int], None]) -> None:
        """Call ``kernel(first, last)`` over all rows; returns when each is done, raises what a call raised."""
        threads = min(torch.get_num_threads(), rows)
        if threads < 2 or rows * width <= SERIAL:
            kernel(0, rows)
            return
        step = max(1, min(CHUNK // width, -(-rows // threads)))
        starts = itertools.count(0, step)  # next() on it is atomic

        def work() -> None:
            while (first := next(starts)) < rows:
                kernel(first, min(first + step, rows))

        others = self._submit(threads - 1, work)
        try:
            work()
        finally:
            for other in others:
                other.result()

    def _submit(self, copies: int, work: Callable[[], None]) -> list[Future[None]]:
        with self._lock:  # a pool must not be replaced between being picked and being given work
            if self._pool is None or self._size < copies:
                if self._pool is not None:
                    self._pool.shutdown(wait=False)  # what was submitted still runs
                self._pool = ThreadPoolExecutor(copies, thread_name_prefix="stillhouse-kernels")
                self._size = copies
            return [self._pool.submit(work) for _ in range(copies)]
