"""Each tracker with the real package: what a run writes is read back, and a resume goes on with it."""

from __future__ import annotations

import json
import os
import time

import pytest

from stillhouse.api import RunRecord
from stillhouse.errors import MissingExtra
from stillhouse.plugin.catalog import find
from stillhouse.plugin.load import loaded

ROWS = [
    {"step": 10, "stage": "train", "loss": 0.75, "lr": 0.01},
    {"step": 20, "stage": "train", "loss": 0.5, "lr": 0.005},
    {"step": 20, "stage": "train", "validation.accuracy": 0.625},
]
SUMMARY = {"scores": {"validation": {"accuracy": 0.625}, "test": {"accuracy": 0.5}}, "steps": 20}
CONFIG = {"name": "mine", "steps": 20, "method": {"name": "kd", "temperature": 4.0}}


def watched(name, folder, **settings):
    """Two starts in one directory, as after a resume: a row in the first, the others in the second."""
    kind = loaded(find("observer", name))
    record = RunRecord("mine", folder, CONFIG, {})
    for rows, ends in ((ROWS[:1], False), (ROWS[1:], True)):
        observer = kind(kind.Config(**settings))
        observer.on_run_start(record)
        for row in rows:
            observer.on_metrics(row)
        if ends:
            observer.on_run_end(SUMMARY)
        elif name == "wandb":
            observer._run.finish()  # as at the end of a process: one has a run's id at a time
            time.sleep(1.1)  # its folder is named by the second: two starts in one would share it


def test_mlflow_has_the_settings_the_curve_and_the_scores(tmp_path):
    tracking = pytest.importorskip("mlflow.tracking", reason="MLflow is not installed (extra mlflow)")
    watched("mlflow", tmp_path)
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stillhouse")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["method.temperature"] == "4.0"
    losses = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "loss")]
    assert losses == [(10, 0.75), (20, 0.5)]
    assert run.data.metrics["final.test.accuracy"] == 0.5


def log_records(content):
    """The records of a LevelDB log behind a header of 7 bytes: blocks of 32 KiB, each part with 7 bytes before it."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield whole
            whole = b""


def test_wandb_keeps_the_run_offline_beside_it(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is not installed (extra wandb)")
    from wandb.proto import wandb_internal_pb2

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    watched("wandb", tmp_path)
    history, ids = [], set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for content in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                history.append(row)
    assert len(ids) == 1
    assert [row["loss"] for row in history if "loss" in row] == ["0.75", "0.5"]
    assert [row["validation.accuracy"] for row in history if "validation.accuracy" in row] == ["0.625"]


def test_trackio_has_the_curve_and_the_scores_in_its_database(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="Trackio is not installed (extra trackio)")
    import sqlite3

    watched("trackio", tmp_path)
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
    found = [(step, json.loads(metrics)) for step, metrics in rows]
    assert [(step, row["loss"]) for step, row in found if "loss" in row] == [(10, 0.75), (20, 0.5)]
    assert [row["final.test.accuracy"] for _, row in found if "final.test.accuracy" in row] == [0.5]


@pytest.mark.parametrize(
    ("name", "module"), [("mlflow", "mlflow.tracking"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_package_is_named_with_its_extra(name, module, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    kind = loaded(find("observer", name))
    with pytest.raises(MissingExtra, match=rf"pip install 'stillhouse\[{name}\]'"):
        kind(kind.Config()).on_run_start(RunRecord("mine", tmp_path))
