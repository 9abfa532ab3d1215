"""The step's state beside a trainer's own checkpoint: what the trainer does not hold, and a resume needs."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import torch

from stillhouse.errors import CheckpointError
from stillhouse.files import write_bytes
from stillhouse.training.step import DistillStep

STATE, MANIFEST = "distillation.pt", "distillation.json"


def save(step: DistillStep, folder: Path) -> None:
    """Write ``distillation.pt`` (tensors and plain values, read without pickle) and its digest beside it.

    Auxiliary modules, the place in the stages, the plugins' own state, and the copy that stands in for a model; neither
    the student nor a teacher.
    """
    buffer = io.BytesIO()
    torch.save(step.state_dict(), buffer)
    content = buffer.getvalue()
    about = {"methods": list(step.run.method_names), "sha256": hashlib.sha256(content).hexdigest()}
    write_bytes(folder / STATE, content)
    write_bytes(folder / MANIFEST, json.dumps(about).encode())


def load(step: DistillStep, folder: Path) -> None:
    """Take up what ``save`` wrote; the student's weights are there already.

    Raises CheckpointError where it is not there, was damaged, or is of other methods.
    """
    try:
        about = json.loads((folder / MANIFEST).read_bytes())
        content = (folder / STATE).read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no readable {STATE} and {MANIFEST} ({error}); expected a checkpoint that a distilling "
            "trainer wrote (with save_only_model there is none): resume from another, or start over"
        ) from None
    own = list(step.run.method_names)
    if about.get("methods") != own:
        raise CheckpointError(
            f"{folder} was written with the methods {about.get('methods')}, and this distillation has {own}; expected "
            "the same: start over in another directory"
        )
    if hashlib.sha256(content).hexdigest() != about.get("sha256"):
        raise CheckpointError(
            f"{folder / STATE} is not what was written (its digest differs); resume from another one"
        )
    step.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
