"""How numbers are kept: class numbers in three bytes, log-probabilities in one, and blocks that are packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import DataError, MissingExtra

LARGEST_ID = 2**24 - 1
"""The largest class number that three bytes hold."""
DEPTH = 24.0
"""Nats: the smallest log-probability that a byte holds is ``-DEPTH``."""
NEVER = 255
"""The byte of probability zero."""
_LEVEL = 7
"""zstd's level: higher ones gain under 1 % here and take several times as long."""


def three_bytes(indices: Tensor) -> Tensor:
    """Class numbers ``(...)`` int64 as ``(..., 3)`` uint8, the lowest byte first.

    Raises DataError for numbers below 0 or above ``LARGEST_ID``.
    """
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) <= LARGEST_ID:
        raise DataError(
            f"class numbers to be kept go from {int(indices.min())} to {int(indices.max())}; expected 0 to {LARGEST_ID:,}, "
            "which is what three bytes hold"
        )
    flat = indices.to(torch.int32).contiguous().view(torch.uint8).reshape(*indices.shape, 4)
    return flat[..., :3].contiguous()


def from_three_bytes(kept: Tensor) -> Tensor:
    """``(..., 3)`` uint8 as class numbers ``(...)`` int64."""
    return torch.from_numpy(whole_numbers(kept.numpy()))


def whole_numbers(kept: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``(..., 3)`` uint8 as class numbers ``(...)`` int64: of four bytes from the one before each, the first is dropped."""
    flat = np.empty(kept.size + 1, np.uint8)
    flat[1:] = kept.reshape(-1)
    words: np.ndarray[Any, Any] = np.ndarray(kept.size // 3, "<u4", flat, strides=(3,))
    found: np.ndarray[Any, Any] = np.right_shift(words, 8, dtype=np.int64).reshape(kept.shape[:-1])
    return found


def one_byte(log_probs: Tensor) -> Tensor:
    """Log-probabilities as uint8: 254 sqrt(-log p / 24), rounded; 255 where p = 0.

    The square root spends the levels where the mass is: a step is 0.0004 nats at p = 1, 0.04 at p = 0.37, 0.12 at
    4.5e-5.
    """
    depth = (-log_probs.float()).clamp(0, DEPTH)
    code = (depth / DEPTH).sqrt().mul(NEVER - 1).round()
    return code.masked_fill(log_probs == float("-inf"), NEVER).to(torch.uint8)


def byte_table() -> Tensor:
    """The log-probability of each byte ``(256,)`` float32."""
    table = -DEPTH * (torch.arange(256, dtype=torch.float64) / (NEVER - 1)).square()
    table[NEVER] = float("-inf")
    return table.float()


# Packing: the bytes of one field of one sample, those of one kind together, each kind in a zstd frame of its own.


def planes(field: Tensor, *, wide: bool, rising: bool) -> list[bytes]:
    """The bytes of a field ``(rows, ...)`` in planes that are alike.

    wide
        Class numbers: three bytes each.
    rising
        Rows of uint8 that rise along their last axis (the bytes of sorted log-probabilities): differences are kept.
    """
    if rising:
        before = torch.nn.functional.pad(field[..., :-1], (1, 0))
        field = field - before  # modulo 256
    size = 3 if wide else field.element_size()
    if not field.numel():
        return [b""] * size
    raw = field.contiguous().reshape(-1).view(torch.uint8).reshape(-1, size)
    return [raw[:, number].contiguous().numpy().tobytes() for number in range(size)]


def from_planes(kept: Sequence[bytes], shape: Sequence[int], dtype: torch.dtype, *, rising: bool) -> Tensor:
    """The field that ``planes`` took apart."""
    if not any(kept):
        return torch.empty(*shape, dtype=dtype)
    raw = torch.stack([torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in kept], -1)
    field = raw.reshape(-1).view(dtype).reshape(*shape)
    return field.cumsum(-1, dtype=torch.uint8) if rising else field


def pack(part: bytes) -> bytes:
    """A zstd frame, nothing for nothing; MissingExtra without the package."""
    if not part:
        return b""
    return bytes(_zstd().ZstdCompressor(level=_LEVEL).compress(part))


def unpack(part: bytes, size: int) -> bytes:
    """What a zstd frame of ``size`` bytes holds; DataError for anything else."""
    if not size and not part:
        return b""
    zstd = _zstd()
    try:
        found = bytes(zstd.ZstdDecompressor().decompress(part, max_output_size=size))
    except zstd.ZstdError as error:
        raise DataError(f"a packed block can't be read: {error}") from None
    if len(found) != size:
        raise DataError(f"a packed block holds {len(found)} bytes, expected {size}")
    return found


def _zstd() -> Any:
    try:
        import zstandard
    except ImportError:
        raise MissingExtra("packed soft labels", "zstandard", "pack") from None
    return zstandard
