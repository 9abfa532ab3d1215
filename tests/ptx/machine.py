"""Runs a parsed PTX kernel: every lane of the grid in lock step, and counts what it executes.

Of the lanes that can go on, those at the earliest block of the program run it together, so lanes that a branch has
parted meet again where their paths do. A barrier ends a block; lanes stay there until all that it waits for came.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .memory import GLOBAL_BASE, Clock, GlobalMemory, PtxError, Space
from .operations import ARITHMETIC, SPECIAL_FUNCTIONS, TYPES, Approximation, compare, convert
from .parse import SIZES, Instruction, Program

BLOCK_WAIT, WARP_WAIT, CLUSTER_WAIT = 1, 2, 3
FREE = ("neg.f32", "abs.f32")  # SASS has them as modifiers of an operand
REMOTE = 24  # mapa: bits 24 and up of a shared::cluster address hold the block's rank + 1


@dataclass
class Counts:
    """Of one launch, summed over lanes. ``instructions`` leaves out register moves and signs, which cost
    nothing in SASS."""

    instructions: int = 0
    special: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    narrow_bytes: int = 0  # of the bytes moved, those by accesses narrower than 128 bits
    opcodes: Counter = field(default_factory=Counter)


class Machine:
    """One launch of ``program``: allocate with ``memory.add``, then ``run`` once."""

    def __init__(self, program: Program, blocks: int, threads: int, *, cluster=1, dynamic_bytes=0, memory_bytes,
                 jitter=False) -> None:  # fmt: skip
        self.program, self.threads, self.cluster = program, threads, cluster
        self.lanes = blocks * threads
        self.index = np.arange(self.lanes)
        self.clock = Clock(self.lanes, threads, cluster)
        self.memory = GlobalMemory(memory_bytes, self.clock)
        self.span = -(-(program.static_bytes + dynamic_bytes) // 16) * 16
        self.usable = program.static_bytes + dynamic_bytes
        self.shared = Space("shared", blocks * self.span, 4, self.clock)
        self.shared.allowed[:] = np.tile(np.arange(self.span) < self.usable, blocks)
        self.registers = {name: np.zeros(self.lanes, kind) for name, kind in program.registers.items()}
        self.at = np.zeros(self.lanes, np.int64)
        self.done = np.zeros(self.lanes, bool)
        self.waits_for = np.zeros(self.lanes, np.int8)
        self.approximate = Approximation(jitter)
        self.counts = Counts()
        self.special_registers = {
            "%tid.x": self.index % threads, "%ntid.x": np.full(self.lanes, threads),
            "%ctaid.x": self.index // threads, "%nctaid.x": np.full(self.lanes, blocks),
            "%laneid": self.index % 32, "%warpid": self.index % threads // 32,
            "%cluster_ctarank": self.index // threads % cluster, "%dynamic_smem_size": np.full(self.lanes, dynamic_bytes),
            "%total_smem_size": np.full(self.lanes, self.usable),
        }  # fmt: skip
        self.parameters: dict[str, np.generic] = {}

    # -- the schedule

    def run(self, *arguments: float) -> Counts:
        if len(arguments) != len(self.program.parameters):
            raise PtxError(f"got {len(arguments)} arguments; the kernel takes {len(self.program.parameters)}")
        for (kind, name), value in zip(self.program.parameters, arguments, strict=True):
            self.parameters[name] = np.array([value]).astype(TYPES[kind])
        with np.errstate(all="ignore"):
            while not self.done.all():
                ready = ~self.done & (self.waits_for == 0)
                if ready.any():
                    number = int(self.at[ready].min())
                    self._run_block(number, ready & (self.at == number))
                self._release()
                if not ready.any() and (self.waits_for[~self.done] != 0).all():
                    raise PtxError(
                        "deadlock: every lane left waits at a barrier that some lane never reaches"
                    )
        return self.counts

    def _run_block(self, number: int, mask: np.ndarray) -> None:
        self.at[mask] = number + 1
        lanes = self.index[mask]
        for instruction in self.program.blocks[number].instructions:
            active, chosen = mask, lanes
            if instruction.guard is not None:
                active = mask & (self.registers[instruction.guard] ^ instruction.negated)
                chosen = self.index[active]
            if len(chosen):
                self._execute(instruction, active, chosen)

    def _release(self) -> None:
        for kind, group in ((BLOCK_WAIT, self.clock.block_of), (WARP_WAIT, self.clock.warp_of)):
            waiting = self.waits_for == kind
            if not waiting.any():
                continue
            here = np.bincount(group[waiting], minlength=group[-1] + 1)
            full = here == np.bincount(group, minlength=group[-1] + 1)
            released = waiting & full[group]
            self.waits_for[released] = 0
            passed = self.clock.block if kind == BLOCK_WAIT else self.clock.warp
            passed[released] += 1
        waiting = self.waits_for == CLUSTER_WAIT
        if waiting.any():
            arrivals = self.clock.arrived.reshape(-1, self.threads * self.cluster).min(1)
            released = waiting & (arrivals[self.clock.cluster_of] > self.clock.waited)
            self.waits_for[released] = 0
            self.clock.waited[released] += 1

    # -- operands

    def _value(self, text: str, kind: type, lanes: np.ndarray) -> np.ndarray:
        if text in self.registers:
            value = self.registers[text][lanes]
            if value.dtype == kind:
                return value
            if value.dtype.itemsize == np.dtype(kind).itemsize:
                return value.view(kind)
            return value.astype(kind)  # a wider register holds a narrower value
        if text in self.special_registers:
            return self.special_registers[text][lanes].astype(kind)
        if text in self.program.shared:
            return np.full(len(lanes), self.program.shared[text]).astype(kind)
        if text.startswith("0f"):
            return np.full(len(lanes), struct.unpack(">f", bytes.fromhex(text[2:]))[0], np.float32)
        return np.full(len(lanes), int(text, 0) & 0xFFFFFFFFFFFFFFFF, np.uint64).astype(kind)

    def _set(self, name: str, value: np.ndarray, lanes: np.ndarray) -> None:
        register = self.registers[name]
        value = np.asarray(value)
        if value.dtype != register.dtype:
            same = value.dtype.itemsize == register.dtype.itemsize
            value = value.view(register.dtype) if same else self._widened(value, register.dtype)
        register[lanes] = value

    @staticmethod
    def _widened(value: np.ndarray, kind: np.dtype) -> np.ndarray:
        return value.astype(np.int64).astype(kind) if value.dtype.kind == "i" else value.astype(kind)

    def _address(self, text: str, lanes: np.ndarray) -> np.ndarray:
        base, _, offset = text.strip("[] ").partition("+")
        return self._value(base.strip(), np.uint64, lanes).astype(np.int64) + (
            int(offset, 0) if offset else 0
        )

    # -- instructions

    def _execute(self, one: Instruction, active: np.ndarray, lanes: np.ndarray) -> None:
        parts = one.parts
        name = parts[0]
        self.counts.opcodes[".".join(parts[:2])] += len(lanes)
        if name != "mov" and parts[:2] != ["ld", "param"] and ".".join(parts[:2]) not in FREE:
            self.counts.instructions += len(lanes)
        if name in ("ld", "st"):
            self._move(one, parts, lanes)
        elif parts == ["atom", "shared", "or", "b32"]:
            space, offsets = self._resolve(parts, self._address(one.operands[1], lanes), lanes, one)
            values = self._value(one.operands[2], np.uint32, lanes)
            self._set(one.operands[0], space.atomic_or(offsets, values, lanes, one.text), lanes)
        elif name in ("bra", "ret", "exit"):
            self._leave(one, name, lanes)
        elif name in ("bar", "barrier"):
            self._barrier(one, parts, active, lanes)
        elif name == "shfl":
            self._shuffle(one, parts, active, lanes)
        elif name == "mapa":
            rank = self._value(one.operands[2], np.uint32, lanes)
            if (rank >= self.cluster).any():
                raise PtxError(f"block {rank.max()} of a cluster of {self.cluster}: {one.text}")
            own = self._value(one.operands[1], np.uint32, lanes)
            self._set(one.operands[0], own | ((rank + np.uint32(1)) << np.uint32(REMOTE)), lanes)
        elif name == "cvta":
            self._set(one.operands[0], self._value(one.operands[1], np.uint64, lanes), lanes)
        else:
            self._compute(one, parts, name, lanes)

    def _compute(self, one: Instruction, parts: list[str], name: str, lanes: np.ndarray) -> None:
        if name in SPECIAL_FUNCTIONS:
            self.counts.special += len(lanes)
            value = self.approximate(name, self._value(one.operands[1], np.float32, lanes))
        elif name == "mov" and (one.operands[0].startswith("{") or one.operands[1].startswith("{")):
            self._split_or_join(one, lanes)
            return
        elif name == "cvt":
            source = parts[-1]
            value = convert(
                [self._value(o, TYPES[source], lanes) for o in one.operands[1:]], parts[-2], source, parts
            )
        elif name == "setp":
            kind = TYPES[parts[-1]]
            a, b = (self._value(o, kind, lanes) for o in one.operands[1:3])
            value = compare(parts, kind, a, b)
        elif name == "selp":
            kind = TYPES[parts[-1]]
            a, b = (self._value(o, kind, lanes) for o in one.operands[1:3])
            value = np.where(self.registers[one.operands[3]][lanes], a, b)
        elif name in ARITHMETIC:
            kind = TYPES[parts[-1]]
            values = [self._value(o, kind, lanes) for o in one.operands[1:]]
            if name in ("shl", "shr"):
                values[1] = self._value(one.operands[2], np.uint32, lanes)
            elif name == "mad" and "wide" in parts:
                values[2] = self._value(one.operands[3], np.uint64, lanes)
            value = ARITHMETIC[name](values, kind, parts)
        else:
            raise NotImplementedError(f"the interpreter does not know this instruction: {one.text}")
        self._set(one.operands[0], value, lanes)

    def _split_or_join(self, one: Instruction, lanes: np.ndarray) -> None:
        to, source = one.operands
        if to.startswith("{"):
            whole = self._value(source, np.uint32, lanes)
            low, high = (name.strip() for name in to.strip("{}").split(","))
            self._set(low, (whole & np.uint32(0xFFFF)).astype(np.uint16), lanes)
            self._set(high, (whole >> np.uint32(16)).astype(np.uint16), lanes)
        else:
            low, high = (self._value(n.strip(), np.uint16, lanes) for n in source.strip("{}").split(","))
            self._set(to, low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16)), lanes)

    def _leave(self, one: Instruction, name: str, lanes: np.ndarray) -> None:
        if name == "bra":
            self.at[lanes] = self.program.labels[one.operands[0]]
        else:
            self.done[lanes] = True

    def _whole_warps(self, active: np.ndarray, one: Instruction) -> None:
        warps = active.reshape(-1, 32) if self.lanes % 32 == 0 else None
        if warps is None or (warps.any(1) != warps.all(1)).any():
            raise PtxError(
                f"only some lanes of a warp reach an instruction that all of them must execute: {one.text}"
            )

    def _barrier(self, one: Instruction, parts: list[str], active: np.ndarray, lanes: np.ndarray) -> None:
        if parts[1] == "cluster":
            if "aligned" in parts:
                self._whole_warps(active, one)
            if parts[2] == "arrive":
                if (self.clock.arrived[lanes] > self.clock.waited[lanes]).any():
                    raise PtxError("a lane arrives twice at the cluster's barrier without waiting in between")
                self.clock.arrived[lanes] += 1
            else:
                self.waits_for[lanes] = CLUSTER_WAIT
            return
        if parts[1] == "warp":
            self.waits_for[lanes] = WARP_WAIT
        else:
            self._whole_warps(active, one)
            self.waits_for[lanes] = BLOCK_WAIT

    def _shuffle(self, one: Instruction, parts: list[str], active: np.ndarray, lanes: np.ndarray) -> None:
        to, source, by, _, members = one.operands
        if int(members, 0) & 0xFFFFFFFF == 0xFFFFFFFF:
            self._whole_warps(active, one)
        if parts[2] != "bfly":
            raise NotImplementedError(f"the interpreter does not know this shuffle: {one.text}")
        partner = lanes ^ self._value(by, np.uint32, lanes).astype(np.int64)
        if not active[partner].all():
            raise PtxError(f"shuffle from a lane that does not take part: {one.text}")
        everyone = (
            self.registers[source] if source in self.registers else self._value(source, np.uint32, self.index)
        )
        self._set(to, everyone[partner].copy(), lanes)

    def _move(self, one: Instruction, parts: list[str], lanes: np.ndarray) -> None:
        kind = TYPES[parts[-1]]
        load = parts[0] == "ld"
        register, address = one.operands if load else one.operands[::-1]
        if parts[1] == "param":
            value = self.parameters[address.strip("[]")].astype(kind)
            self._set(register, np.repeat(value, len(lanes)), lanes)
            return
        names = [n.strip() for n in register.strip("{}").split(",")]
        space, offsets = self._resolve(parts, self._address(address, lanes), lanes, one)
        if space is self.memory:
            # what several lanes of a warp load from one address moves once, and goes to all of them
            moves = (
                len(np.unique(self.clock.warp_of[lanes] * len(space.bytes) + offsets)) if load else len(lanes)
            )
            self._count(SIZES[parts[-1]] * len(names), load, moves)
        if load:
            for name, value in zip(
                names, space.load(offsets, kind, len(names), lanes, one.text), strict=True
            ):
                self._set(name, value, lanes)
        else:
            values = [self._value(name, kind, lanes) for name in names]
            space.store(offsets, kind, values, lanes, one.text)

    def _resolve(self, parts, address, lanes, one):
        if parts[1] == "global":
            return self.memory, address - GLOBAL_BASE
        block = self.clock.block_of[lanes]
        if parts[1] == "shared::cluster":
            rank, address = (address >> REMOTE) - 1, address & ((1 << REMOTE) - 1)
            if (rank < 0).any():
                raise PtxError(f"a shared::cluster address that mapa did not make: {one.text}")
            if (self.clock.waited[lanes] < 1).any():
                raise PtxError(f"another block's memory before the cluster's first barrier: {one.text}")
            block = block // self.cluster * self.cluster + rank
            if self.done.reshape(-1, self.threads).all(1)[block].any():
                raise PtxError(f"another block's memory after that block has ended: {one.text}")
        elif parts[1] != "shared":
            raise NotImplementedError(f"the interpreter does not know this memory: {one.text}")
        if (address + 1 > self.usable).any() or (address < 0).any():
            raise PtxError(f"access outside of the block's shared memory: {one.text}")
        return self.shared, block * self.span + address

    def _count(self, width: int, load: bool, moves: int) -> None:
        if load:
            self.counts.bytes_read += width * moves
        else:
            self.counts.bytes_written += width * moves
        if width < 16:
            self.counts.narrow_bytes += width * moves
