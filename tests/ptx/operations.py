"""What each PTX arithmetic instruction computes, on numpy arrays of lanes. Bits go in and out in the register's type."""

from __future__ import annotations

import numpy as np

TYPES = {
    "u8": np.uint8, "b8": np.uint8, "s8": np.int8, "u16": np.uint16, "b16": np.uint16, "s16": np.int16,
    "u32": np.uint32, "b32": np.uint32, "s32": np.int32, "u64": np.uint64, "b64": np.uint64, "s64": np.int64,
    "f32": np.float32, "f16": np.float16, "pred": np.bool_,
}  # fmt: skip
WIDE = {"s32": np.int64, "u32": np.uint64, "s16": np.int32, "u16": np.uint32}
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
SPECIAL_FUNCTIONS = ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh")


def flush(x):
    """Subnormals to zero, as .ftz asks."""
    return np.where(np.abs(x) < np.float32(1.1754944e-38), np.copysign(np.float32(0), x), x)


def fused(a, b, c):
    """A product of two float32 is exact in float64, so one rounding of the sum is all but the fused result."""
    return (a.astype(np.float64) * b.astype(np.float64) + c).astype(np.float32)


def _shift(a, b, left, kind):
    bits = np.dtype(kind).itemsize * 8
    by = np.minimum(b.astype(np.uint32), bits)
    small = np.minimum(by, bits - 1).astype(kind)
    if left:
        return np.where(by >= bits, kind(0), a << small)
    fill = (a >> kind(bits - 1)) if np.issubdtype(kind, np.signedinteger) else kind(0)
    return np.where(by >= bits, fill, a >> small)


def bf16_bits(x):
    """float32 to bfloat16, to nearest even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded) & np.uint32(0xFFFF)


def f16_bits(x):
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def convert(value, to, source, parts):
    if to in ("bf16x2", "f16x2"):  # cvt.rn.f16x2.f32 d, high, low
        pack = bf16_bits if to == "bf16x2" else f16_bits
        return (pack(value[0]) << np.uint32(16)) | pack(value[1])
    if source == "f32" and to in ("s32", "u32"):
        rounded = np.rint(value[0]) if "rni" in parts else np.trunc(value[0])
        return rounded.astype(TYPES[to])
    return value[0].astype(TYPES[to])


class Approximation:
    """ex2, lg2 and rcp: exact then rounded, or also off by as much as the PTX manual allows (``jitter``).

    What it is off by depends on the operand alone, as in a processor: an instruction is a function.
    """

    def __init__(self, jitter: bool, seed: int = 0) -> None:
        self.jitter, self.seed = jitter, np.uint64(seed + 1)

    def _noise(self, x):
        """From -1 to 1, by the bits of ``x``: those of splitmix64."""
        if not self.jitter:
            return 0.0
        bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
        with np.errstate(over="ignore"):
            bits = (bits + self.seed) * np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (bits ^ (bits >> np.uint64(31))).astype(np.float64) / 2.0**63 - 1

    def _off(self, exact, x, relative):
        return exact * (1 + relative * self._noise(x))

    def __call__(self, name, x):
        wide = x.astype(np.float64)
        if name == "ex2":
            got = np.where(wide == 0, 1.0, self._off(np.exp2(wide), x, 2.0**-22))
        elif name == "lg2":
            exact = np.log2(wide)
            near = (wide > 0.5) & (wide < 2) & (wide != 1)
            got = np.where(near, exact + 2.0**-22 * self._noise(x), self._off(exact, x, 2.0**-22))
        elif name == "rcp":
            got = self._off(1 / wide, x, 2.0**-23)
        elif name == "sqrt":
            got = self._off(np.sqrt(wide), x, 2.0**-23)
        else:
            raise NotImplementedError(f"the interpreter does not know {name}")
        return flush(got.astype(np.float32))


def _binary(function):
    return lambda v, kind, parts: function(v[0], v[1])


def _multiply(v, kind, parts):
    if "wide" in parts:
        wide = WIDE[parts[-1]]
        return v[0].astype(wide) * v[1].astype(wide)
    if "hi" in parts:
        wide = WIDE[parts[-1]]
        return ((v[0].astype(wide) * v[1].astype(wide)) >> wide(32)).astype(kind)
    return v[0] * v[1]


def _multiply_add(v, kind, parts):
    return _multiply(v, kind, parts) + v[2]


def _divide(v, kind, parts):
    if kind is np.float32:
        return v[0] / v[1]
    quotient = np.abs(v[0].astype(np.int64)) // np.abs(v[1].astype(np.int64))
    return (quotient * np.sign(v[0].astype(np.int64)) * np.sign(v[1].astype(np.int64))).astype(kind)


def _remainder(v, kind, parts):
    return np.fmod(v[0], v[1])


def _logic(numbers, predicates):
    return lambda v, kind, parts: predicates(*v) if kind is np.bool_ else numbers(*v)


ARITHMETIC = {
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": lambda v, kind, parts: fused(*v),
    "div": _divide,
    "rem": _remainder,
    "min": lambda v, kind, parts: (np.fmin if kind is np.float32 else np.minimum)(v[0], v[1]),
    "max": lambda v, kind, parts: (np.fmax if kind is np.float32 else np.maximum)(v[0], v[1]),
    "neg": lambda v, kind, parts: -v[0],
    "abs": lambda v, kind, parts: np.abs(v[0]),
    "and": _logic(np.bitwise_and, np.logical_and),
    "or": _logic(np.bitwise_or, np.logical_or),
    "xor": _logic(np.bitwise_xor, np.logical_xor),
    "not": _logic(np.bitwise_not, np.logical_not),
    "shl": lambda v, kind, parts: _shift(v[0], v[1], True, kind),
    "shr": lambda v, kind, parts: _shift(v[0], v[1], False, kind),
    "mov": lambda v, kind, parts: v[0],
}


def compare(parts, kind, a, b):
    """setp: ordered comparisons are false with a NaN, the ...u forms true."""
    name = parts[1]
    if kind is np.float32 and name.endswith("u") and name[:-1] in COMPARE:
        return COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    if kind is np.float32 and name == "ne":
        return (a != b) & ~np.isnan(a) & ~np.isnan(b)
    if name in ("num", "nan"):
        unordered = np.isnan(a) | np.isnan(b)
        return ~unordered if name == "num" else unordered
    unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
    return COMPARE[unsigned.get(name, name)](a, b)
