"""``stillhouse export``: the trained model of a run alone, in a form that loads without Stillhouse.

What was written is loaded again and compared with the run's model before it is called done. Beside it the run's page
``compression.md`` is written: what the student costs to keep and to call, the teacher beside it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.config import validate
from stillhouse.contract.batch import mapped
from stillhouse.contract.context import STUDENT, TARGET, TEACHER
from stillhouse.contract.kinds import KINDS, TaskKind
from stillhouse.contract.splits import Split
from stillhouse.contract.task import Task
from stillhouse.errors import ConfigError, MissingExtra
from stillhouse.models.calling import evaluating, forward
from stillhouse.runs import directory, weights
from stillhouse.runs.compression import Size, sizes
from stillhouse.runs.compression import write as write_page
from stillhouse.runs.resolve import Parts, resolve

FORMS = ("transformers", "torch-export", "onnx")
PROGRAM, ONNX = "student.pt2", "student.onnx"
ROWS = 4
TOLERANCE = 1e-4
"""Greatest difference of an output, relative to the greatest output."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    difference
        How far outputs are from the run's at most, relative to the greatest.
    inputs
        The names of what a program takes, in order; empty where it is one tensor, or a checkpoint.
    length
        The number of tokens that a program is held to; None: any.
    sizes
        What the models cost, by role.
    """

    difference: float
    inputs: Sequence[str]
    length: int | None
    sizes: Mapping[str, Size]


def export(run: Path, to: str, out: Path) -> Exported:
    """Write the run's model to the folder ``out``, which is made.

    run
        A finished run's directory, made from a config.
    to
        ``transformers`` (save_pretrained, with the tokenizer where the task has one), ``torch-export`` (a program for
        torch.export.load) or ``onnx``; the batch size stays open, and the number of tokens where the model lets it.

    Raises CheckpointError for a directory that holds no finished run, ConfigError for a model that has no such form, for a
    folder that is not empty, and for outputs that differ.
    """
    if to not in FORMS:
        raise ConfigError(f"--to is '{to}'; expected one of {', '.join(FORMS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there and not empty; expected a new folder: choose another with --out")
    parts, model = trained(run)
    task = parts.task
    split, kind = task.splits().train, KINDS[task.kind]
    inputs = split.probe(ROWS).inputs
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as place:
        folder = Path(place) / "made"
        folder.mkdir()
        write: Callable[[nn.Module, Any, Path, Task], _Written] = {
            "transformers": _transformers,
            "torch-export": _program,
            "onnx": _onnx,
        }[to]
        with evaluating(model):
            written = write(model, inputs, folder, task)
            difference = _difference(model, written, inputs, kind)
        if not difference <= TOLERANCE:
            raise ConfigError(
                f"the exported model's outputs differ from the run's by {difference:.2g} of the greatest; expected "
                f"{TOLERANCE:g} at most: nothing was written"
            )
        if out.exists():
            out.rmdir()
        shutil.move(folder, out)
    found = _sizes(parts, model, split, kind)
    write_page(found, parts.config.name, run / directory.COMPRESSION)
    return Exported(difference, written.names or (), written.length, found)


def _sizes(parts: Parts, model: nn.Module, split: Split, kind: TaskKind) -> Mapping[str, Size]:
    models = {STUDENT: model}
    if TEACHER in parts.builders:
        teacher = parts.builders[TEACHER]()
        if any(True for _ in teacher.parameters()):  # not one that is asked over a network
            models = {TEACHER: teacher, STUDENT: model}
    return sizes(models, split, kind)


@dataclass(frozen=True)
class _Written:
    """The model as it was loaded again: a call, the names of its inputs, and the tokens that it is held to."""

    call: Callable[[Any], Tensor]
    names: Sequence[str] | None = None
    length: int | None = None


def _difference(model: nn.Module, written: _Written, inputs: Any, kind: TaskKind) -> float:
    """On some rows, on fewer, and on shorter ones where any length is taken."""
    worst = 0.0
    few = _rows(inputs, slice(0, 3))
    tokens = _tokens(inputs)
    shorter = [_cut(few, tokens - 1, tokens)] if tokens > 2 and written.length is None else []
    for some in (inputs, few, *shorter):
        own, given = forward(model, some, kind).float(), kind.aligned(written.call(some)).float()
        if own.shape != given.shape:
            raise ConfigError(
                f"the exported model gives outputs {tuple(given.shape)}, and the run's {tuple(own.shape)}: nothing was "
                "written"
            )
        scale = float(own.abs().max().clamp(min=1e-12))
        worst = max(worst, float((own - given).abs().max().nan_to_num(torch.inf)) / scale)
    return worst


def _tokens(inputs: Any) -> int:
    """Tokens of a row; 0 where rows are no text."""
    found = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    return found.shape[1] if isinstance(found, Tensor) and found.dim() == 2 else 0


def _cut(inputs: Any, length: int, of: int) -> Any:
    return mapped(inputs, lambda t: t[:, :length] if t.dim() == 2 and t.shape[1] == of else t)


def _rows(inputs: Any, rows: slice) -> Any:
    return mapped(inputs, lambda tensor: tensor[rows])


def trained(run: Path) -> tuple[Parts, nn.Module]:
    """A finished run's parts and its trained model, its files checked against their digests."""
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
    return parts, model.eval()


def _transformers(model: nn.Module, inputs: Any, folder: Path, task: Task) -> _Written:
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
    return _Written(lambda rows: forward(again, rows, kind))


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


def _exported(model: nn.Module, inputs: Any, task: Task) -> tuple[Any, list[str] | None, int | None]:
    """A program of any number of rows, the names of its inputs, and the tokens that it is held to."""
    names, given = _arguments(inputs)
    wrapped = _Plain(model, names, task.kind).eval()
    size, tokens = torch.export.Dim("batch", min=2, max=1 << 16), _tokens(inputs)
    shapes = [
        {0: size, 1: torch.export.Dim.AUTO} if tokens and t.dim() == 2 and t.shape[1] == tokens else {0: size}
        for t in given
    ]
    try:
        program = torch.export.export(wrapped, given, dynamic_shapes=(tuple(shapes),), strict=False)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"torch.export can't read {type(model).__name__} ({reason}); expected a forward without data-dependent Python"
        ) from error
    own = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"][-len(given) :]
    fixed = tokens and any(
        isinstance(shape[1], int) for shape, dims in zip(own, shapes, strict=True) if 1 in dims
    )
    return program, names, tokens if fixed else None


def _program(model: nn.Module, inputs: Any, folder: Path, task: Task) -> _Written:
    program, names, length = _exported(model, inputs, task)
    torch.export.save(program, folder / PROGRAM)
    again = torch.export.load(folder / PROGRAM).module()
    return _Written(
        lambda rows: again(*([rows] if names is None else [rows[name] for name in names])), names, length
    )


def _onnx(model: nn.Module, inputs: Any, folder: Path, task: Task) -> _Written:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError:
        raise MissingExtra("export --to onnx", "onnxscript and onnxruntime", "export") from None
    program, names, length = _exported(model, inputs, task)
    written: Any = torch.onnx.export(
        program, dynamo=True, input_names=names or ["inputs"], output_names=["logits"], verbose=False
    )
    written.save(folder / ONNX)
    session = onnxruntime.InferenceSession(str(folder / ONNX))
    wanted = [entry.name for entry in session.get_inputs()]

    def call(rows: Any) -> Tensor:
        values = {"inputs": rows} if names is None else rows
        found: Any = session.run(None, {name: values[name].numpy() for name in wanted})[0]
        return torch.from_numpy(found)

    return _Written(call, wanted if names else None, length)
