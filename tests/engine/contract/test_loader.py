"""A loader's own order: used, drawn under the run's seed, or refused by name."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from stillhouse.errors import ConfigError, DataError
from stillhouse.runs.data import as_split
from stillhouse.training.order import order_of


class Items:
    """Rows that say that they were read."""

    def __init__(self, rows=20):
        self.rows, self.read = rows, set()

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        self.read.add(row)
        return torch.tensor([float(row)]), row % 3


class Forever(Sampler):
    def __init__(self):
        pass

    def __iter__(self):
        while True:
            yield 0


class Counts(Sampler):
    """Gives every row of ``rows``, once more or less than it says."""

    def __init__(self, rows, says):
        self.rows, self.says = rows, says

    def __len__(self):
        return self.says

    def __iter__(self):
        return iter(self.rows)


class Goes(Sampler):
    """Another order at each epoch, from a counter that no seed reaches."""

    def __init__(self):
        self.at = [0]

    def __len__(self):
        return 4

    def __iter__(self):
        self.at[0] += 1
        return iter([self.at[0] % 20] * 4)


def batches(loader, start=0, end=6, seed=0, **given):
    """The dataset's rows of each update."""
    split = as_split(loader, "train", **given)
    order = order_of(split, loader.batch_size or 4, seed, 0)
    return [batch.inputs[:, 0].int().tolist() for batch in split.stream(order.rest(start, end))]


def loader(sampler=None, batch_size=4, **given):
    return DataLoader(Items(), batch_size, sampler=sampler, **given)


def test_rows_in_order_stay_in_order_and_the_last_batch_is_as_short_as_the_loaders():
    read = batches(loader(batch_size=8), end=4)
    assert read == [list(range(8)), list(range(8, 16)), list(range(16, 20)), list(range(8))]
    assert batches(loader(batch_size=8, drop_last=True), end=3)[2] == list(range(8))


def test_shuffled_rows_come_once_an_epoch_in_the_order_of_the_runs_seed():
    read = list(chain.from_iterable(batches(loader(shuffle=True), end=5)))
    assert sorted(read) == list(range(20))
    assert batches(loader(shuffle=True)) == batches(loader(shuffle=True))
    assert batches(loader(shuffle=True)) != batches(loader(shuffle=True), seed=1)


@pytest.mark.parametrize(
    "sampler",
    [
        SubsetRandomSampler(range(10)),
        WeightedRandomSampler([1.0] * 10 + [0.0] * 10, 12),
        Counts(range(10), 10),
        SubsetRandomSampler(range(10), generator=torch.Generator()),
    ],
)
def test_rows_that_the_sampler_leaves_out_are_never_read(sampler):
    given = loader(sampler)
    split = as_split(given, "train")
    split.validate("train")
    split.fingerprint()
    split.probe(4)
    assert set(chain.from_iterable(batches(given, end=20))) <= set(range(10))
    assert given.dataset.read <= set(range(10))
    assert len(split) == 10


@pytest.mark.parametrize(
    "sampler", [SubsetRandomSampler(range(10)), RandomSampler(range(20), replacement=True), WeightedRandomSampler([1, 2] * 10, 20)]
)  # fmt: skip
def test_the_order_depends_on_seed_and_update_alone(sampler):
    given = loader(sampler)
    whole = batches(given, end=12)
    torch.manual_seed(7)
    assert batches(given, 5, 12) == whole[5:]
    assert batches(given, end=12, seed=1) != whole


def test_a_resume_reads_no_row_of_what_was_seen():
    given = loader(batch_size=2)
    order = order_of(split := as_split(given, "train"), 2, 0, 0)
    given.dataset.read.clear()
    list(split.stream(order.rest(8, 10)))
    assert given.dataset.read == {16, 17, 18, 19}


def test_a_batch_sampler_makes_the_batches():
    own = [[0, 1, 2], [5], [7, 9]]
    given = DataLoader(Items(), batch_sampler=Counts(own, 3))
    assert batches(given, end=4) == [*own, own[0]]
    with pytest.raises(ConfigError, match="batch_sampler of its own"):
        as_split(given, "train", batch_size=8)


def test_a_size_that_the_run_states_is_used_in_place_of_the_loaders():
    split = as_split(loader(SequentialSampler(range(20))), "train", batch_size=10)
    assert [len(index) for index in split.batches.epoch(0, 0)] == [10, 10]


def test_a_scored_split_is_what_one_epoch_of_its_loader_has():
    assert len(as_split(loader(batch_size=8, drop_last=True), "validation")) == 16
    assert len(as_split(loader(SubsetRandomSampler([3, 4, 9])), "test")) == 3
    assert len(as_split(loader(shuffle=True), "validation")) == 20


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        (Forever(), "sampler without a length (Forever)"),
        (BatchSampler(Forever(), 4, drop_last=False), "sampler without a length (Forever)"),
        (Counts([[0, 1]], 3), "an epoch has 3 batches, and gave 1 in epoch 0"),
        (Counts([[0]] * 5, 3), "an epoch has 3 batches, and gave more in epoch 0"),
        (Counts([], 0), "gives no batch"),
        (Counts([[25]], 1), "gave row 25 in epoch 0"),
        (BatchSampler(Goes(), 4, drop_last=False), "gave two orders under one seed"),
    ],
)
def test_an_order_that_can_not_be_made_again_is_refused(sampler, said):
    with pytest.raises(DataError) as caught:
        as_split(DataLoader(Items(), batch_sampler=sampler), "train")
    assert said in str(caught.value)


def test_a_loader_without_batches_is_refused():
    with pytest.raises(ConfigError, match="batch_size=None"):
        as_split(DataLoader(Items(), batch_size=None), "train")
