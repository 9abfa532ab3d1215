"""Prints every figure that the tests of the compiled kernels measured, at the end of the session."""

from __future__ import annotations

from pathlib import Path

import pytest

FIGURES = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items):
    """Minutes of them, which ``make test`` leaves to ``make test-kernels``."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.machine_code)


@pytest.fixture
def figure(request):
    """Call it with a line of text: it is printed now (-s) and in the session's summary."""
    lines = request.config.stash.setdefault(FIGURES, [])

    def note(text: str) -> None:
        print(text)
        lines.append(text)

    return note


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash.get(FIGURES, [])
    if lines:
        terminalreporter.section("compiled CUDA kernels: measured figures")
        for line in lines:
            terminalreporter.write_line(line)
