"""Mapped files: their tensors, and how much of them this process holds."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import torch
from torch import Tensor

RESIDENT = 256 * 2**20
"""Bytes of mapped pages after which they are given back."""
FOLD = 2 * 2**20
"""The most that the kernel maps around a touched page: a large folio of the page cache."""
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
}


def mapped(path: Path) -> tuple[mmap.mmap, dict[str, Tensor], dict[str, str]]:
    """A safetensors file's pages, its tensors over them, and its metadata. safetensors' own reader would copy them."""
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_RANDOM"):
        pages.madvise(mmap.MADV_RANDOM)
    size = int.from_bytes(pages[:8], "little")
    header = json.loads(pages[8 : 8 + size])
    metadata, tensors = header.pop("__metadata__", {}), {}
    for name, about in header.items():
        start, end = about["data_offsets"]
        dtype, shape = _DTYPES[about["dtype"]], about["shape"]
        if start == end:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        count, at = (end - start) // dtype.itemsize, 8 + size + start
        tensors[name] = torch.frombuffer(pages, dtype=dtype, count=count, offset=at).reshape(shape)
    return pages, tensors, metadata


def give_back(pages: mmap.mmap) -> None:
    """Unmap what was touched; it stays in the page cache, and comes again when it is read."""
    if hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


class Held:
    """When mapped pages are to be given back.

    How much a read maps is the kernel's affair: 64 KiB, or a large folio. So it is looked at, on Linux, after as many
    reads as could have mapped ``RESIDENT``; elsewhere that estimate alone decides.
    """

    def __init__(self) -> None:
        self._estimate = 0
        self._before = _mapped_bytes() or 0

    def too_much(self, samples: int, each: int, size: int) -> bool:
        """Whether to give pages back after these reads.

        samples, each
            How many samples were read, and bytes of one.
        size
            Bytes of all files that are mapped.
        """
        if size <= RESIDENT:
            return False
        self._estimate += samples * (each + FOLD)
        if self._estimate <= RESIDENT:
            return False
        self._estimate = 0
        now = _mapped_bytes()
        return now is None or now - self._before > RESIDENT


def _mapped_bytes() -> int | None:
    """Bytes of files that this process has in its memory; None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[2]) * mmap.PAGESIZE
    except OSError:
        return None


def most_files() -> int:
    """How many files may be mapped at once: half of those that this process may have open, each takes one."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 4096 if soft == resource.RLIM_INFINITY else max(1, min(4096, soft // 2))
