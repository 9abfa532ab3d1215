"""Checkpoints: whole or not there, without code, the last two kept."""

from __future__ import annotations

import errno
import os
import pickle
import random

import numpy as np
import pytest
import torch

from stillhouse.errors import CheckpointError, DamagedFile
from stillhouse.files import writing
from stillhouse.runs import checkpoint
from stillhouse.training.random_state import RandomState

CONTENT = {"config": "{}", "position": {"stage": 0, "stage_step": 1, "step": 1}, "x": torch.arange(3)}


def draw() -> tuple:
    return torch.rand(2).tolist(), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)


class TestRandomState:
    def test_gives_the_same_numbers_again(self):
        draw()  # gaussian generators hold a spare number now
        state = RandomState.capture()
        first = draw()
        state.restore()
        assert draw() == first

    def test_survives_a_checkpoint(self, tmp_path):
        state = RandomState.capture()
        first = draw()
        path = checkpoint.write(tmp_path, 1, {**CONTENT, "random": state.state})
        RandomState(checkpoint.read(path)["random"]).restore()
        assert draw() == first

    def test_seeding_leaves_the_present_generators_alone(self):
        RandomState.capture().restore()
        before = RandomState.capture()
        a, b = RandomState.seeded(7), RandomState.seeded(7)
        expected = draw()
        before.restore()
        assert draw() == expected
        a.restore()
        first = draw()
        b.restore()
        assert draw() == first


def test_the_newest_two_are_kept(tmp_path):
    for step in (5, 9, 10, 100):
        checkpoint.write(tmp_path, step, CONTENT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000010.pt", "step-000000100.pt"]
    assert checkpoint.step_of(checkpoint.newest(tmp_path)) == 100


def test_none_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("fails", ["fsync", "replace", "open"])
def test_a_full_disk_leaves_the_one_before_as_it_was(tmp_path, monkeypatch, fails):
    good = checkpoint.write(tmp_path, 5, CONTENT)
    before = good.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"fsync": os, "replace": writing.Path, "open": os}[fails]
    with monkeypatch.context() as patched:
        patched.setattr(owner, fails, full)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.write(tmp_path, 6, CONTENT)
    said = str(caught.value)
    assert "No space left on device" in said
    assert "the one of step 5 is still good" in said
    assert "--resume" in said
    assert [path.name for path in tmp_path.iterdir()] == [good.name], "nothing half written is left"
    assert good.read_bytes() == before
    assert checkpoint.read(good)["position"]["step"] == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full(tmp_path):
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        good = checkpoint.write(disk, 1, CONTENT)
        with pytest.raises(
            CheckpointError, match=r"No space left on device.*the one of step 1 is still good"
        ):
            checkpoint.write(disk, 2, {**CONTENT, "big": torch.zeros(50_000)})
        assert [path.name for path in disk.iterdir()] == [good.name]
        assert torch.equal(checkpoint.read(good)["x"], torch.arange(3))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_truncated_one_is_named(tmp_path, cut):
    path = checkpoint.write(tmp_path, 9, CONTENT)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DamagedFile, match="truncated") as caught:
        checkpoint.read(path)
    assert str(path) in str(caught.value)


def test_a_flipped_bit_in_any_byte_is_found(tmp_path):
    path = checkpoint.write(tmp_path, 9, CONTENT)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(DamagedFile):
            checkpoint.read(path)


def test_torch_reads_it_without_stillhouse(tmp_path):
    path = checkpoint.write(tmp_path, 9, CONTENT)
    assert torch.equal(torch.load(path, weights_only=True)["x"], CONTENT["x"])


def test_one_that_the_run_may_need_again_is_kept_beside_the_newest_two(tmp_path):
    for step in (5, 9, 10, 100, 101):
        checkpoint.write(tmp_path, step, CONTENT, keep={9})
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [9, 100, 101]


def test_one_that_holds_code_is_refused_and_nothing_of_it_runs(tmp_path):
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    path = tmp_path / "step-000000001.pt"
    torch.save({"position": Evil()}, path)
    with pytest.raises(CheckpointError):
        checkpoint.read(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        checkpoint.read(path)
    assert not mark.exists()


def test_somebody_elses_file_is_refused(tmp_path):
    path = tmp_path / "step-000000001.pt"
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(DamagedFile, match="was not written by stillhouse"):
        checkpoint.read(path)
    checkpoint.write(tmp_path, 1, {"weights": torch.zeros(2)})
    with pytest.raises(DamagedFile, match="holds no checkpoint of stillhouse"):
        checkpoint.read(path)
