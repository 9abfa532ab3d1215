"""Two processes with unequal rows equal one, also in what is trained beside the student and not wrapped."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import five
import pytest
import sharded
import torch
from test_five_trainers import METHODS
from two_processes import UPDATES

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_two_processes(out: Path, script: str, *words: str) -> list[dict]:
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, str(HERE / script), *words, str(out)]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            words,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "fitnets"])
@pytest.mark.parametrize("trainer", ["hf", "accelerate", "lightning"])
def test_two_processes_equal_one(trainer, method, tmp_path):
    first, second = in_two_processes(tmp_path, "two_processes.py", trainer, method)
    assert torch.equal(first["weights"], second["weights"])
    case = five.Case(METHODS[method], UPDATES, 1, tmp_path)
    expected = five.plain(case)
    if trainer == "hf":
        for found in (first["evaluated"], second["evaluated"]):
            for name, value in expected.items():
                assert found[f"eval_{name}"] == pytest.approx(float(value), rel=1e-5), name
    whole = torch.cat([p.detach().flatten() for p in case.student.parameters()])
    assert (first["weights"] - whole).abs().max() <= 1e-6
    both = torch.tensor(first["losses"]) + torch.tensor(second["losses"])
    assert (both - torch.tensor(case.losses.found)).abs().max() <= 1e-6 * both.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "fitnets"])
def test_a_sharded_student_and_teacher_equal_whole_ones(method, tmp_path):
    first, second = in_two_processes(tmp_path, "sharded.py", method)
    assert torch.equal(first["weights"], second["weights"])
    student, beside, losses = sharded.train(method, 0, 1)
    assert first["held"] < 0.6 * sum(p.numel() for p in student.parameters()), "it was sharded"
    whole = torch.cat([sharded.weights(student), sharded.weights(beside)])
    assert (first["weights"] - whole).abs().max() <= 1e-6
    both = torch.tensor(first["losses"]) + torch.tensor(second["losses"])
    assert (both - torch.tensor(losses)).abs().max() <= 1e-6 * both.abs().max()
