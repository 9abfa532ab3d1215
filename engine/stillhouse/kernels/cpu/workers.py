"""Threads for the CPU kernels: torch's own, and as many as torch uses.

A call is a record in memory, of which each thread takes rows until none is left (``cpu.build.record``). The threads are
those of the OpenMP runtime that torch is linked to. It keeps its threads spinning for some milliseconds after torch's
own operators, so that others would share a core with them, and these are awake. A forked child must not enter a runtime
whose threads it does not have: there, and where torch has no OpenMP with GNU's entry point, one thread does all. Which thread
takes a row does not change what is computed, so results do not depend on any of this.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from stillhouse.kernels.cpu.build import Compiled, record, totals_of

SERIAL = 32_768  # logits that one thread finishes sooner than a second one wakes
LINE = 16  # float32 in a cache line
GUARD = 256  # float32 between scratch and other memory; see Workers._scratch


class Workers:
    """Runs compiled rows on torch.get_num_threads() threads, with scratch memory for each."""

    def __init__(self) -> None:
        self._forked = self._entered = False
        self._local = threading.local()
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self._forked = True
        if (
            self._entered
        ):  # torch's operators would wait for threads that stayed behind, as in DataLoader's workers
            torch.set_num_threads(1)

    def run(
        self, compiled: Compiled, rows: int, width: int, scratch: int, integers: tuple[int, ...], floats: tuple[float, ...]
    ) -> tuple[float, float]:  # fmt: skip
        """Call ``compiled`` over all rows, each thread with ``scratch`` float32; the sums of both terms' losses, at the end."""
        threads = min(torch.get_num_threads(), rows) if rows * width > SERIAL and not self._forked else 1
        parallel = openmp() if threads > 1 else None
        threads = threads if parallel is not None else 1
        address, size = self._scratch(threads, scratch)
        call = record(rows, threads, address, size, integers, floats)
        if parallel is None:
            compiled(call)
        else:
            self._entered = True
            parallel(compiled.address, call, threads, 0)
        return totals_of(call)

    def _scratch(self, threads: int, elements: int) -> tuple[int, int]:
        """Address of scratch memory that this Python thread keeps between calls, and bytes from one part to the next.

        Nothing else lies within ``GUARD`` of a part. LLVM's vector loops fall back to scalar ones, which round
        otherwise, where two arrays are less than a few vectors apart, so that bits would depend on the allocator.
        """
        each = -(-elements // LINE) * LINE + GUARD
        have: torch.Tensor | None = getattr(self._local, "memory", None)
        if have is None or have.numel() < threads * each + GUARD:
            have = torch.empty(threads * each + GUARD, dtype=torch.float32)
            self._local.memory = have
        return have.data_ptr() + GUARD * have.element_size(), each * have.element_size()


@lru_cache(maxsize=1)
def openmp() -> Callable[[int, object, int, int], None] | None:
    """``GOMP_parallel(function, data, threads, flags)`` of the runtime that torch is linked to, if it has one.

    LLVM's and Intel's runtimes have that entry point too. A library's symbols are looked for in what it is linked to,
    so this is torch's runtime and not a second one.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel  # type: ignore[no-any-return]
