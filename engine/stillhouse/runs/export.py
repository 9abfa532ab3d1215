"""``stillhouse export``: the trained model of a run alone, in a form that loads without Stillhouse.

What was written is loaded again and compared with the run's model before it is called done.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.config import validate
from stillhouse.contract.batch import mapped
from stillhouse.contract.context import STUDENT, TARGET
from stillhouse.contract.kinds import KINDS
from stillhouse.contract.task import Task
from stillhouse.errors import ConfigError, MissingExtra
from stillhouse.models.calling import evaluating, forward
from stillhouse.runs import directory, weights
from stillhouse.runs.resolve import resolve

FORMS = ("transformers", "torch-export", "onnx")
PROGRAM, ONNX = "student.pt2", "student.onnx"
ROWS = 4
TOLERANCE = 1e-4
"""Greatest difference of an output, relative to the greatest output."""


def export(run: Path, to: str, out: Path) -> dict[str, float]:
    """Write the run's model to the folder ``out``, which is made.

    run
        A finished run's directory, made from a config.
    to
        ``transformers`` (save_pretrained, with the tokenizer where the task has one), ``torch-export`` (a program for
        torch.export.load) or ``onnx``; the batch size stays open.

    Returns ``difference``: how far outputs are from the run's, relative to the greatest.

    Raises CheckpointError for a directory that holds no finished run, ConfigError for a model that has no such form, for a
    folder that is not empty, and for outputs that differ.
    """
    if to not in FORMS:
        raise ConfigError(f"--to is '{to}'; expected one of {', '.join(FORMS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there and not empty; expected a new folder: choose another with --out")
    task, model = trained(run)
    batch = task.splits().train.probe(ROWS)
    inputs, kind = batch.inputs, KINDS[task.kind]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as place:
        folder = Path(place) / "made"
        folder.mkdir()
        write: Callable[[nn.Module, Any, Path, Task], Callable[[Any], Tensor]] = {
            "transformers": _transformers,
            "torch-export": _program,
            "onnx": _onnx,
        }[to]
        with evaluating(model):
            call = write(model, inputs, folder, task)
            difference = 0.0
            for rows in (slice(0, ROWS), slice(0, 3)):
                some = _rows(inputs, rows)
                own, given = forward(model, some, kind).float(), kind.aligned(call(some)).float()
                scale = float(own.abs().max().clamp(min=1e-12))
                difference = max(difference, float((own - given).abs().max()) / scale)
        if not difference <= TOLERANCE:
            raise ConfigError(
                f"the exported model's outputs differ from the run's by {difference:.2g} of the greatest; expected "
                f"{TOLERANCE:g} at most: nothing was written"
            )
        if out.exists():
            out.rmdir()
        shutil.move(folder, out)
    return {"difference": difference}


def _rows(inputs: Any, rows: slice) -> Any:
    return mapped(inputs, lambda tensor: tensor[rows])


def trained(run: Path) -> tuple[Task, nn.Module]:
    """A finished run's task and its trained model, its files checked against their digests."""
    if not directory.holds_run(run):
        raise ConfigError(f"{run} holds no run; expected the directory of a finished one")
    if not (run / directory.SUMMARY).exists():
        raise ConfigError(
            f"{run} holds an unfinished run; finish it with 'stillhouse run ... --resume' first"
        )
    directory.read_summary(run)
    config = validate(directory.read_manifest(run)["config"])
    if config.task.name == "objects":
        raise ConfigError(
            f"{run} was made by stillhouse.distill from Python objects, whose classes it does not know; load "
            f"{directory.STUDENT} there into the model, and save that"
        )
    parts = resolve(config)
    role = TARGET if TARGET in parts.builders else STUDENT
    model = parts.builders[role]()
    weights.load(model, run / directory.STUDENT)
    return parts.task, model.eval()


def _transformers(model: nn.Module, inputs: Any, folder: Path, task: Task) -> Callable[[Any], Tensor]:
    if not hasattr(model, "save_pretrained"):
        raise ConfigError(
            f"{type(model).__name__} is no model of transformers; expected one, or --to torch-export"
        )
    plain: Any = model
    plain.save_pretrained(folder)
    tokenizer = getattr(task, "tokenizer", None)
    if tokenizer is not None:
        tokenizer().save_pretrained(folder)
    again = type(plain).from_pretrained(folder, local_files_only=True).eval()
    kind = KINDS[task.kind]
    return lambda rows: forward(again, rows, kind)


class _Plain(nn.Module):
    """Inputs by name to outputs as one tensor."""

    def __init__(self, model: nn.Module, names: list[str] | None, kind: str) -> None:
        super().__init__()
        self.model, self._names, self._kind = model, names, KINDS[kind]

    def forward(self, *given: Tensor) -> Tensor:
        """The logits."""
        inputs: Any = given[0] if self._names is None else dict(zip(self._names, given, strict=True))
        return forward(self.model, inputs, self._kind)


def _arguments(inputs: Any) -> tuple[list[str] | None, tuple[Tensor, ...]]:
    if isinstance(inputs, Tensor):
        return None, (inputs,)
    if isinstance(inputs, Mapping) and all(isinstance(value, Tensor) for value in inputs.values()):
        return list(inputs), tuple(inputs.values())
    raise ConfigError(f"the model reads {type(inputs).__name__}; expected a tensor, or tensors by name")


def _exported(model: nn.Module, inputs: Any, task: Task) -> tuple[Any, list[str] | None]:
    names, given = _arguments(inputs)
    size = torch.export.Dim("batch", min=2, max=1 << 16)
    wrapped = _Plain(model, names, task.kind).eval()
    try:
        shapes = (tuple({0: size} for _ in given),)
        return torch.export.export(wrapped, given, dynamic_shapes=shapes, strict=False), names
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"torch.export can't read {type(model).__name__} ({reason}); expected a forward without data-dependent Python"
        ) from error


def _program(model: nn.Module, inputs: Any, folder: Path, task: Task) -> Callable[[Any], Tensor]:
    program, names = _exported(model, inputs, task)
    torch.export.save(program, folder / PROGRAM)
    again = torch.export.load(folder / PROGRAM).module()
    return lambda rows: again(*([rows] if names is None else [rows[name] for name in names]))


def _onnx(model: nn.Module, inputs: Any, folder: Path, task: Task) -> Callable[[Any], Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError:
        raise MissingExtra("export --to onnx", "onnxscript and onnxruntime", "export") from None
    program, names = _exported(model, inputs, task)
    written: Any = torch.onnx.export(
        program, dynamo=True, input_names=names or ["inputs"], output_names=["logits"]
    )
    written.save(folder / ONNX)
    session = onnxruntime.InferenceSession(str(folder / ONNX))
    wanted = [entry.name for entry in session.get_inputs()]

    def call(rows: Any) -> Tensor:
        values = [rows] if names is None else [rows[name] for name in names]
        given = {name: value.numpy() for name, value in zip(wanted, values, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return call
