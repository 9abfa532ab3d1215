"""What is shipped: the wheel runs without the checkout, the source distribution holds everything."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
tomllib = pytest.importorskip("tomllib", reason="Python 3.11")


def built(folder: Path, kind: str) -> Path:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", folder, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built(tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel; torch and the rest are read from this one, the editable install is not."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()
    )  # fmt: skip
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    # A line of a .pth file is a folder that is looked into last; .pth files in there (the editable one) are not read.
    # Metadata of the editable install in it would be found twice: entries are compared by what they say.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    script = "import sys; from stillhouse.cli.main import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [python, "-c", script, *words], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def declared() -> dict[str, dict[str, str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]


def test_the_wheel_is_what_is_imported(installed, tmp_path):
    script = "import stillhouse, stillhouse_sld, sys; print(stillhouse.__file__, stillhouse_sld.__file__, sys.path)"
    done = subprocess.run([installed, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(ROOT / "engine") not in done.stdout
    assert str(ROOT / "plugins") not in done.stdout
    assert str(installed.parents[1]) in done.stdout.split()[0]


def test_lists_every_plugin(installed, tmp_path):
    done = run(installed, "plugins", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for group in declared().values():
        for name, value in group.items():
            assert any(line.split()[1:2] == [name] and value in line for line in done.stdout.splitlines()), (
                name
            )


def test_runs_the_main_job(installed, tmp_path):
    (tmp_path / "mine.yaml").write_text("task: digits\nmethod: sld\n")
    small = ["steps=20", "teacher={name: mlp, hidden: 16, train: {steps: 10}}", "threads=1"]
    done = run(installed, "run", "mine.yaml", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mine-seed0" / "student.safetensors").is_file()
    assert run(installed, "config", "list", cwd=tmp_path).stdout.count("mnist1d-") >= 3, "configs are shipped"


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        tops = {name.split("/")[0] for name in names}
        metadata = file.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    packages = {
        path.name
        for root in ("engine", "plugins")
        for path in (ROOT / root).iterdir()
        if (path / "__init__.py").is_file()
    }
    assert {top for top in tops if not top.endswith(".dist-info")} == packages
    assert "stillhouse/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
    assert "License-Expression: Apache-2.0" in metadata


def test_the_source_distribution_holds_sources_and_tests(tmp_path):
    with tarfile.open(built(tmp_path, "sdist")) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for name in (
        "pyproject.toml", "README.md", "LICENSE", "engine/stillhouse/training/loop.py", "plugins/stillhouse_sld/method.py",
        "tests/conftest.py", "tests/engine/training/test_loop.py",
    ):  # fmt: skip
        assert name in names, name
    assert not [name for name in names if name.startswith((".venv", "runs")) or "__pycache__" in name]
