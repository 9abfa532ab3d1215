"""A clean virtual environment with the wheel of Stillhouse in it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build(source: Path, out: Path) -> Path:
    """The wheel of a source tree."""
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(out), str(source)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


class CleanEnv:
    """An environment that has what Stillhouse depends on, and of Stillhouse nothing but the wheel.

    The dependencies are links into the environment of the tests: torch need not be copied, and no editable
    install comes along.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.folder, self.work = folder / "env", folder / "work"
        self.work.mkdir(parents=True)
        self.cache = folder / "cache"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.folder)], check=True)
        self.python = self.folder / "bin" / "python"
        self.pip("install", "--no-deps", "--no-index", str(wheel))
        dependencies = folder / "dependencies"
        dependencies.mkdir()
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if "stillhouse" not in path.name and path.suffix != ".pth":
                (dependencies / path.name).symlink_to(path)
        site = next(self.folder.glob("lib/python*/site-packages"))
        (site / "dependencies.pth").write_text(f"{dependencies}\n")

    def pip(self, *words: str) -> str:
        return self._run([sys.executable, "-m", "pip", "--python", str(self.python), *words])

    def install(self, source: Path, out: Path) -> None:
        """Build a plugin's wheel and install it."""
        self.pip("install", "--no-deps", "--no-index", str(build(source, out)))

    def __call__(self, *words: object, code: int = 0, cwd: Path | None = None) -> str:
        """Run a program of the environment; what it printed, after checking its exit code."""
        program = self.folder / "bin" / str(words[0])
        return self._run([str(program), *map(str, words[1:])], code, cwd)

    def sh(self, line: str, cwd: Path) -> str:
        """Run a line of shell with the environment in front."""
        return self._run(["bash", "-euc", line], cwd=cwd)

    def _run(self, words: list[str], code: int = 0, cwd: Path | None = None) -> str:
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            cwd=cwd or self.work,
            timeout=600,
            env={
                **kept,
                "PATH": path,
                "STILLHOUSE_CACHE": str(self.cache),
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            },
        )
        assert done.returncode == code, (
            f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout
