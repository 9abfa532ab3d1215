"""Batches that are read ahead: the same bits whoever reads them, and the process's random numbers as they were."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from stillhouse.contract.datasets import DatasetSplit
from stillhouse.contract.joined import JoinedSplit
from stillhouse.contract.reading import Loading, Reading
from stillhouse.errors import DataError


class Random:
    """Items that draw from every generator; also where they were read."""

    def __init__(self, rows=12):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, row):
        return torch.tensor([row, torch.rand(()), np.random.rand(), random.random()]), row % 3


class Breaks(Random):
    def __getitem__(self, row):
        if row == 5:
            raise KeyError("no such picture")
        return super().__getitem__(row)


class Process(Random):
    def __getitem__(self, row):
        return torch.tensor([os.getpid()])


INDICES = [torch.tensor([3, 1]), torch.tensor([0, 5]), torch.tensor([3, 1]), torch.tensor([2, 4])]


def inputs(split, indices, **reading):
    return torch.stack([batch.inputs for batch in split.stream(indices, Reading(**reading))])


@pytest.mark.parametrize("workers", [1, 2])
def test_random_items_have_the_same_bits_for_any_number_of_workers(workers):
    split = DatasetSplit(Random())
    assert torch.equal(inputs(split, INDICES, workers=0), inputs(split, INDICES, workers=workers))


def test_a_batch_draws_by_its_number_and_the_seed():
    split = DatasetSplit(Random())
    whole = inputs(split, INDICES, seed=1)
    assert torch.equal(whole[2:], inputs(split, INDICES[2:], seed=1, start=2)), "after a resume"
    assert not torch.equal(whole[0], whole[2]), "another draw for the same rows"
    assert not torch.equal(whole, inputs(split, INDICES, seed=2))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_processs_random_numbers_are_as_they_were(workers):
    split = DatasetSplit(Random())

    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    def seeded():
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)

    seeded()
    expected = draw()
    seeded()
    inputs(split, INDICES, workers=workers)
    split.fingerprint()
    assert draw() == expected


def test_workers_are_those_of_the_run_else_of_the_loader():
    here = os.getpid()
    split = DatasetSplit(Process(), loading=Loading(workers=1))
    assert here not in inputs(split, INDICES)
    assert set(inputs(split, INDICES, workers=0).flatten().tolist()) == {here}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_can_not_be_read_is_told_when_its_turn_comes(workers):
    batches = DatasetSplit(Breaks()).stream(INDICES, Reading(workers=workers))
    next(batches)
    with pytest.raises(DataError, match=r"rows 0, 5 of Breaks can't be read \(KeyError: 'no such picture'\)"):
        next(batches)


def test_a_joined_split_is_read_by_workers_too():
    split = JoinedSplit(DatasetSplit(Random()), DatasetSplit(Random(), labelled=False))
    indices = [torch.tensor([0, 13, 2]), torch.tensor([1, 2, 3])]
    assert torch.equal(inputs(split, indices, workers=0), inputs(split, indices, workers=1))
