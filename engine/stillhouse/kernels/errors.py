"""The one form that all refusals of the kernels have."""

from __future__ import annotations

import sys
import warnings


def fail(what: str, got: object, expected: str, fix: str) -> ValueError:
    """A ValueError that says what was got, what was expected, and how to mend it."""
    return ValueError(f"{what}: got {got}; expected {expected}. Fix: {fix}.")


def require(holds: bool, what: str, got: object, expected: str, fix: str) -> None:
    """Raise what :func:`fail` gives where the condition does not hold."""
    if not holds:
        raise fail(what, got, expected, fix)


def warn(what: str) -> None:
    """A RuntimeWarning at the line that called Stillhouse, with whatever of torch's lies between."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("stillhouse.", "torch.")
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(what, RuntimeWarning, stacklevel=level)
