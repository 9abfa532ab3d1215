"""One small study, run once for all tests that look at what it left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The small study's directory, its analysis, and what was said while it ran."""
    from small_study import SMALL, make

    folder = tmp_path_factory.mktemp("study") / "small"
    return folder, *make(SMALL, folder)


@pytest.fixture(autouse=True)
def _prepared_here(monkeypatch):
    """Preparation in this process, which has imported everything; the fixture ``finished`` has it in one of its own."""

    from stillhouse.study import processes

    def prepared(pairs, workers):
        return [processes.prepare_pair(pair)[0] for pair in pairs], []

    monkeypatch.setattr("stillhouse.study.run.prepared", prepared)
