"""Datasets by protocol, and iterables."""

from __future__ import annotations

import pytest
import torch
import toys
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

import stillhouse
from stillhouse.api import IGNORE, KINDS
from stillhouse.contract.datasets import DatasetSplit, collated
from stillhouse.contract.joined import JoinedSplit
from stillhouse.contract.reading import Reading
from stillhouse.contract.splits import Splits, TensorSplit
from stillhouse.errors import ConfigError, DataError
from stillhouse.runs.data import as_split, as_splits

X, Y = toys.rows(10, 1)


class Table:
    """A table's rows as mappings of plain numbers, as the library ``datasets`` gives them."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row):
        return {name: column[row] for name, column in self.columns.items()}


class Stream(IterableDataset):
    """Rows as they come, each with a random part."""

    def __init__(self, rows=7):
        self.rows = rows

    def __iter__(self):
        for row in range(self.rows):
            yield torch.cat([X[row % 10], torch.rand(1)]), row


@pytest.mark.parametrize("name", ["label", "labels"])
def test_a_table_of_plain_numbers_is_a_dataset_whatever_its_class(name):
    split = as_split(Table(x=X.tolist(), **{name: Y.tolist()}), "train")
    batch = split.batch(torch.tensor([4, 2]))
    torch.testing.assert_close(batch.inputs["x"], X[[4, 2]])
    assert torch.equal(batch.labels, Y[[4, 2]])


def test_a_mapping_with_labels_beside_it_and_a_list_of_items_are_taken():
    beside = as_split(({"a": X, "b": X + 1}, Y), "train")
    assert torch.equal(beside.batch(torch.tensor([3])).inputs["b"], X[[3]] + 1)
    items = as_split([({"a": x}, y) for x, y in zip(X, Y, strict=True)], "train")
    assert torch.equal(items.batch(torch.tensor([3])).labels, Y[[3]])
    assert torch.equal(as_splits({"input_ids": X, "labels": Y}).train.labels, Y)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Table(x=X.tolist(), text=["a"] * 10), "'text' is a string"),
        (Table(x=X.tolist(), labels=["a"] * 10), "labels are strings"),
        ([(X[0, : row + 1], 0) for row in range(5)], "can't be joined to a batch"),
        ([(X[row], 0, 1) for row in range(5)], "a batch of 3 parts"),
        ([], "the train split is"),
    ],
)
def test_items_that_are_no_batch_are_refused_by_name(data, said):
    with pytest.raises(DataError) as caught:
        as_splits(data).validate()
    assert said in str(caught.value)


def test_a_collate_that_gives_other_rows_is_refused():
    split = DatasetSplit(Table(x=X.tolist()), collate=lambda items: collated(items)["x"][:1])
    with pytest.raises(DataError, match="made 1 rows of 3 items"):
        split.batch(torch.arange(3))


class TestIterable:
    def split(self, rows=7, batch_size=3, workers=0):
        return as_split(DataLoader(Stream(rows), batch_size, num_workers=workers), "train")

    def read(self, split, start, end, **reading):
        indices = [torch.empty(0)] * (end - start)
        return [batch.inputs for batch in split.stream(indices, Reading(start=start, **reading))]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_begins_anew_at_its_end_and_skips_what_was_read(self, workers):
        whole = self.read(self.split(workers=workers), 0, 8, seed=4)
        rest = self.read(self.split(workers=workers), 5, 8, seed=4)
        assert all(torch.equal(one, other) for one, other in zip(whole[5:], rest, strict=True))
        if not workers:
            assert [len(batch) for batch in whole] == [3, 3, 1, 3, 3, 1, 3, 3]
            assert not torch.equal(whole[0], whole[3]), "random parts are drawn anew each epoch"

    def test_has_no_ids_and_keeps_nothing(self):
        split = self.split()
        assert next(split.stream([torch.empty(0)])).ids is None
        assert not split.fixed

    def test_that_ends_for_good_says_after_how_many_batches(self):
        class Once(IterableDataset):
            def __init__(self):
                self.rows = iter([(x, 0) for x in X])

            def __iter__(self):
                return self.rows

        with pytest.raises(DataError, match="ended after 2 batches and gives none when it is read again"):
            self.read(as_split(DataLoader(Once(), 5), "train"), 0, 3)

    def test_what_needs_row_numbers_is_refused(self):
        splits = Splits(TensorSplit(X, Y), unlabelled=self.split())
        with pytest.raises(DataError, match="no length and no row numbers"):
            splits.stage("all")
        with pytest.raises(ConfigError, match="workers is 2, and the train split's loader has 0"):
            self.read(self.split(), 0, 1, workers=2)
        with pytest.raises(ConfigError, match="makes batches of 3"):
            as_split(DataLoader(Stream(), 3), "train", batch_size=4)

    def test_trains_and_is_scored(self):
        class Rows(IterableDataset):
            def __iter__(self):
                return iter(zip(X, Y, strict=True))

        data = {"train": DataLoader(Rows(), 4), "validation": DataLoader(Rows(), 4)}
        made = stillhouse.distill(toys.net(seed=1), toys.net(16), data, method="kd", steps=5, device="cpu")
        assert made.summary["batch_size"] == 4
        given = toys.net(seed=1)
        given.load_state_dict(made.student.state_dict())
        assert made.scores["validation"]["accuracy"] == pytest.approx(
            float((given.eval()(X).argmax(-1) == Y).float().mean())
        )


class Ragged:
    """Token rows of lengths of their own."""

    def __init__(self, *lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, row):
        return torch.full((self.lengths[row],), row + 1)


def joined(first, second, **given):
    def collate(items):
        padded = pad_sequence(items, batch_first=True)
        found = {"input_ids": padded, "labels": padded.where(padded > 0, IGNORE)}
        return (
            {**found, "attention_mask": (padded > 0).long()}
            if given.get("attention", True)
            else found["input_ids"]
        )

    kind = KINDS["token_classification" if given.get("attention", True) else "classification"]
    parts = (
        DatasetSplit(Ragged(*lengths), labelled, collate=collate, kind=kind)
        for lengths, labelled in ((first, True), (second, False))
    )
    return JoinedSplit(*parts)


@pytest.mark.parametrize("lengths", [((2, 3), (5, 1)), ((6, 3), (2, 1)), ((3, 3), (3, 3))])
def test_labelled_and_unlabelled_rows_are_padded_to_the_longer(lengths):
    batch = joined(*lengths).batch(torch.tensor([3, 0, 2, 1]))
    longest = max(*lengths[0], *lengths[1])
    own = [lengths[1][1], lengths[0][0], lengths[1][0], lengths[0][1]]
    assert batch.inputs["input_ids"].shape == (4, longest)
    real = torch.arange(longest) < torch.tensor(own)[:, None]
    assert torch.equal(batch.inputs["attention_mask"].bool(), real)
    labelled = torch.tensor([False, True, False, True])[:, None] & real
    assert torch.equal(batch.labels != IGNORE, labelled)
    assert torch.equal(batch.mask, real)


def test_lengths_that_nothing_tells_apart_are_refused():
    with pytest.raises(DataError, match="nothing says which positions are real"):
        joined((2, 3), (5, 1), attention=False).batch(torch.arange(4))
