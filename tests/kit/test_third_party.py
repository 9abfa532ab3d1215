"""``examples/third_party_plugin``: a stranger's package next to the wheel, from installing to uninstalling."""

from __future__ import annotations

import json

import pytest
from clean_env import ROOT

SOURCE = ROOT / "examples" / "third_party_plugin"


def test_it_knows_nothing_of_stillhouse_but_its_two_public_modules():
    lines = (SOURCE / "stillhouse_wttm.py").read_text().splitlines()
    found = {line.split()[1] for line in lines if line.startswith(("from stillhouse", "import stillhouse"))}
    assert found == {"stillhouse.api", "stillhouse.kernels"}


@pytest.mark.slow
def test_installed_listed_run_checked_uninstalled_and_gone(clean, tmp_path):
    env = clean("third-party")
    assert str(env.folder) in env("python", "-c", "import stillhouse; print(stillhouse.__file__)")
    assert "wttm" not in env("stillhouse", "plugins")
    env.install(SOURCE, tmp_path / "dist")
    listed = json.loads(env("stillhouse", "plugins", "--json"))
    (entry,) = [entry for entry in listed if entry["name"] == "wttm"]
    assert (entry["distribution"], entry["version"]) == ("stillhouse-wttm", "0.1.0")
    env(
        "stillhouse",
        "run",
        "mnist1d-kd",
        "name=wttm",
        "method=wttm",
        "steps=30",
        "validate_every=30",
        "log_every=10",
        "teacher={name: cnn, train: {steps: 50}}",
    )
    summary = json.loads((env.work / "runs" / "wttm-seed0" / "summary.json").read_text())
    assert summary["methods"] == ["wttm"]
    manifest = json.loads((env.work / "runs" / "wttm-seed0" / "manifest.json").read_text())
    assert manifest["plugins"] == {"wttm": "stillhouse-wttm 0.1.0"}
    checked = json.loads(env("stillhouse", "plugins", "check", "wttm", "--json"))
    assert checked["passed"]
    assert {row["status"] for row in checked["checks"]} == {"passed", "skipped"}
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_it.py").write_text((SOURCE / "test_stillhouse_wttm.py").read_text())
    assert " passed" in env("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tests)
    env.pip("uninstall", "-y", "stillhouse-wttm")
    assert "wttm" not in env("stillhouse", "plugins")
    refused = env.sh("stillhouse plugins show wttm 2>&1 || true", cwd=env.work)
    assert "no plugin is called 'wttm'" in refused
