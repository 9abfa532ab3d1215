"""The order of rows: a pure function of seed, stage and update."""

from __future__ import annotations

import pytest
import torch

from stillhouse.training.order import Order


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 3), (7, 7), (3, 8), (1, 4)])
def test_every_row_comes_once_an_epoch_and_every_batch_is_full(rows, batch_size):
    order = Order(rows, batch_size, seed=0, stage=0)
    batches = [order.batch(update) for update in range(rows * 3)]
    assert {len(batch) for batch in batches} == {batch_size}
    seen = torch.cat(batches)
    for epoch in range(len(seen) // rows):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))


def test_an_update_is_the_same_whatever_was_asked_before():
    straight = [Order(10, 3, 5, 1).batch(update) for update in range(20)]
    order = Order(10, 3, 5, 1)
    for update in (19, 0, 7, 7, 3):
        assert torch.equal(order.batch(update), straight[update])


def test_seeds_stages_and_epochs_differ():
    orders = {
        tuple(Order(50, 50, seed, stage).batch(epoch).tolist())
        for seed in range(4)
        for stage in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 36


def test_the_global_generators_are_not_touched():
    before = torch.get_rng_state()
    Order(10, 3, 0, 0).batch(4)
    assert torch.equal(before, torch.get_rng_state())
