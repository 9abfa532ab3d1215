"""Memory of the interpreter: global allocations between guard zones, shared memory per block, and who touched what.

Two accesses to the same place by different lanes, at least one of them a write, need something between them that
orders them: a barrier of the warp (same warp), of the block (same block) or of the cluster (same cluster). Nothing
orders blocks of different clusters. Lanes run in lock step here, so the values would come out right without the
barrier; the bookkeeping is what finds that it is missing.
"""

from __future__ import annotations

import numpy as np

GLOBAL_BASE = 1 << 28
GUARD = 256
NOBODY, SEVERAL, ATOMIC = -1, -2, -3


class PtxError(AssertionError):
    """What the hardware would not have forgiven, or might not have."""


class Clock:
    """How many barriers of each kind every lane has passed."""

    def __init__(self, lanes: int, block: int, cluster_blocks: int) -> None:
        index = np.arange(lanes)
        self.warp_of, self.block_of = index // 32, index // block
        self.cluster_of = self.block_of // cluster_blocks
        self.warp = np.zeros(lanes, np.int32)
        self.block = np.zeros(lanes, np.int32)
        self.arrived = np.zeros(lanes, np.int32)
        self.waited = np.zeros(lanes, np.int32)

    def unordered(self, lanes, others, warp, block, arrived):
        """Whether nothing orders what ``others`` did at those times before what ``lanes`` do now."""
        known = (others != NOBODY) & (others != lanes)
        who = np.where(others >= 0, others, lanes)
        by_cluster = (self.cluster_of[who] == self.cluster_of[lanes]) & (self.waited[lanes] > arrived)
        by_block = (self.block_of[who] == self.block_of[lanes]) & (self.block[lanes] > block)
        by_warp = (self.warp_of[who] == self.warp_of[lanes]) & (self.warp[lanes] > warp) & (others != SEVERAL)
        return known & ~(by_cluster | by_block | by_warp)


class Shadow:
    """Last writer and reader of every cell, and the barriers they had passed by then."""

    def __init__(self, cells: int, clock: Clock) -> None:
        self.clock = clock
        self.writer = np.full(cells, NOBODY, np.int64)
        self.reader = np.full(cells, NOBODY, np.int64)
        self.when_written = np.zeros((3, cells), np.int32)
        self.when_read = np.zeros((3, cells), np.int32)

    def _now(self, lanes):
        c = self.clock
        return np.stack([c.warp[lanes], c.block[lanes], c.arrived[lanes]])

    def read(self, cells, lanes):
        bad = self.clock.unordered(lanes, self.writer[cells], *self.when_written[:, cells])
        now = self._now(lanes)
        same = (self.when_read[:, cells] == now).all(0)
        others = (self.reader[cells] != NOBODY) & (self.reader[cells] != lanes) & same
        self.reader[cells] = np.where(others, SEVERAL, lanes)
        # of several lanes reading one cell in this very instruction, the last store won: mark those too
        lost = self.reader[cells] != np.where(others, SEVERAL, lanes)
        self.reader[cells[lost]] = SEVERAL
        self.when_read[:, cells] = now
        return bad

    def write(self, cells, lanes):
        bad = self.clock.unordered(lanes, self.writer[cells], *self.when_written[:, cells])
        bad |= self.clock.unordered(lanes, self.reader[cells], *self.when_read[:, cells])
        self.writer[cells] = lanes
        bad |= self.writer[cells] != lanes  # two lanes wrote it in one instruction
        self.when_written[:, cells] = self._now(lanes)
        return bad

    def atomic(self, cells, lanes):
        """Atomic operations need no order among themselves, only against plain accesses."""
        last = np.where(self.writer[cells] == ATOMIC, NOBODY, self.writer[cells])
        bad = self.clock.unordered(lanes, last, *self.when_written[:, cells])
        bad |= self.clock.unordered(lanes, self.reader[cells], *self.when_read[:, cells])
        self.writer[cells] = ATOMIC
        self.when_written[:, cells] = self._now(lanes)
        return bad


class Space:
    """A flat byte space with bounds, initialisation and race checks; ``cell`` bytes share one shadow entry."""

    def __init__(self, name: str, size: int, cell: int, clock: Clock) -> None:
        self.name, self.cell = name, cell
        size = -(-size // 16) * 16
        self.bytes = np.zeros(size, np.uint8)
        self.allowed = np.zeros(size, np.bool_)
        self.written = np.zeros(size, np.bool_)
        self.readable = np.zeros(size, np.bool_)
        self.shadow = Shadow(size // cell, clock)

    def _cells(self, offsets, width):
        per = max(1, width // self.cell)
        return (offsets // self.cell)[:, None] + np.arange(per)

    def check(self, offsets, width, text):
        if (offsets % width).any():
            raise PtxError(
                f"misaligned {width}-byte access to {self.name} memory, at {offsets[0] % width}: {text}"
            )
        outside = (offsets < 0) | (offsets + width > len(self.bytes))
        if outside.any() or not (self.allowed[offsets] & self.allowed[offsets + width - 1]).all():
            raise PtxError(f"access outside of every allocation of {self.name} memory: {text}")

    def load(self, offsets, kind, count, lanes, text):
        size = np.dtype(kind).itemsize
        width = size * count
        self.check(offsets, width, text)
        if not (self.readable[offsets] & self.readable[offsets + width - 1]).all():
            raise PtxError(f"read of {self.name} memory that nothing wrote: {text}")
        cells = self._cells(offsets, width)
        if self.shadow.read(cells.ravel(), np.repeat(lanes, cells.shape[1])).any():
            raise PtxError(f"race: read of {self.name} memory not ordered after another lane's write: {text}")
        view = self.bytes.view(kind)
        return [view[offsets // size + i] for i in range(count)]

    def store(self, offsets, kind, values, lanes, text):
        size = np.dtype(kind).itemsize
        width = size * len(values)
        self.check(offsets, width, text)
        cells = self._cells(offsets, width)
        if self.shadow.write(cells.ravel(), np.repeat(lanes, cells.shape[1])).any():
            raise PtxError(
                f"race: write to {self.name} memory not ordered after another lane's access: {text}"
            )
        view = self.bytes.view(kind)
        for i, value in enumerate(values):
            view[offsets // size + i] = value
        for i in range(width):
            self.written[offsets + i] = self.readable[offsets + i] = True

    def atomic_or(self, offsets, values, lanes, text):
        """One lane after another; the values from before."""
        self.check(offsets, 4, text)
        if not self.readable[offsets].all():
            raise PtxError(f"read of {self.name} memory that nothing wrote: {text}")
        if self.shadow.atomic(offsets // self.cell, lanes).any():
            raise PtxError(f"race: atomic on {self.name} memory not ordered after a plain access: {text}")
        view, before = self.bytes.view(np.uint32), np.zeros(len(lanes), np.uint32)
        for i, (cell, value) in enumerate(zip(offsets // 4, values, strict=True)):
            before[i] = view[cell]
            view[cell] |= value
        return before


class GlobalMemory(Space):
    """Allocations are made before the launch; each starts at ``shift`` bytes after a 256-byte boundary."""

    def __init__(self, size: int, clock: Clock) -> None:
        super().__init__("global", size, 2, clock)
        self.end = GUARD

    def add(self, data: np.ndarray, shift: int = 0, output: bool = False) -> int:
        """The address of a copy of ``data``; an output starts as NaN, which may be read but must be overwritten."""
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        start = self.end + shift
        span = slice(start, start + raw.size)
        self.bytes[span], self.written[span] = (0xFF, False) if output else (raw, True)
        self.allowed[span] = self.readable[span] = True
        self.end = -(-(start + raw.size + GUARD) // 256) * 256
        return GLOBAL_BASE + start

    def read_back(self, address: int, like: np.ndarray) -> np.ndarray:
        start = address - GLOBAL_BASE
        if not self.written[start : start + like.nbytes].all():
            raise PtxError("the kernel left part of an output unwritten")
        return self.bytes[start : start + like.nbytes].view(like.dtype).reshape(like.shape).copy()
