"""Power series of the Jensen-Shannon term about equal distributions, where the closed form cancels."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=64)
def jsd_series(beta: float) -> tuple[float, ...]:
    """Coefficients in x = log(s / t), |x| < 2/5, of log(m / s) from x to x^8 and of the loss / t from x^2 to x^9.

    With A(x) = log(m / t) = log(beta + (1 - beta) e^x) the loss of an entry is
    t [-beta A(x) - (1 - beta) e^x (A(x) - x)], and log(m / s) = A(x) - x. After the sixteen coefficients come
    log(beta), log(1 - beta), beta / (1 - beta) and its inverse.
    """
    order = 10
    exponential = [1 / math.factorial(n) for n in range(order)]
    inner = [beta + (1 - beta)] + [(1 - beta) * c for c in exponential[1:]]
    to_t = _log_series(inner)
    to_s = list(to_t)
    to_s[1] -= 1
    product = [sum(exponential[i] * to_s[n - i] for i in range(n + 1)) for n in range(order)]
    loss = [-beta * to_t[n] - (1 - beta) * product[n] for n in range(order)]
    odds = beta / (1 - beta)
    return (*to_s[1:9], *loss[2:10], math.log(beta), math.log1p(-beta), odds, 1 / odds)


def _log_series(a: list[float]) -> list[float]:
    """Coefficients of log of a series whose constant is 1."""
    out = [0.0] * len(a)
    for n in range(1, len(a)):
        out[n] = a[n] - sum(k * out[k] * a[n - k] for k in range(1, n)) / n
    return out
