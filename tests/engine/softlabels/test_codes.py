"""Numbers in one byte and in three, and packed blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.errors import DataError
from stillhouse.softlabels.codes import (
    DEPTH,
    LARGEST_ID,
    byte_table,
    from_planes,
    from_three_bytes,
    one_byte,
    pack,
    planes,
    three_bytes,
    unpack,
)


@given(st.lists(st.integers(0, LARGEST_ID), max_size=20))
def test_three_bytes_hold_every_class_number(numbers):
    given = torch.tensor(numbers, dtype=torch.long)
    assert torch.equal(from_three_bytes(three_bytes(given)), given)


def test_the_largest_class_number_is_no_sentinel():
    given = torch.tensor([[0, 1, 2**16, 2**17 - 1, 2**17, LARGEST_ID]])
    assert three_bytes(given).shape == (1, 6, 3)
    assert torch.equal(from_three_bytes(three_bytes(given)), given)


@pytest.mark.parametrize("number", [-1, LARGEST_ID + 1])
def test_a_class_number_that_three_bytes_do_not_hold_is_refused(number):
    with pytest.raises(DataError, match=rf"{number}.*expected 0 to 16,777,215"):
        three_bytes(torch.tensor([number]))


def test_a_log_probability_in_a_byte_is_off_by_half_a_step_at_most():
    logs = -torch.linspace(0, DEPTH, 10_000)
    back = byte_table()[one_byte(logs).int()]
    step = 2 * DEPTH * (-logs / DEPTH).sqrt() / 254 + DEPTH / 254**2
    assert ((back - logs).abs() <= 0.5 * step + 1e-5).all()
    assert (back - logs)[0] == 0


def test_probability_zero_is_kept_and_small_ones_are_not_zero():
    back = byte_table()[one_byte(torch.tensor([float("-inf"), -1000.0, 0.0])).int()]
    assert back.tolist() == [float("-inf"), -DEPTH, 0.0]


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_packed_blocks_come_back(rows, rising):
    logs = torch.randint(0, 256, (rows, 9)).sort(-1).values.to(torch.uint8)
    indices = three_bytes(torch.randint(LARGEST_ID, (rows, 9)))
    half = torch.randn(rows, 9).half()
    for field, wide, up in ((logs, False, rising), (indices, True, False), (half, False, False)):
        kept = planes(field, wide=wide, rising=up)
        size = rows * 9
        assert all(len(part) == size for part in kept)
        again = [unpack(pack(part), size) for part in kept]
        assert torch.equal(from_planes(again, field.shape, field.dtype, rising=up), field)


def test_a_packed_block_of_another_size_or_of_garbage_is_refused():
    with pytest.raises(DataError, match="holds 5 bytes, expected 6"):
        unpack(pack(b"12345"), 6)
    with pytest.raises(DataError, match="can't be read"):
        unpack(b"garbage", 5)
