"""One run and its directory, which explains itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stillhouse.config import validate
from stillhouse.runs import train as runs
from stillhouse.runs.display import Display
from stillhouse.runs.evaluate import Sealed
from stillhouse_tasks.digits import small_mlp

CONFIG = {
    "name": "mine",
    "task": {"name": "digits", "labelled": 80, "unlabelled": 120, "validation": 50},
    "teacher": {"name": "mlp", "hidden": 16, "train": {"steps": 20}},
    "student": {"name": "mlp", "hidden": 8},
    "method": {"name": "sld", "shares": [1, 1, 1]},
    "steps": 12,
    "batch_size": 16,
    "log_every": 2,
    "validate_every": 4,
    "checkpoint_every": 5,
    "threads": 1,
}


class Said(Display):
    def __init__(self):
        self.lines: list[str] = []

    def say(self, message):
        self.lines.append(message)


def made(folder: Path, **more):
    said = Said()
    return runs.run(validate({**CONFIG, "out": str(folder), **more}), display=said), said.lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    summary, said = made(folder, observers=["tensorboard"])
    return folder, summary, said


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def test_holds_all_that_it_should(finished):
    folder, _, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "README.md", "checkpoints", "config.yaml", "curve.png", "manifest.json", "metrics.jsonl", "student.safetensors",
        "summary.json", "tensorboard",
    }  # fmt: skip
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_manifest_says_what_made_it(finished):
    manifest = read(finished[0], "manifest.json")
    assert manifest["seed"] == 0
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert manifest["plugins"]["sld"].startswith("stillhouse ")
    assert set(manifest["data"]) == {"train", "validation", "unlabelled"}, (
        "the test split is not looked at yet"
    )
    assert manifest["teacher"]["found"] in ("trained", "kept")
    assert manifest["teacher"]["digest"]
    assert manifest["kernel"]["why"]
    assert manifest["chosen"]["sld.temperature"] == {"value": 4.0, "why": "default"}
    assert [stage["steps"] for stage in manifest["stages"]] == [4, 4, 4]
    assert manifest["parameters"]["student"] == sum(p.numel() for p in small_mlp(hidden=8).parameters())
    assert manifest["machine"]["threads"] == 1


def test_what_was_chosen_by_default_is_printed(finished):
    assert "sld.temperature = 4.0 (default)" in finished[2]


def test_the_summary_and_the_page_hold_the_figures(finished):
    folder, summary, _ = finished
    kept = read(folder, "summary.json")
    assert kept.pop("seal").startswith("stillhouse-sha256:")
    assert kept == summary
    assert summary["steps"] == 12
    assert summary["test_opened"] == 1
    page = (folder / "README.md").read_text()
    assert f"{summary['scores']['test']['accuracy']:.4f}" in page
    for word in ("mine, seed 0", "| distil |", "sld.temperature = 4.0", "![learning curve](curve.png)"):
        assert word in page


def test_the_student_file_is_the_model_that_was_scored(finished):
    folder, summary, _ = finished
    student = small_mlp(hidden=8)
    student.load_state_dict(load_file(folder / "student.safetensors"))
    parts = runs.resolve(validate(CONFIG))
    scores = runs.score(parts.task, student, parts.task.splits().test, torch.device("cpu"))
    assert scores == summary["scores"]["test"]


def test_metrics_hold_a_row_for_each_logged_update_and_look_at_validation(finished):
    rows = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == [2, 4, 6, 8, 10, 12]
    assert {row["stage"] for row in losses} == {"distil", "relabel", "target"}
    assert {"sld.kl", "lr", "seconds"} <= set(losses[0])
    assert [row["step"] for row in rows if "validation.accuracy" in row] == [4, 8, 12]


def test_the_resolved_config_makes_the_run_again(finished, tmp_path):
    from stillhouse.config import read as read_config

    again = runs.run(
        read_config(str(finished[0] / "config.yaml"), [f"out={tmp_path / 'again'}", "observers=[]"])
    )
    assert again["scores"] == finished[1]["scores"]
    assert (tmp_path / "again" / "student.safetensors").read_bytes() == (
        finished[0] / "student.safetensors"
    ).read_bytes()


def test_an_observer_sees_every_row(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8, 10, 12]
    assert len(events.Scalars("validation.accuracy")) == 3


def test_no_checkpoint_holds_anything_of_the_teacher(finished):
    folder, _, _ = finished
    for path in (folder / "checkpoints").iterdir():
        content = torch.load(path, weights_only=True)
        assert set(content["models"]) == {"student"}
        assert path.stat().st_size < 60_000


def test_the_second_run_of_a_teacher_does_not_train_it(finished, tmp_path):
    summary, said = made(tmp_path / "other", seed=3)
    assert any("kept from an earlier run" in line for line in said)
    assert summary["teacher_calls"] < 20


def test_methods_that_are_compared_start_from_the_same_weights(tmp_path, monkeypatch):
    from stillhouse.training.loop import Loop

    starts = []

    def stopped(loop, steps=None):
        starts.append({name: tensor.clone() for name, tensor in loop.step.run.student.state_dict().items()})
        raise KeyboardInterrupt

    made(tmp_path / "teacher")  # trained, so that it is there for all
    monkeypatch.setattr(Loop, "run", stopped)
    for method in ("hard_labels", "kd", "sld"):
        with pytest.raises(ValueError, match=r"interrupted"):
            made(tmp_path / method, method=method)
    for other in starts[1:]:
        for name, tensor in starts[0].items():
            assert torch.equal(tensor, other[name])


def test_the_test_split_is_opened_after_the_last_update(tmp_path, monkeypatch):
    from stillhouse.training.loop import Loop

    events = []
    update, opened = Loop._update, Sealed.open
    monkeypatch.setattr(Loop, "_update", lambda loop: (events.append("update"), update(loop))[1])
    monkeypatch.setattr(Sealed, "open", lambda sealed: (events.append("open"), opened(sealed))[1])
    made(tmp_path / "run")
    assert events.count("open") == 1
    assert events[-1] == "open"


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_term(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)(loss is not finite after update|logits: got NaN)"):
        made(tmp_path / "run", optimizer={"name": "SGD", "lr": 1e30})


def test_every_training_setting_runs_together(tmp_path):
    summary, _ = made(
        tmp_path / "run",
        method=None,
        methods=["kd"],
        precision="bf16",
        micro_batch_size=5,
        clip=1.0,
        scheduler="CosineAnnealingLR",
    )
    assert summary["methods"] == ["kd"]


def test_arguments_without_a_builder_are_the_first_builders():
    given = {**CONFIG, "student": {"hidden": 7}, "teacher": {"train": {"steps": 3}}, "target": {"hidden": 9}}
    made = runs.resolve(validate(given)).config
    assert (made.student.name, made.student.settings["hidden"]) == ("mlp", 7)
    assert (made.target.name, made.target.settings["hidden"]) == ("mlp", 9)
    assert made.teacher.name == "mlp"
    assert made.teacher.train["steps"] == 3


def test_seeds_differ(finished, tmp_path):
    summary, _ = made(tmp_path / "run", seed=1)
    assert summary["scores"]["test"]["nll"] != finished[1]["scores"]["test"]["nll"]
