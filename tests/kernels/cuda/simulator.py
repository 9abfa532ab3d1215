"""Twins of ``stillhouse.kernels.cuda.intrinsics`` for Numba's CUDA simulator (threads of one block, no clusters)."""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

import ctypes
import threading

import numpy as np
from numba import cuda

device = cuda.jit(device=True)
SHARED_ALIGNMENT = None  # the simulator takes none


def _read(kind, address):
    return kind.from_address(int(address)).value


def _array(shared):
    return getattr(shared, "_ary", shared)


def exp2(x):
    with np.errstate(all="ignore"):
        return np.exp2(np.float32(x))


def log2_approx(x):
    with np.errstate(all="ignore"):
        return np.log2(np.float32(x))


def reciprocal(x):
    with np.errstate(all="ignore"):
        return np.float32(1) / np.float32(x)


def fma(a, b, c):
    with np.errstate(all="ignore"):
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


def fmax(a, b):
    return np.fmax(np.float32(a), np.float32(b))


def fmin(a, b):
    return np.fmin(np.float32(a), np.float32(b))


def word_as_float(word):
    return np.uint32(word).view(np.float32)


def float_as_word(x):
    return np.float32(x).view(np.uint32)


def bf16_low(word):
    return np.uint32((int(word) << 16) & 0xFFFFFFFF).view(np.float32)


def bf16_high(word):
    return np.uint32(int(word) & 0xFFFF0000).view(np.float32)


def _bf16(x):
    bits = int(np.float32(x).view(np.uint32))
    if (bits & 0x7FFFFFFF) > 0x7F800000:
        return 0x7FFF
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def bf16_pack(low, high):
    return np.uint32(_bf16(low) | (_bf16(high) << 16))


def f16_low(word):
    return np.float32(np.uint16(int(word) & 0xFFFF).view(np.float16))


def f16_high(word):
    return np.float32(np.uint16(int(word) >> 16).view(np.float16))


def f16_pack(low, high):
    with np.errstate(over="ignore"):
        return np.uint32(int(np.float16(low).view(np.uint16)) | (int(np.float16(high).view(np.uint16)) << 16))


def load_words(address):
    return tuple(np.uint32(w) for w in (ctypes.c_uint32 * 4).from_address(int(address)))


def store_words(address, a, b, c, d):
    (ctypes.c_uint32 * 4).from_address(int(address))[:] = [int(a), int(b), int(c), int(d)]


def load_u8(address):
    return np.uint32(_read(ctypes.c_uint8, address))


def load_u16(address):
    return np.uint32(_read(ctypes.c_uint16, address))


def load_i64(address):
    return np.int64(_read(ctypes.c_int64, address))


def load_f32(address):
    return np.float32(_read(ctypes.c_float, address))


def store_u16(address, word):
    ctypes.c_uint16.from_address(int(address)).value = int(word) & 0xFFFF


def store_f32(address, x):
    ctypes.c_float.from_address(int(address)).value = float(x)


def shared_load_words(array, offset):
    return tuple(np.uint32(w) for w in _array(array)[int(offset) : int(offset) + 4].view(np.uint32))


def shared_store_words(array, offset, a, b, c, d):
    words = np.array([a, b, c, d], np.uint32)
    _array(array)[int(offset) : int(offset) + 4] = words.view(_array(array).dtype)


def shared_load(array, offset):
    return _array(array)[int(offset) : int(offset) + 1].view(np.float32)[0]


def shared_store(array, offset, value):
    _array(array)[int(offset) : int(offset) + 1].view(np.float32)[0] = value


def uncounted(number):
    return number


def cluster_rank():
    return np.int32(0)


def cluster_arrive():
    raise NotImplementedError(
        "the simulator runs one block at a time: got a kernel for clusters; simulate cluster=1"
    )


def cluster_wait():
    cluster_arrive()


def cluster_store(array, offset, rank, value):
    cluster_arrive()


class _Warp:
    """Where the lanes of one simulated warp exchange values."""

    def __init__(self, lanes: int) -> None:
        self.barrier = threading.Barrier(lanes)
        self.values = [np.float32(0)] * 32


_WARPS_LOCK = threading.Lock()


def shuffle_xor(value, lane_mask):
    """Write to the warp's slots, meet, read the partner's, meet again: what a shuffle does, by exchange."""
    thread = threading.current_thread()
    block = thread._manager
    with _WARPS_LOCK:
        warps = vars(block).setdefault("stillhouse_warps", {})
        key = (tuple(thread.blockIdx), thread.thread_id // 32)
        if key not in warps:
            warps[key] = _Warp(min(32, int(np.prod(block._block_dim))))
        warp = warps[key]
    lane = thread.thread_id % 32
    warp.values[lane] = value
    warp.barrier.wait()
    got = warp.values[lane ^ int(lane_mask)]
    warp.barrier.wait()
    return got
