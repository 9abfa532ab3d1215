"""How much smaller and faster than its teacher a student is: measured on this machine, with rows of the run's own data."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from stillhouse.contract.batch import Batch, mapped
from stillhouse.contract.context import TEACHER
from stillhouse.contract.kinds import TaskKind
from stillhouse.contract.splits import Split
from stillhouse.files import write_text
from stillhouse.models.calling import evaluating, forward
from stillhouse.runs.machine import machine
from stillhouse.runs.weights import plain_state

ROWS = 32
_SECONDS, _CALLS = 0.5, 5


@dataclass(frozen=True)
class Size:
    """What a model costs to keep and to call.

    parameters
        Their number, a shared one once.
    disk
        Bytes of its weights as they are kept: parameters and buffers, a shared one once.
    peak
        Bytes: the weights, and what a forward pass of ``rows`` rows takes besides at its height.
    one, many
        Seconds of a forward pass of one row, and of ``rows``: the median of five calls at least.
    """

    parameters: int
    disk: int
    peak: int
    one: float
    many: float


def sizes(models: Mapping[str, nn.Module], split: Split, kind: TaskKind) -> dict[str, Size]:
    """Each model's, on the CPU with torch's threads as they are set; a teacher reads its own inputs.

    models
        By role.
    split
        Its first rows are read, over again where they are fewer than 32.
    """
    batch = _filled(split.probe(ROWS))
    return {
        role: _size(model, batch.for_teacher if role == TEACHER else batch.inputs, kind)
        for role, model in models.items()
    }


def _filled(batch: Batch) -> Batch:
    order = torch.arange(ROWS) % len(batch)
    teacher = batch.teacher_inputs
    return Batch(
        mapped(batch.inputs, lambda tensor: tensor[order]),
        teacher_inputs=None if teacher is None else mapped(teacher, lambda tensor: tensor[order]),
    )


def _size(model: nn.Module, inputs: object, kind: TaskKind) -> Size:
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in plain_state(model).values()}
    one = mapped(inputs, lambda tensor: tensor[:1])
    with evaluating(model):
        weights = sum(kept.values())
        peak = weights + peak_bytes(lambda: forward(model, inputs, kind))
        times = [_seconds(model, given, kind) for given in (one, inputs)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(parameters, weights, peak, *times)


def _seconds(model: nn.Module, inputs: object, kind: TaskKind) -> float:
    forward(model, inputs, kind)
    found: list[float] = []
    while len(found) < _CALLS or sum(found) < _SECONDS:
        start = time.perf_counter()
        forward(model, inputs, kind)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors on the CPU that a call holds at once, beyond those that were there before."""
    from torch.profiler import ProfilerActivity, profile

    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = peak = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's C++ side writes to the error stream."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def table(found: Mapping[str, Size]) -> str:
    """The figures as Markdown, a column a model; the last column says how many times smaller the last model is."""
    rows = [
        ("parameters", [f"{size.parameters:,}" for size in found.values()], _ratio(found, "parameters")),
        ("on disk, MiB", [f"{size.disk / 2**20:,.2f}" for size in found.values()], _ratio(found, "disk")),
        (f"peak memory, MiB, {ROWS} rows", [f"{s.peak / 2**20:,.2f}" for s in found.values()], _ratio(found, "peak")),
        ("latency, ms, 1 row", [f"{size.one * 1e3:,.2f}" for size in found.values()], _ratio(found, "one")),
        (f"latency, ms, {ROWS} rows", [f"{s.many * 1e3:,.2f}" for s in found.values()], _ratio(found, "many")),
    ]  # fmt: skip
    compared = len(found) > 1
    head = [*found, *(["times smaller"] if compared else [])]
    lines = [f"| | {' | '.join(head)} |", f"| --- |{' ---: |' * len(head)}"]
    for name, values, ratio in rows:
        lines.append(f"| {name} | {' | '.join([*values, *([f'{ratio:.2f}'] if compared else [])])} |")
    return "\n".join(lines)


def _ratio(found: Mapping[str, Size], what: str) -> float:
    first, last = (float(getattr(list(found.values())[place], what)) for place in (0, -1))
    return first / last if last else float("nan")


def write(found: Mapping[str, Size], title: str, path: Path) -> None:
    """The table as a page, with the machine that it was measured on."""
    here = machine(torch.device("cpu"))
    write_text(
        path,
        f"""# {title}: what was saved

{table(found)}

Measured on a CPU ({here["system"]}, {here["processor"]}, {here["threads"]} of {here["cpus"]} threads, torch
{torch.__version__}) with rows of the training split. Latency is the median of {_CALLS} calls at least; peak memory is the
weights with what a forward pass holds besides.
""",
    )
