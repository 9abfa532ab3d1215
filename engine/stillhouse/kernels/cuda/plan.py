"""Which kernel runs for a shape: the mapping table, as arithmetic on sizes. Imports neither Numba nor a driver."""

from __future__ import annotations

from dataclasses import dataclass

WARP_WIDTH = 1024  # up to here a warp a row
# every device with clusters takes 8; 16 must be asked for, and is where nothing less fits
CLUSTERS = (1, 2, 4, 8, 16)
# largest dynamic shared memory a block may opt in to, less what the kernels declare statically, by compute capability
OPT_IN = {
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
    (12, 0): 99,
}
STATIC_BYTES = 2560


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for.

    ``target``: "dense", "top-k" or "sampled"; ``cluster``: blocks that share a row; ``staged``: the row stays in shared memory;
    ``gradient``: whether one is written; ``labels``: whether there is a label term.
    """

    target: str
    dtype: str
    divergence: str
    threads: int
    cluster: int = 1
    staged: bool = True
    gradient: bool = True
    labels: bool = False

    @property
    def name(self) -> str:
        """A name for files and profilers."""
        target = self.target.replace("-", "")
        parts = [target, self.dtype, self.divergence, str(self.threads), f"cluster{self.cluster}"]
        parts += ["labels"] * self.labels + ["unstaged"] * (not self.staged) + ["loss"] * (not self.gradient)
        return "_".join(parts)


@dataclass(frozen=True)
class Plan:
    """A launch: the kernel, blocks, dynamic shared memory, and chunks in a block's slice of the row."""

    spec: Spec
    blocks: int
    dynamic_bytes: int
    span: int


def opt_in_bytes(cc: tuple[int, int]) -> int:
    """Dynamic shared memory a block can have on a device of this compute capability."""
    known = OPT_IN.get(cc) or OPT_IN.get((cc[0], 0)) or 99
    return known * 1024 - STATIC_BYTES


def plan(
    rows: int, width: int, dtype: str, divergence: str, target: str, cc: tuple[int, int], gradient: bool = True,
    labels: bool = False,
) -> Plan:  # fmt: skip
    """The launch for ``rows`` rows of ``width`` logits (the wider of student and teacher)."""
    per = 4 if dtype == "f32" else 8
    chunks = (width + 2 * (per - 1)) // per  # at most: a row that starts between boundaries takes one more
    marks = (
        0.0 if target == "dense" else per / 8
    )  # bytes of a chunk: a bit for each element, is it among the k?
    each, limit = (32 if target == "dense" else 16) + marks, opt_in_bytes(cc)
    sizes = CLUSTERS if cc >= (9, 0) else CLUSTERS[:1]
    room = [(limit // 2, sizes[:4]), (limit, sizes[3:] or sizes)]  # at best two blocks share a multiprocessor
    fits = [(n, _span(chunks, n)) for most, some in room for n in some if _span(chunks, n) * each <= most]
    cluster, span = fits[0] if fits else (1, _span(chunks, 1))
    threads = _threads(width // cluster) if fits else 512
    spec = Spec(target, dtype, divergence, threads, cluster, bool(fits), gradient, labels)
    return Plan(spec, rows * cluster, int(span * (each if fits else marks)), span)


def _span(chunks: int, cluster: int) -> int:
    return -(-chunks // (cluster * 32)) * 32


def _threads(width: int) -> int:
    """Some fifty elements or more for each thread: its share of the merges then costs little."""
    return 32 if width <= WARP_WIDTH else 128 if width <= 6144 else 256 if width <= 24576 else 512
