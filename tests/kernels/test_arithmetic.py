"""The CPU kernels' exponentials, by themselves: of logits relative to a row's reference."""

from __future__ import annotations

import math

import numba
import numpy as np
import pytest
import torch

from stillhouse.kernels.cpu.arithmetic import LEAST, exp2_of_product
from stillhouse.kernels.cpu.lanes import load, store

TEMPERATURES = [0.05, 0.7, 1.0, 2.0, 100.0]


def parts(temperature):
    """What an exponent is multiplied by for exp(a / temperature), in two float32."""
    whole = np.float64(np.float32(1 / temperature)) / math.log(2.0)
    high = np.float32(whole)
    return high, np.float32(whole - high), whole


@pytest.fixture(scope="module")
def powers():
    @numba.njit
    def over(count, a, out, k, k_low, least):
        for i in range(0, count, 16):
            store(out + 4 * i, exp2_of_product(load(a + 4 * i), k, k_low, least))

    def of(a, temperature):
        high, low, _ = parts(temperature)
        out = torch.empty_like(a)
        over(len(a), a.data_ptr(), out.data_ptr(), high, low, LEAST / high)
        return out

    return of


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_exponentials_are_known_to_float32(temperature, powers):
    _, _, whole = parts(temperature)
    a = (torch.linspace(float(LEAST) + 1e-4, 8.0, 1 << 20, dtype=torch.float64) / whole).float()
    wrong = powers(a, temperature).double() / torch.exp2(a.double() * whole) - 1
    assert wrong.abs().max() <= 1e-7
    assert wrong.mean().abs() <= 2e-9


@pytest.mark.parametrize("most", [0.02, 0.06, 0.1, 0.2])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_exponentials_near_the_largest_are_right_on_average(temperature, most, powers):
    """The normaliser of a nearly flat row is a sum of such ones, and its loss shows what that is off by."""
    _, _, whole = parts(temperature)
    a = (torch.linspace(-most, 0.0, 1 << 18, dtype=torch.float64) / whole).float()
    wrong = powers(a, temperature).double() / torch.exp2(a.double() * whole) - 1
    assert wrong.mean().abs() <= 3e-9


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_what_float32_has_no_normal_number_for_is_zero_and_nan_stays(temperature, powers):
    _, _, whole = parts(temperature)
    below = [-126.01 / whole, -127.0 / whole, -200.0 / whole, -1e30, -math.inf]
    a = torch.tensor([0.0, *below, math.nan, -math.nan], dtype=torch.float32)
    got = powers(torch.cat([a, torch.zeros(16 - len(a))]), temperature)[: len(a)]
    assert got[0] == pytest.approx(1.0, abs=6e-8)
    assert torch.equal(got[1:6], torch.zeros(5))
    assert got[6:].isnan().all()
