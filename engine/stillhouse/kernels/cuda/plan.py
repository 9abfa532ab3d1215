"""Which kernel runs for a shape: the mapping table, as arithmetic on sizes. Imports neither Numba nor a driver."""

from __future__ import annotations

from dataclasses import dataclass, replace

SMALL_WIDTH = 64  # up to here eight lanes a row
WARP_WIDTH = 1024  # up to here a warp a row
CLUSTERS = (1, 2, 4, 8)  # sizes that every device with clusters takes; 16 must be asked for
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
STATIC_BYTES = 2048


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for.

    ``family``: "rows" (a warp, a block or a cluster a row) or "small" (eight lanes a row); ``target``: "dense" or
    "sparse" (top-k and sampled labels); ``lanes``: of the group that has a row, where that is less than a block;
    ``gradient``: whether one is written.
    """

    family: str
    target: str
    dtype: str
    divergence: str
    threads: int
    cluster: int = 1
    staged: bool = True
    lanes: int = 0
    gradient: bool = True

    @property
    def name(self) -> str:
        """A name for files and profilers."""
        place = f"lanes{self.lanes}" if self.lanes else f"cluster{self.cluster}"
        passes = "" if self.staged else "_unstaged"
        loss = "" if self.gradient else "_loss"
        return (
            f"{self.family}_{self.target}_{self.dtype}_{self.divergence}_{self.threads}_{place}{passes}{loss}"
        )


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
    rows: int,
    width: int,
    dtype: str,
    divergence: str,
    target: str,
    cc: tuple[int, int],
    gradient: bool = True,
) -> Plan:
    """The launch for ``rows`` rows of ``width`` logits (the wider of student and teacher)."""
    launch = _with_gradient(rows, width, dtype, divergence, target, cc)
    return launch if gradient else replace(launch, spec=replace(launch.spec, gradient=False))


def _with_gradient(
    rows: int, width: int, dtype: str, divergence: str, target: str, cc: tuple[int, int]
) -> Plan:
    if width <= SMALL_WIDTH and target == "dense":
        return _small(rows, width, dtype, divergence)
    if width <= WARP_WIDTH and target == "dense":
        return _warps(rows, width, dtype, divergence)
    marks = 1 if target == "sparse" else 0  # a bit for each element: is it among the k?
    bytes_per_chunk = 16 * _vectors(dtype, divergence, target) + marks
    chunks = _chunks(width, dtype)
    limit = opt_in_bytes(cc)
    comfortable = limit // 2  # two blocks share a multiprocessor
    sizes = CLUSTERS if cc >= (9, 0) else (1,)
    fits = [c for c in sizes if _span(chunks, c) * bytes_per_chunk <= comfortable]
    fits = fits or [c for c in sizes[-1:] if _span(chunks, c) * bytes_per_chunk <= limit]
    if not fits and cc >= (9, 0) and _span(chunks, 16) * bytes_per_chunk <= limit:
        fits = [16]
    if not fits:
        span = _span(chunks, 1)
        return Plan(Spec("rows", target, dtype, divergence, 512, 1, False), rows, span * marks, span)
    cluster = fits[0]
    span = _span(chunks, cluster)
    spec = Spec("rows", target, dtype, divergence, _threads(width // cluster), cluster)
    return Plan(spec, rows * cluster, span * bytes_per_chunk, span)


def _small(rows: int, width: int, dtype: str, divergence: str) -> Plan:
    lanes, threads = 8, 128
    rows_per_block = threads // lanes
    blocks = -(-rows // rows_per_block)
    # every row in float32, and the four elements by which a side's first row can miss a 16-byte boundary
    dynamic_bytes = 2 * (rows_per_block * width + 16) * 4
    return Plan(Spec("small", "dense", dtype, divergence, threads, 1, True, lanes), blocks, dynamic_bytes, 0)


def _warps(rows: int, width: int, dtype: str, divergence: str) -> Plan:
    lanes, threads = 32, 128
    rows_per_block = threads // lanes
    spec = Spec("rows", "dense", dtype, divergence, threads, 1, True, lanes)
    span = _span((width + 7 + 7) // 8, 1)
    row_bytes = span * 16 * _vectors(dtype, divergence, "dense")
    return Plan(spec, -(-rows // rows_per_block), rows_per_block * row_bytes, span)


def _vectors(dtype: str, divergence: str, target: str) -> int:
    """128-bit vectors of shared memory for a chunk of eight: raw logits, or two float32 results in their place."""
    if target == "sparse":
        return 2 if dtype == "f32" else 1
    return 4 if dtype == "f32" or divergence != "forward" else 2


def _chunks(width: int, dtype: str) -> int:
    """At most: a row that starts between boundaries takes one vector more, and float32 fills sectors of 32 bytes."""
    return (width + 6 + 7 + 8) // 16 * 2 if dtype == "f32" else (width + 7 + 7) // 8


def _span(chunks: int, cluster: int) -> int:
    return -(-chunks // (cluster * 32)) * 32


def _threads(width: int) -> int:
    """Some fifty elements or more for each thread: its share of the merges then costs little."""
    return 128 if width <= 6144 else 256 if width <= 24576 else 512
