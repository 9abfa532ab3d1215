"""Regression, and labels that are few or wrong."""

from __future__ import annotations

import json

import pytest
import torch
import toys

from stillhouse.errors import ConfigError
from stillhouse_tasks.diabetes import Diabetes, DiabetesConfig
from stillhouse_tasks.mnist1d import Mnist1d, Mnist1dConfig, with_noise


def test_diabetes_divides_every_patient_once_and_standardises_by_the_training_ones():
    splits = Diabetes(DiabetesConfig(labelled=200, unlabelled=60, validation=80)).splits()
    assert [len(split) for _, split in splits.items()] == [200, 80, 102, 60]
    for values in (splits.train.inputs, splits.train.labels):
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(values.std(0), torch.ones(values.shape[1]))
    assert splits.test.labels.mean().abs() > 1e-3, "the others are scaled by the training patients' figures"
    assert splits.train.labels.shape == (200, 1)
    assert splits.unlabelled.labels is None


def test_diabetes_leaves_some_to_test_on():
    with pytest.raises(ConfigError, match="labelled \\+ unlabelled \\+ validation = 442 of 442"):
        Diabetes(DiabetesConfig(labelled=342, validation=100)).splits()


def test_diabetes_scores_the_share_of_variance():
    labels = torch.tensor([0.0, 1.0, 2.0])
    assert toys.scores(Diabetes(), labels, labels) == {"r2": 1.0, "mse": 0.0}
    assert toys.scores(Diabetes(), torch.ones(3), labels)["r2"] == pytest.approx(0.0)


@pytest.mark.parametrize("part", [0.0, 0.25, 1.0])
def test_label_noise_moves_as_many_labels_as_it_says_and_each_to_a_wrong_class(part):
    labels = torch.arange(1000) % 10
    noisy = with_noise(labels, part, seed=0)
    assert int((noisy != labels).sum()) == round(1000 * part)
    assert noisy.min() >= 0
    assert noisy.max() <= 9
    assert torch.equal(noisy, with_noise(labels, part, seed=0))
    if part == 1.0:
        shifts = (noisy - labels) % 10
        assert shifts.bincount(minlength=10)[1:].min() > 60, "every wrong class is as likely"


def test_only_training_labels_are_noisy():
    clean, noisy = (
        Mnist1d(Mnist1dConfig(train=100, unlabelled=0, validation=20, label_noise=part)).splits()
        for part in (0, 0.4)
    )
    assert int((clean.train.labels != noisy.train.labels).sum()) == 40
    assert torch.equal(clean.validation.labels, noisy.validation.labels)
    assert torch.equal(clean.test.labels, noisy.test.labels)


@pytest.mark.parametrize("method", ["hard_labels", "ibmd", "hldm", "pddm"])
def test_methods_with_a_meaning_for_regression_run_on_it(method, cli, tmp_path):
    config = {
        "task": "diabetes",
        "teacher": {"name": "mlp", "hidden": 16, "train": {"steps": 10}},
        "method": method,
        "steps": 12,
        "batch_size": 32,
        "out": "run",
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    said = cli("run", "run.yaml")
    assert said.code == 0, said.err
    assert set(json.loads((tmp_path / "run" / "summary.json").read_text())["scores"]["test"]) == {"r2", "mse"}


@pytest.mark.parametrize("method", ["kd", "sld", "tcmd"])
def test_methods_without_one_are_refused_before_anything_is_trained(method, cli, tmp_path):
    config = {"task": "diabetes", "teacher": {"name": "mlp", "train": {"steps": 1}}, "method": method}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    said = cli("run", "run.yaml", "steps=2")
    assert said.code != 0
    assert f"plugin '{method}' (stillhouse 0.1.0) has no meaning for regression" in said.err
    assert "update" not in said.out, "neither the teacher nor the student was trained"
    assert not list(tmp_path.glob("runs/*/checkpoints/*"))
    assert "Traceback" not in said.err
