"""What would end a run after its teacher was trained is told before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stillhouse.config import validate
from stillhouse.errors import ConfigError
from stillhouse.runs import rehearsal
from stillhouse.runs import train as runs
from stillhouse.training.random_state import RandomState

CONFIG = {
    "task": {"name": "digits", "labelled": 40, "unlabelled": 40, "validation": 30},
    "teacher": {"name": "mlp", "hidden": 8, "train": {"steps": 4}},
    "student": {"name": "mlp", "hidden": 4},
    "method": "kd",
    "steps": 6,
    "batch_size": 8,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": "SparseAdam"}, "SparseAdam"),
        ({"teacher": {"name": "mlp", "train": {"steps": 4, "optimizer": "SparseAdam"}}}, "SparseAdam"),
        ({"method": {"name": "kd", "temperature": 1e-9}}, "temperature"),
        ({"batch_size": 10**9}, "batch_size is 1,000,000,000: one batch's inputs take"),
        (
            {"teacher": {"name": "mlp", "train": {"steps": 4, "batch_size": 10**9}}},
            "teacher.train.batch_size",
        ),
    ],
)
def test_is_told_before_anything_is_trained_or_written(change, said, tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError) as caught:  # the kernels' own are no StillhouseError
        runs.run(validate({**CONFIG, **change, "out": str(tmp_path / "run")}))
    assert said in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "run").exists()


def test_a_failure_of_torch_names_the_stage(tmp_path, monkeypatch):
    def fails(loop):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nand more")

    monkeypatch.setattr(rehearsal.Loop, "_update", fails)
    with pytest.raises(
        ConfigError,
        match=r"the first update of stage 'train' fails, and nothing was trained.*RuntimeError: mat1 and mat2 shapes cannot be multiplied;",
    ):
        runs.run(validate({**CONFIG, "out": str(tmp_path / "run")}))


def test_leaves_the_random_generators_and_the_plugins_as_they_were(tmp_path):
    parts = runs.resolve(validate({**CONFIG, "method": "sld", "out": str(tmp_path / "run")}))
    state = {name: repr(vars(plugin.method)) for name, plugin in enumerate(parts.methods)}
    torch.manual_seed(3)
    before = RandomState.capture()
    expected = torch.rand(3)
    before.restore()
    rehearsal.rehearse(parts, parts.task.splits(), torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
    assert state == {name: repr(vars(plugin.method)) for name, plugin in enumerate(parts.methods)}
    assert not Path(tmp_path / "run").exists()
