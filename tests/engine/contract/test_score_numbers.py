"""Scores of any number type; anything else is told before training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.contract.metrics import numbers
from stillhouse.errors import ConfigError


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        np.float32(0.5),
        np.float64(0.5),
        torch.tensor(0.5),
        np.array(0.5),
        torch.tensor(0.5, dtype=torch.bfloat16),
    ],
)
def test_a_number_of_any_library_is_pythons(value):
    found = numbers({"f1": value}, "mine")
    assert found == {"f1": 0.5}
    assert type(found["f1"]) is float


@pytest.mark.parametrize(
    "value", [[0.1, 0.2], (0.1, 0.2), np.array([0.1, 0.2]), torch.tensor([0.1, 0.2], dtype=torch.float64)]
)
def test_one_for_each_class_is_as_many(value):
    assert numbers({"f1": value}, "mine") == {"f1.0": 0.1, "f1.1": 0.2}


@pytest.mark.parametrize(
    "scores",
    [0.5, "good", None, [0.5], {}, {"f1": "high"}, {"f1": None}, {"f1": [0.1, "x"]}, {"f1": {"a": 1}}],
)
def test_anything_else_is_refused(scores):
    with pytest.raises(ConfigError, match=r"score of mine gave .*expected"):
        numbers(scores, "mine")
