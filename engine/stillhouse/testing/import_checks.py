"""Checks that listing imports nothing, and that an import does nothing. Each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from stillhouse.testing.checks import CheckFunction, NotApplicable, expect
from stillhouse.testing.rig import Subject

LISTING = """
import contextlib, io, json, sys
from stillhouse.cli.main import main
with contextlib.redirect_stdout(io.StringIO()) as printed:
    main(["plugins", "--json"])
names = [entry["name"] for entry in json.loads(printed.getvalue())]
print("RESULT" + json.dumps({"modules": sorted(sys.modules), "names": names}))
"""

IMPORT = """
import contextlib, importlib, io, json, random, sys, threading
import numpy, torch, stillhouse.api, stillhouse.kernels
name, found, watching = sys.argv[1], [], True
OUTSIDE = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.fork", "os.posix_spawn"}
def look(event, given):
    if not watching:
        return
    if event == "open" and set(str(given[1] or "")) & set("wax+") and "__pycache__" not in str(given[0]):
        found.append(f"opened {given[0]} for writing")
    elif event in OUTSIDE:
        found.append(f"called {event}")
def state():
    return {
        "seeded or drew from torch's random numbers": torch.get_rng_state().tolist(),
        "seeded or drew from numpy's random numbers": repr(numpy.random.get_state()),
        "seeded or drew from python's random numbers": random.getstate(),
        "changed torch's default type": str(torch.get_default_dtype()),
        "changed torch's number of threads": torch.get_num_threads(),
        "started a thread": threading.active_count(),
    }
before, printed = state(), io.StringIO()
sys.addaudithook(look)
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    importlib.import_module(name)
watching = False
found += [what for what, value in state().items() if value != before[what]]
if printed.getvalue():
    found.append(f"printed {printed.getvalue().strip()[:80]!r}")
print("RESULT" + json.dumps(found))
"""


def listing_imports_nothing(subject: Subject, folder: Path) -> None:
    """``stillhouse plugins`` lists the plugin without importing it, torch or pydantic."""
    if subject.entry is None:
        raise NotApplicable("no installed entry point names it")
    told = json.loads(_python(subject, LISTING))
    expect(subject.entry.name in told["names"], subject, "is not listed by 'stillhouse plugins'")
    for module in (subject.entry.value.partition(":")[0].partition(".")[0], "torch", "pydantic"):
        expect(
            module not in told["modules"],
            subject,
            f"listing imports '{module}'; expected nothing: a .pth file or a site hook of the package may do that",
        )


def import_does_no_work(subject: Subject, folder: Path) -> None:
    """Importing the module prints nothing, opens nothing, draws no random numbers and starts nothing."""
    module = subject.kind.__module__
    if module == "__main__" or importlib.util.find_spec(module) is None:
        raise NotApplicable(f"its module '{module}' can't be imported by name")
    for work in json.loads(_python(subject, IMPORT, module)):
        expect(
            False, subject, f"importing '{module}' {work}; expected definitions only: work belongs in hooks"
        )


def _python(subject: Subject, program: str, *arguments: str) -> str:
    paths = [path for path in sys.path if path]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    told = done.stdout.rpartition("RESULT")[2]
    said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    expect(done.returncode == 0 and bool(told), subject, f"a process that imports it ends with {said}")
    return told


CHECKS: tuple[CheckFunction, ...] = (listing_imports_nothing, import_does_no_work)
