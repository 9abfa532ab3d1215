"""The one form that all refusals of the kernels have."""

from __future__ import annotations


def fail(what: str, got: object, expected: str, fix: str) -> ValueError:
    """A ValueError that says what was got, what was expected, and how to mend it."""
    return ValueError(f"{what}: got {got}; expected {expected}. Fix: {fix}.")
