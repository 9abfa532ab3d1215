"""Stops, copies of state and kills, for tests of methods with several stages."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from stillhouse.training.loop import Loop


def taken_up(make: Callable[[], Loop], at: int) -> Loop:
    """A loop stopped after ``at`` updates, its state written and read, gone on with in another loop to the end."""
    first = make()
    first.run(at)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = make()
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert second.run()
    return second


def same(a: Loop, b: Loop) -> bool:
    """Whether two loops ended with the same models, bit for bit, and as many teacher calls."""
    ours, theirs = a.state_dict()["models"], b.state_dict()["models"]
    return a.step.teacher_calls == b.step.teacher_calls and all(
        torch.equal(tensor, theirs[name][key])
        for name, state in ours.items()
        for key, tensor in state.items()
    )


class Run:
    """A run of the command line in a process of its own, in a folder."""

    def __init__(self, folder: Path, forks, config: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        self.folder, self.forks, self.log, self.out = folder, forks, folder / "log", folder / "run"

    def go(self, *more: str, **faults: object) -> int:
        return self.forks.run(["run", "run.yaml", "out=run", *more], self.folder, self.log, **faults)

    def killed_after(self, update: int) -> None:
        """Dead by SIGKILL right after the checkpoint of ``update`` was due."""
        die = {"function": "stillhouse.runs.recorder:Recorder.updated", "call": update, "when": "after"}
        assert self.go(die=die) == -signal.SIGKILL, self.log.read_text()

    def said(self) -> str:
        return self.log.read_text()

    @property
    def weights(self) -> bytes:
        return (self.out / "student.safetensors").read_bytes()
