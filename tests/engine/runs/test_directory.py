"""Whose a directory is: nothing is removed that Stillhouse did not write, and nothing is taken that was changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from stillhouse.config import validate
from stillhouse.contract.observers import Observer
from stillhouse.errors import CheckpointError, Diverged, PluginError
from stillhouse.files import write_json
from stillhouse.runs import contents, directory
from stillhouse.runs import train as runs
from stillhouse.runs.display import Display

CONFIG = {
    "name": "mine",
    "task": {"name": "digits", "labelled": 40, "unlabelled": 40, "validation": 30},
    "teacher": {"name": "mlp", "hidden": 8, "train": {"steps": 4}},
    "student": {"name": "mlp", "hidden": 4},
    "method": "kd",
    "steps": 6,
    "batch_size": 8,
    "log_every": 1,
    "validate_every": 3,
    "checkpoint_every": 2,
    "threads": 1,
}


class Said(Display):
    def __init__(self):
        self.lines: list[str] = []

    def say(self, message):
        self.lines.append(message)


def made(folder: Path, *, resume=False, overwrite=False, **more):
    said = Said()
    config = validate({**CONFIG, "out": str(folder), **more})
    return runs.run(config, resume=resume, overwrite=overwrite, display=said), said.lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("directory") / "run"
    made(folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestOverwrite:
    @pytest.mark.parametrize(
        "name", ["notes.txt", "checkpoints/best.pt", "soft-labels/mine.csv", "data/x.bin", "tasks.json"]
    )
    def test_is_refused_where_something_else_lies(self, folder, name):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
        before = tree(folder)
        with pytest.raises(
            CheckpointError, match=r"did not write .*and nothing there was removed; move that elsewhere"
        ):
            made(folder, overwrite=True)
        assert tree(folder) == before

    def test_leaves_what_is_hidden_where_it_is(self, folder):
        (folder / ".git").mkdir()
        (folder / ".git" / "HEAD").write_text("ref: x\n")
        made(folder, overwrite=True, steps=4)
        assert (folder / ".git" / "HEAD").read_text() == "ref: x\n"

    def test_is_refused_for_a_page_that_was_written_into(self, folder):
        page = folder / "README.md"
        page.write_text(page.read_text() + "\nMy thoughts.\n")
        with pytest.raises(CheckpointError, match=r"README\.md was changed since the run wrote it"):
            made(folder, overwrite=True)
        page.write_text("Mine alone.\n")
        with pytest.raises(CheckpointError, match=r"did not write \(README\.md\)"):
            made(folder, overwrite=True)

    def test_never_follows_a_link(self, folder, tmp_path):
        elsewhere = tmp_path / "elsewhere"
        shutil.move(folder / "checkpoints", elsewhere)
        (folder / "checkpoints").symlink_to(elsewhere)
        before = tree(elsewhere)
        with pytest.raises(CheckpointError, match=r"did not write .checkpoints"):
            made(folder, overwrite=True)
        assert tree(elsewhere) == before

    def test_removes_what_plugins_said_that_they_write(self, tmp_path):
        made(tmp_path / "run", observers=["tensorboard"])
        assert list((tmp_path / "run" / "tensorboard").iterdir())
        made(tmp_path / "run", overwrite=True)
        assert not (tmp_path / "run" / "tensorboard").exists()

    def test_cut_short_is_done_by_the_next_run_whatever_its_flags(self, folder):
        kept = directory.read_manifest(folder)
        kept["stillhouse"]["clearing"] = True
        write_json(folder / "manifest.json", kept, sealed=True)
        (folder / "config.yaml").unlink()
        summary, said = made(folder, steps=5)
        assert summary["steps"] == 5
        assert any("starting over was cut short" in line for line in said)


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize(
    "manifest", [None, '{"name": "an extension"}', '{"stillhouse": {"kind": "run"}}', "[]"]
)
def test_a_folder_of_somebodys_is_left_as_it_is(tmp_path, flags, manifest):
    (tmp_path / "config.yaml").write_text("task: digits\nmethod: kd\n")
    (tmp_path / "thesis.txt").write_text("three years")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        made(tmp_path, **flags)
    assert "out=DIR" in str(caught.value)
    assert "--overwrite" not in str(caught.value), "it is not recommended where it may not be"
    assert tree(tmp_path) == before


class TestDamage:
    @pytest.mark.parametrize("name", ["student.safetensors", "summary.json", "metrics.jsonl"])
    def test_of_a_finished_run_is_told_with_the_way_on(self, folder, name):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(
            CheckpointError, match=rf"(?s){name}.*--resume makes it again from the last checkpoint"
        ):
            made(folder)

    def test_of_the_student_is_mended_by_resume(self, folder):
        before = (folder / "student.safetensors").read_bytes()
        (folder / "student.safetensors").unlink()
        _, said = made(folder, resume=True)
        assert (folder / "student.safetensors").read_bytes() == before
        assert any("made again from the last checkpoint" in line for line in said)

    def test_of_the_manifest_costs_nothing_where_there_is_a_checkpoint(self, folder):
        (folder / "summary.json").unlink()
        path = folder / "manifest.json"
        path.write_bytes(path.read_bytes().replace(b'"seed": 0', b'"seed": 1'))
        with pytest.raises(CheckpointError, match=r"manifest.*was changed or damaged.*--resume goes on"):
            made(folder)
        made(folder, resume=True)
        assert directory.read_manifest(folder)["seed"] == 0

    def test_of_rows_before_the_checkpoint_is_told_on_a_resume(self, folder):
        (folder / "summary.json").unlink()
        path = folder / "metrics.jsonl"
        rows = path.read_text().splitlines()
        path.write_text("\n".join([rows[0].replace('"step": 1', '"step": 3'), *rows[1:]]) + "\n")
        with pytest.raises(
            CheckpointError, match=r"its first .* bytes are not those that the checkpoint knows of; put them"
        ):
            made(folder, resume=True)
        path.unlink()
        _, said = made(folder, resume=True)
        assert any("is gone: its rows begin here" in line for line in said)


def test_a_run_that_was_moved_is_where_it_is(folder, cli):
    (folder / "summary.json").unlink()
    said = cli("run", folder / "config.yaml", "--resume")
    assert said.code == 0, said.err
    assert json.loads((folder / "summary.json").read_text())["dir"] == str(folder)


def test_other_versions_are_told_and_written_down(folder, monkeypatch):
    (folder / "summary.json").unlink()
    monkeypatch.setattr(directory, "versions", lambda: {**before, "torch": "9.9"})
    before = directory.read_manifest(folder)["versions"]
    _, said = made(folder, resume=True)
    assert any(f"torch was {before['torch']}, is 9.9 (the last bits may differ)" in line for line in said)
    assert directory.read_manifest(folder)["history"][-1]["versions"] == {"torch": [before["torch"], "9.9"]}


class TestDivergence:
    HOT = {"name": "SGD", "lr": 1e12, "weight_decay": 0.0}

    @pytest.fixture
    def diverged(self, tmp_path, monkeypatch):
        monkeypatch.setattr(runs, "rehearse", lambda *given: None)
        with pytest.raises(Diverged, match=r"--resume then starts over.*Lower optimizer\.lr"):
            made(tmp_path / "hot", optimizer=self.HOT, steps=30)
        return tmp_path / "hot"

    def test_is_gone_on_from_with_a_lower_rate(self, diverged):
        made(diverged, resume=True, optimizer={**self.HOT, "lr": 0.01}, steps=30)
        history = directory.read_manifest(diverged)["history"]
        assert [event["event"] for event in history] == ["diverged", "resumed"]
        assert history[-1]["changed"] == {"optimizer.lr": [1e12, 0.01]}

    def test_nothing_else_may_change_and_the_rate_only_then(self, diverged, folder):
        with pytest.raises(CheckpointError, match="batch_size: 8 there, 4 here"):
            made(diverged, resume=True, optimizer={**self.HOT, "lr": 0.01}, steps=30, batch_size=4)
        (folder / "summary.json").unlink()
        with pytest.raises(CheckpointError, match=r"optimizer\.lr: 0\.001 there, 0\.5 here"):
            made(folder, resume=True, optimizer={"lr": 0.5})

    def test_goes_on_from_the_last_checkpoint_that_a_sane_loss_came_after(self, tmp_path, monkeypatch):
        from stillhouse.training.loop import Loop

        monkeypatch.setattr(runs, "rehearse", lambda *given: None)
        update = Loop._update

        def breaks(loop):
            if loop.at.step == 5 and not broken:
                broken.append(loop)
                next(iter(loop.step.run.student.parameters())).data.fill_(1e30)
            update(loop)

        broken: list = []
        monkeypatch.setattr(Loop, "_update", breaks)
        with pytest.raises(Diverged, match="the checkpoint of update 4 is kept"):
            made(tmp_path / "run", optimizer={"name": "SGD", "lr": 0.1}, steps=30, checkpoint_every=1)
        _, said = made(
            tmp_path / "run", resume=True, optimizer={"name": "SGD", "lr": 0.05}, steps=30, checkpoint_every=1
        )
        assert "resumed after update 4" in said


def test_observers_are_told_of_a_run_that_fails(tmp_path, monkeypatch):
    told = []

    class Watches(Observer):
        api_version = 1

        def on_run_failed(self, error):
            told.append(type(error).__name__)
            raise ZeroDivisionError("and fails itself")

    parts = runs.resolve(validate({**CONFIG, "out": str(tmp_path / "run")}))
    parts.observers.append(Watches())
    monkeypatch.setattr(runs.Loop, "run", lambda loop: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        runs.train(parts, parts.task.splits(), runs.pick_device("cpu"), Said())
    assert told == ["ZeroDivisionError"]


@pytest.mark.parametrize("pattern", ["../x", "/etc/passwd", "*", "*/x", "a/b/c", ".git/HEAD", "", 3, "a/*/*"])
def test_a_plugin_may_write_inside_of_the_run_directory_alone(pattern):
    class Plugin:
        writes = (pattern,)

    with pytest.raises(PluginError, match=r"Plugin\.writes holds"):
        contents.declared([Plugin()])
