"""The two checks that run in a process of their own: listing imports nothing, and an import does nothing."""

from __future__ import annotations

import pytest
from breaking import Good, outcome

from stillhouse.api import Method
from stillhouse.plugin import catalog
from stillhouse.plugin.load import loaded

IMPORTS = {
    "print('hello')": "printed 'hello'",
    "import torch; torch.manual_seed(0)": "seeded or drew from torch's",
    "import random; random.random()": "seeded or drew from python's",
    "import numpy; numpy.random.rand()": "seeded or drew from numpy's",
    "import tempfile; tempfile.TemporaryFile('w')": "for writing",
    "import torch; torch.set_default_dtype(torch.float64)": "changed torch's default type",
    "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()": "started a thread",
    "import subprocess; subprocess.run(['true'])": "called subprocess.Popen",
}


@pytest.mark.slow
@pytest.mark.parametrize("work", IMPORTS)
def test_an_import_that_works_is_caught(install, work):
    _import_is_caught(install, work)


def test_an_import_that_prints_is_caught(install):
    _import_is_caught(install, "print('hello')")


def _import_is_caught(install, work: str) -> None:
    install(
        "acme",
        "[stillhouse.methods]\nmine = busy_mine:Mine\n",
        busy_mine=f"""
        {work}
        from stillhouse.api import Method
        class Mine(Method):
            api_version = 1
        """,
    )
    entry = catalog.find("method", "mine")
    kind = type("Mine", (Method,), {"api_version": 1, "__module__": "busy_mine"})
    found = outcome(kind, "import_does_no_work", entry)
    assert found.status == "failed"
    assert found.message.startswith("plugin 'broken' (acme 1.2): importing 'busy_mine' ")
    assert IMPORTS[work] in found.message


def test_a_distribution_that_imports_at_listing_is_caught(install, monkeypatch):
    site = install(
        "acme",
        "[stillhouse.methods]\nmine = eager_mine:Mine\n",
        eager_mine="""
        class Mine: ...
        """,
    )
    (site / "sitecustomize.py").write_text("import eager_mine\n")
    found = outcome(Good, "listing_imports_nothing", catalog.find("method", "mine"))
    assert (found.status, "listing imports 'eager_mine'" in found.message) == ("failed", True)


def test_an_installed_plugin_lists_and_imports_quietly():
    entry = catalog.find("method", "kd")
    assert outcome(loaded(entry), "listing_imports_nothing", entry).status == "passed"
    assert outcome(loaded(entry), "import_does_no_work", entry).status == "passed"
