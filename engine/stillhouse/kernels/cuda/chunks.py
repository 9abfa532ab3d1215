"""How a row is cut into chunks and dealt out, for the kernels that give a row to one block or to a cluster."""

# mypy: ignore-errors
# Numba infers the types of device functions from their callers.
from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from stillhouse.kernels.cuda import intrinsics as ptx
from stillhouse.kernels.cuda.arithmetic import ZERO, device

I32, I64, F32 = np.int32, np.int64, np.float32


SECTOR = 2  # vectors in the 32 bytes that caches fetch at the least


def row_geometry(size: int, sectors: bool = True):
    """Device function: where the chunks of a row lie, and which of them are whole on every tensor.

    ``origin`` is the element at which chunk 0 starts (at most 0), chunks [first, last) are whole, ``count`` is their
    number, ``apart`` the elements between a chunk's two vectors. Tensors that are not aligned alike have no whole
    chunk: all of the row then moves by element. With ``sectors`` both halves of a float32 row start alike relative to
    sectors, which may cost an edge more.
    """
    per = 16 // size  # elements of a vector
    shift = 2 if size == 4 else 3

    @device
    def geometry(s_row, t_row, g_row, width, whole):
        misfit = ((s_row ^ t_row) | (s_row ^ g_row)) & I64(15)
        head = I32(I32(I32(16) - I32(s_row & I64(15))) & I32(15)) >> I32(size >> 1)
        origin = I32(head - per) if head > I32(0) else I32(0)
        first = I32(1) if head > I32(0) else I32(0)
        count = I32(I32(width - origin) + I32(per - 1)) >> I32(shift)
        last = I32(whole - origin) >> I32(shift)
        apart = I32(0)
        if size == 4:
            count = I32(count + 1) >> I32(1)
            if sectors:
                count = I32(count + SECTOR - 1) & I32(-SECTOR)
            apart, last = I32(count * per), I32(last - count)
        if misfit != I64(0) or last < first:
            first = I32(0)
            last = I32(0)
        return origin, first, last, count, apart

    return geometry


def is_kept(mask, row):
    keep = True
    if mask != I64(0):
        keep = ptx.load_u8(mask + I64(row)) != np.uint32(0)
    return keep


def row_scale(scale, row, factor):
    if scale != I64(0):
        factor = factor * ptx.load_f32(scale + I64(row) * 4)
    return factor


is_kept, row_scale = device(is_kept), device(row_scale)


def walk(code: SimpleNamespace, threads: int, planes: int) -> SimpleNamespace:
    """Device functions over ``chunks``: (origin, first, last, count, apart, lo, hi, tid, base), see ``row_geometry``.

    This block (or warp) has the chunks [lo, hi), and shared memory from word ``base`` on, with ``planes`` vectors for
    each chunk. Each of its threads takes every ``threads``-th of the whole ones, and of the others, the edges.
    """
    size, first_element, encode, put, put_edge = (
        code.size,
        code.first_element,
        code.encode,
        code.put,
        code.put_edge,
    )
    stride = I64(threads * 16)  # bytes from a thread's chunk to its next
    jump = threads * planes * 4  # the same in words of shared memory

    @device
    def cell(slot, chunks):
        """Where in shared memory the chunk of a slot of the slice has its first vector."""
        return I32(chunks[8] + ((slot & I32(-32)) * planes + (slot & I32(31))) * 4)

    @device
    def whole_of(chunks):
        """This thread's whole chunks, as slots of the slice: (first, end), then the first one's place: bytes from the
        row's start, and the word in shared memory.

        At most one chunk before the first whole one hangs over the start of the row.
        """
        origin, first, last, count, apart, lo, hi, tid, base = chunks
        chunk = I32(lo + tid)
        chunk = chunk if chunk >= first else I32(chunk + threads)
        slot = I32(chunk - lo)
        return slot, I32(min(hi, last) - lo), I64(origin + first_element(chunk)) * size, cell(slot, chunks)

    @device
    def edges(chunks):
        """How many chunks of the row are not whole: [0, first) and [last, count)."""
        return I32(chunks[1] + chunks[3] - chunks[2])

    @device
    def edge(j, chunks):
        return j if j < chunks[1] else I32(j - chunks[1] + chunks[2])

    @device
    def mine(chunk, chunks):
        return chunk >= chunks[5] and chunk < chunks[6]

    @device
    def element_of(chunk, chunks):
        return I32(chunks[0] + first_element(chunk))

    @device
    def clear_row(g_row, v, chunks):
        za, zb = encode((ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO))
        slot, stop, at, home = whole_of(chunks)
        while slot < stop:
            put(g_row + at, chunks[4], za, zb)
            slot, at = ptx.uncounted(slot + threads), at + stride
        j = chunks[7]
        while j < edges(chunks):
            chunk = edge(j, chunks)
            if mine(chunk, chunks):
                put_edge(g_row, element_of(chunk, chunks), v, chunks[4], za, zb)
            j = I32(j + threads)

    return SimpleNamespace(
        whole_of=whole_of,
        edges=edges,
        edge=edge,
        mine=mine,
        element_of=element_of,
        clear_row=clear_row,
        cell=cell,
        stride=stride,
        jump=jump,
    )
