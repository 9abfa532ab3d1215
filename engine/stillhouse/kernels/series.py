"""Polynomials: of terms of the divergences about equal distributions, where the closed forms cancel, and a logarithm."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import NDArray

RADIUS = 0.75  # |log(s / t)| below which the polynomials hold
# (exp(x) - 1 - x) / x^2, lowest power first, to 9e-8 relative: minimax
PHI = (
    0.5,
    0.166666719695,
    0.0416666398057,
    0.0083325718641,
    0.00138896581156,
    0.000201131610344,
    2.48915265149e-05,
)
# log(1 + r) / r for r from 0 to 1, lowest power first, to 3e-8 relative: minimax. For CUDA, where a division is dear
LOG1P = (
    0.99999996988,
    -0.499994931398,
    0.333190967941,
    -0.248429821074,
    0.191060063469,
    -0.136632449171,
    0.0782259415495,
    -0.0295052324425,
    0.00523269268483,
)
# log(1 + r) / u of u = r / (2 + r) for r from 0 to 1, lowest power of u^2 first, to 4e-9 relative: minimax
LOG1P_BY_SHARE = (2.00000000792, 0.666663146821, 0.400249102795, 0.279606027471, 0.281783350867)
NO_LABEL = -100  # a row without a label, as torch's cross-entropy has it
LEAST_REST = 1e-13  # what 1 less a sum of probabilities in float64 leaves below this is the sum's rounding
TERMS = 8  # even, so that no node lies at zero; errors stay below 1e-8 relative, less than coefficients of float32 give
LOG_REST = 2 * TERMS + 1  # where jsd_series has log(1 - beta)
LOG_ODDS = LOG_REST + 1  # and log(beta / (1 - beta))
JSD_APART = LOG_ODDS + 1  # where the CPU kernel puts jsd_apart, after it


@lru_cache(maxsize=64)
def jsd_series(beta: float) -> tuple[float, ...]:
    """Coefficients, lowest power first, of two polynomials in x = log(s / t), |x| < ``RADIUS``, and three logarithms.

    With A(x) = log(m / t) = log(beta + (1 - beta) e^x) they are log(s / m) / x = (x - A) / x and
    the loss / (beta t x^2) = -[beta A + (1 - beta) e^x (A - x)] / (beta x^2), interpolated at Chebyshev's nodes.
    The logarithms are those of beta, of 1 - beta, and of beta / (1 - beta).
    """
    rest = 1 - beta

    def mixture(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log1p(rest * np.expm1(x))

    def to_student(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return (x - mixture(x)) / x

    def loss(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return -(beta * mixture(x) + rest * np.exp(x) * (mixture(x) - x)) / (beta * x * x)

    log_beta, log_rest = math.log(beta), math.log1p(-beta)
    return (*_interpolated(to_student), *_interpolated(loss), log_beta, log_rest, log_beta - log_rest)


def jsd_apart(beta: float) -> float:
    """The sum of |s - t|, of 2 at most, from which on a JSD is a fifth of H(beta) or more, by Pinsker's inequality.

    H(beta) = -beta log(beta) - (1 - beta) log(1 - beta) is the JSD of sides that share nothing. Closed forms take numbers from
    each other that add up to it, or to five times the loss at most: what they round to is some 1e-7 of that.
    """
    rest = 1 - beta
    most = -beta * math.log(beta) - rest * math.log1p(-beta)
    return math.sqrt(most / (5 * beta * rest / 2))  # a JSD is beta (1 - beta) / 2 times its square, or more


def _interpolated(function: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> list[float]:
    fitted = Chebyshev.interpolate(function, TERMS - 1, domain=[-RADIUS, RADIUS])
    return [float(c) for c in fitted.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef]
