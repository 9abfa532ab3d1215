"""``teachers:`` in a config, and several teachers handed to ``distill``: trained or read each, one in the manifest."""

from __future__ import annotations

import json

import pytest
import torch
import toys

import stillhouse
from stillhouse.api import Batch, LossTerm, Method, hookimpl
from stillhouse.config import read
from stillhouse.errors import CheckpointError, ConfigError

SMALL = [
    "task={name: digits, labelled: 60, unlabelled: 0, validation: 40}",
    "teachers={big: {name: mlp, hidden: 12, train: {steps: 5}}, old: {name: mlp, hidden: 8, train: {steps: 4}}}",
    "student={name: mlp, hidden: 4}",
    "device=cpu",
    "steps=6",
]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "mine.yaml"
    path.write_text("task: digits\nmethod: kd\nout: run\n")
    return path


def test_each_is_trained_once_and_the_manifest_tells_of_all(cli, config):
    said = cli("run", config, *SMALL)
    assert said.code == 0, said.err
    manifest = json.loads((config.parent / "run" / "manifest.json").read_text())
    told = manifest["teacher"]
    assert told["found"] == "2 teachers"
    assert {name: own["found"] for name, own in told["each"].items()} == {"big": "trained", "old": "trained"}
    assert told["validation"]["accuracy"] == max(
        own["validation"]["accuracy"] for own in told["each"].values()
    )
    assert manifest["stages"][0]["teacher"] == ["big", "old"]
    again = cli("run", config, *SMALL, "--overwrite")
    assert again.code == 0, again.err
    told = json.loads((config.parent / "run" / "manifest.json").read_text())["teacher"]
    assert {own["found"] for own in told["each"].values()} == {"kept"}
    assert cli("verify", "run").code == 0


def test_a_run_with_another_of_them_is_another_run(cli, config):
    assert cli("run", config, *SMALL).code == 0
    said = cli("run", config, *SMALL, "teachers.old.train.steps=3")
    assert said.code == 2
    assert "teachers.old.train.steps" in said.err


def test_a_killed_run_goes_on(cli, config):
    assert cli("run", config, *SMALL, "checkpoint_every=2").code == 0
    whole = (config.parent / "run" / "student.safetensors").read_bytes()
    for name in ("student.safetensors", "summary.json"):
        (config.parent / "run" / name).unlink()
    assert cli("run", config, *SMALL, "checkpoint_every=2", "--resume").code == 0
    assert (config.parent / "run" / "student.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("teacher=mlp", r"expected either 'teacher' \(one\) or 'teachers' \(several by name\), got both"),
        ("teachers={student: mlp, b: mlp}", r"teachers: got the name 'student'; expected letters"),
        ("teachers={'a.b': mlp}", r"teachers: got the name 'a\.b'; expected letters"),
        ("soft_labels=kept", r"expected either 'soft_labels', which are one teacher's, or 'teachers'"),
        ("teachers.big.hiden=3", r"teachers\.big\.hiden"),
        ("teachers.big.train.stepz=3", r"teachers\.big\.train\.stepz: unknown.*steps"),
    ],
)
def test_what_does_not_go_together_is_refused(config, change, says):
    from stillhouse.runs.resolve import resolve

    with pytest.raises(ConfigError, match=says):
        resolve(read(str(config), [*SMALL, change]))


def test_one_that_diverges_is_told_by_its_place_in_the_config(cli, config):
    said = cli("run", config, *SMALL, "teachers.old.train={steps: 4, optimizer: {name: Adadelta, lr: 1e30}}")
    assert said.code == 2
    assert "teachers.old mlp: after 4 updates" in said.err
    assert "lower teachers.old.train.optimizer.lr" in said.err
    assert not (config.parent / "run").exists()


def test_labels_are_made_of_one_teacher(cli, config):
    said = cli("label", config, *SMALL, "--out", "kept")
    assert said.code == 2
    assert "teachers: got 2; expected one teacher" in said.err


class Looks(Method):
    """Remembers what the teacher's outputs were."""

    api_version = 1
    requires = frozenset({"logits"})

    @hookimpl
    def loss_terms(self, student_out, targets, batch: Batch, info):
        self.seen = batch.inputs, targets.dense
        return {"own": LossTerm(student_out.logits.square().mean() * info.share)}


def test_handed_over_they_answer_as_their_mean():
    x, y = toys.rows(16)
    teachers, looks = {"a": toys.net(8, seed=1), "b": toys.net(12, seed=2)}, Looks()
    stillhouse.distill(toys.net(), teachers, {"train": (x, y)}, method=looks, steps=2, batch_size=16)
    inputs, given = looks.seen
    expected = torch.stack([model(inputs).log_softmax(-1) for model in teachers.values()]).mean(0)
    torch.testing.assert_close(given, expected)


def test_handed_over_another_one_is_another_run(tmp_path):
    def make(seed: int, **given: object) -> None:
        teachers = {"a": toys.net(8, seed=1), "b": toys.net(12, seed=seed)}
        stillhouse.distill(
            toys.net(),
            teachers,
            {"train": toys.rows(16)},
            method="kd",
            steps=2,
            batch_size=16,
            dir=tmp_path / "r",
            **given,
        )

    make(2)
    make(2)
    with pytest.raises(CheckpointError, match=r"holds a run with another teacher"):
        make(3)
