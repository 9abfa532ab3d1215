"""Random numbers that are the same for every row, whatever the number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.testing.alike import DrawnAlike


def drawn(draw, rows: int):
    with DrawnAlike():
        return draw(rows)


DRAWS = {
    "randn": lambda rows: torch.randn(rows, 3),
    "rand_like": lambda rows: torch.rand_like(torch.zeros(rows, 4, 3)),
    "randint": lambda rows: torch.randint(100, (rows, 3)),
    "scalars": lambda rows: torch.rand(rows),
    "normal_": lambda rows: torch.empty(rows, 3).normal_(),
    "dropout": lambda rows: nn.functional.dropout(torch.ones(rows, 50)),
    "bernoulli": lambda rows: torch.bernoulli(torch.full((rows, 50), 0.5)),
    "multinomial": lambda rows: torch.multinomial(torch.ones(rows, 30), 9, replacement=True),
    "beta": lambda rows: torch.distributions.Beta(0.2, 0.2).sample((rows,)),
    "own generator": lambda rows: torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_each_row_draws_what_any_other_does(name):
    few, many = drawn(DRAWS[name], 2), drawn(DRAWS[name], 40)
    assert many.shape[0] == 40
    assert (many == few[0]).all()
    assert few.float().std() > 0 or few.dim() == 1, "they are draws, not constants"


def test_one_draw_differs_from_the_next_and_the_generator_stays_as_it_is():
    before = torch.get_rng_state()
    with DrawnAlike():
        first, second = torch.randn(4), torch.randn(4)
        wide, more = torch.randn(2, 4), torch.randn(2, 4)
    assert first[0] != second[0]
    assert not torch.equal(wide, more)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_permutation_leaves_all_where_it_is():
    assert drawn(torch.randperm, 5).tolist() == [0, 1, 2, 3, 4]
    assert drawn(lambda rows: torch.arange(rows) * 2, 3).tolist() == [0, 2, 4], (
        "what draws nothing is as it was"
    )
