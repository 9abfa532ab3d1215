"""``stillhouse verify`` and ``stillhouse runs``."""

from __future__ import annotations

import json
import shutil

import pytest
from test_directory import CONFIG, made

from stillhouse.errors import Diverged
from stillhouse.files.lock import Lock
from stillhouse.runs import train as runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "runs" / "a"
    made(folder, method="sld")
    return folder


def test_a_whole_run_is_found_whole(finished, cli):
    said = cli("verify", finished)
    assert said.code == 0
    names = (
        "manifest.json",
        "config.yaml",
        "summary.json",
        "student.safetensors",
        "metrics.jsonl",
        "README.md",
        "checkpoints/step-",
        "soft-labels/",
    )
    for name in names:
        assert f"ok       {finished}/{name}" in said.out
    assert "DAMAGED" not in said.out


@pytest.mark.parametrize(
    "name",
    ["student.safetensors", "metrics.jsonl", "checkpoints/step-000000006.pt", "README.md", "summary.json"],
)
def test_a_changed_file_is_named_and_the_exit_status_says_so(finished, cli, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    said = cli("verify", finished, folder)
    assert said.code == 1
    assert f"DAMAGED  {folder}/{name}" in said.out
    rows = json.loads(cli("verify", folder, "--json").out)
    assert rows["damaged"] == 1
    assert [row["name"] for row in rows["runs"][str(folder)] if not row["ok"]] == [name]


def test_what_is_no_run_is_told(cli, tmp_path):
    said = cli("verify", tmp_path)
    assert said.code == 2
    assert "holds no run of stillhouse" in said.err


def test_runs_are_listed_with_their_state(finished, cli, monkeypatch):
    base = finished.parent
    monkeypatch.setattr(runs, "rehearse", lambda *given: None)
    for name in ("damaged", "unfinished", "running"):
        shutil.copytree(finished, base / "deep" / name)
    (base / "deep" / "damaged" / "student.safetensors").unlink()
    for name in ("unfinished", "running"):
        (base / "deep" / name / "summary.json").unlink()
    with pytest.raises(Diverged):
        made(base / "diverged", optimizer={"name": "SGD", "lr": 1e12}, steps=30)
    (base / "no run").mkdir()
    with Lock(base / "deep" / "running"):
        said = cli("runs", base)
        found = {
            run["dir"].removeprefix(f"{base}/"): run for run in json.loads(cli("runs", base, "--json").out)
        }
    assert said.code == 0, said.err
    assert {name: run["state"] for name, run in found.items()} == {
        "a": "finished", "deep/damaged": "damaged", "deep/unfinished": "unfinished", "deep/running": "running", "diverged": "diverged",
    }  # fmt: skip
    assert found["a"]["step"] == found["a"]["steps"] == CONFIG["steps"]
    assert "by process" in found["deep/running"]["detail"]
    assert "student.safetensors can't be read: it is missing" in found["deep/damaged"]["detail"]
    assert "6 of 6" in said.out


def test_a_folder_without_runs_is_said_to_be_one(cli, tmp_path):
    assert "no runs under" in cli("runs", tmp_path).out
    assert cli("runs", tmp_path / "nowhere").code == 2
