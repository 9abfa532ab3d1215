"""Clean environments for tests of what a plugin author does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from clean_env import ROOT, CleanEnv, build


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CleanEnv]:
    """Makes clean environments; the trained teacher is kept from one to the next."""
    made: list[CleanEnv] = []

    def make(name: str) -> CleanEnv:
        env = CleanEnv(tmp_path_factory.mktemp(name), wheel)
        if made:
            env.cache = made[0].cache
        made.append(env)
        return env

    yield make
    for env in made:
        shutil.rmtree(env.folder.parent, ignore_errors=True)
