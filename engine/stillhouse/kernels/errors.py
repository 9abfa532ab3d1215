"""The one form that all refusals of the kernels have."""

from __future__ import annotations


def fail(what: str, got: object, expected: str, fix: str) -> ValueError:
    """A ValueError that says what was got, what was expected, and how to mend it."""
    return ValueError(f"{what}: got {got}; expected {expected}. Fix: {fix}.")


def require(holds: bool, what: str, got: object, expected: str, fix: str) -> None:
    """Raise what :func:`fail` gives where the condition does not hold."""
    if not holds:
        raise fail(what, got, expected, fix)
