"""What every test starts from: one torch thread, a teacher cache of its own, no plugin allow-list."""

from __future__ import annotations

import os
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from platformdirs import user_cache_dir

# Before torch is imported, and inherited by every child process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
_kernels = Path(user_cache_dir("stillhouse")) / "kernels"  # compiled once, and not in every session
_kernels.mkdir(mode=0o700, parents=True, exist_ok=True)
os.environ["STILLHOUSE_CACHE"] = tempfile.mkdtemp(prefix="stillhouse-test-cache-")
(Path(os.environ["STILLHOUSE_CACHE"]) / "kernels").symlink_to(_kernels)
os.environ.pop("STILLHOUSE_PLUGINS", None)
os.environ["MPLBACKEND"] = "agg"
# Helpers that tests of one folder lend to another's.
sys.path.insert(0, str(Path(__file__).parent / "engine" / "training"))


def pytest_sessionstart(session: pytest.Session) -> None:
    import torch

    torch.set_num_threads(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    import shutil

    shutil.rmtree(os.environ["STILLHOUSE_CACHE"], ignore_errors=True)


@dataclass
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., Said]:
    """Run a command in this process, in an empty folder."""
    from stillhouse.cli.main import main

    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Said:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as leaving:  # argparse
            code = int(leaving.code or 0)
        printed = capsys.readouterr()
        return Said(code, printed.out, printed.err)

    return call


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install a distribution: a dist-info folder with entry points, and a module, in a folder on sys.path."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    made: list[str] = []

    def write(distribution: str, entry_points: str, **modules: str) -> Path:
        info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
        for name, source in modules.items():
            (site / f"{name}.py").write_text(textwrap.dedent(source))
            made.append(name)
        return site

    yield write
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def forks() -> Iterator[object]:
    """Runs of the command line in processes of their own, forked from one that has imported everything."""
    from forkserver import Forks

    server = Forks()
    yield server
    server.close()
