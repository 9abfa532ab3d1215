"""A cell, in a process of its own: a run with its figures, or the error that ended it."""

from __future__ import annotations

import errno
import json
import math
import re
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stillhouse.api import Task
from stillhouse.cache import Cache
from stillhouse.config import validate
from stillhouse.contract.context import STUDENT
from stillhouse.contract.splits import Splits
from stillhouse.errors import CheckpointError, ConfigError, StillhouseError, WriteFailed
from stillhouse.runs import directory
from stillhouse.runs.display import Lines
from stillhouse.runs.interrupts import Interrupted
from stillhouse.runs.prepare import prepare
from stillhouse.runs.stored import identity
from stillhouse.runs.train import Summary, run
from stillhouse.study.origin import Sources, differences
from stillhouse.study.plan import Cell, Facts

DONE, FAILED, REFUSED = "done", "failed", "not applicable"
RUN = "run"
TEACHERS = "teachers"
"""The kind of what is kept in the cache."""
_PASSING = re.compile(r"CUDA|NCCL|out of memory|allocate memory")
"""What a RuntimeError of torch's says that may not come again."""


@dataclass(frozen=True)
class Order:
    """A cell to be made.

    folder
        The cell's own; its run directory is made in it.
    keep
        Whether the run directory stays: of a tuning cell the figures alone do.
    elsewhere
        Whether the machine may be another than the one that made the plan: it is then compared first.
    """

    digest: str
    made_from: dict[str, Any]
    config: dict[str, Any]
    folder: str
    test: bool
    keep: bool
    elsewhere: bool = False


def order(cell: Cell, folder: Path) -> Order:
    """What a worker has to know of the cell."""
    return Order(cell.digest, cell.made_from, cell.config, str(folder), cell.test, cell.test)


def work(order: Order) -> dict[str, Any]:
    """Run the cell and return its result; an error of it is a result too, with ``again`` where it may not repeat itself.

    Raises Interrupted, and WriteFailed where nothing can be written: the cell then counts as not run. A run that was begun
    goes on from its last checkpoint.
    """
    started, used, held = time.time(), time.process_time(), most_memory()
    result: dict[str, Any] = {"digest": order.digest, "made_from": order.made_from, "started": started}
    try:
        if order.elsewhere:
            _check_machine(order)
        result |= _figures(order, _run(order)) | {"status": DONE}
        result |= {"peak_memory": most_memory() - held, "peak_gpu_memory": _gpu_memory()}
        if not order.keep:
            shutil.rmtree(Path(order.folder) / RUN)
    except (Interrupted, KeyboardInterrupt, WriteFailed):
        raise
    except ConfigError as error:
        result |= {"status": REFUSED, "error": _told(error)}
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise WriteFailed(f"{order.folder}: {error}; free some space", error.errno) from error
        traceback.print_exc()  # of a plugin's code anything may come; the other cells go on
        result |= {"status": FAILED, "error": _told(error), "again": _passing(error)}
    seconds = {"wall": time.time() - started, "cpu": time.process_time() - used}
    return {**result, **{f"{clock}_seconds": round(value, 3) for clock, value in seconds.items()}}


def _passing(error: Exception) -> bool:
    """Whether it is of the machine as it is now (a file, memory, a device, another's data), and another try may do."""
    if isinstance(error, RuntimeError):
        return _PASSING.search(str(error)) is not None
    return isinstance(error, OSError | MemoryError | CheckpointError)


def _told(error: BaseException) -> dict[str, Any]:
    notes = [str(note) for note in getattr(error, "__notes__", [])]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = None if isinstance(error, StillhouseError) else f"{Path(frame.filename).name}:{frame.lineno}"
    return {"type": type(error).__name__, "message": str(error), "notes": notes, "where": where}


def _run(order: Order) -> Summary:
    folder = Path(order.folder) / RUN
    config = validate({**order.config, "out": str(folder)})

    def splits(task: Task) -> Splits:
        made = task.splits()
        return made if order.test else replace(made, test=None)

    try:
        return run(config, resume=True, display=Lines(), splits=splits, picture=False)
    except Interrupted:
        raise
    except CheckpointError as error:  # damaged, or begun with a teacher or data that have changed since
        if not (folder / directory.CONFIG).is_file():
            raise
        print(f"{error}; the cell starts over", flush=True)
        return run(config, overwrite=True, display=Lines(), splits=splits, picture=False)


def _figures(order: Order, summary: Summary) -> dict[str, Any]:
    folder = Path(order.folder) / RUN
    manifest = directory.read_manifest(folder)
    _check_origin(order.made_from, manifest)
    kept = ("scores", "metric", "steps", "teacher", "teacher_calls", "parameters", "seconds")
    final = manifest["stages"][-1]["model"] or STUDENT
    return {
        **{key: summary[key] for key in kept},
        "warnings": [*summary["warnings"], *_not_finite(summary["scores"])],
        "test_opened": summary["test_opened"] if order.test else 0,
        "curve": _curve(folder / directory.METRICS, final),
        "validate_every": manifest["config"]["validate_every"],
        "chosen": manifest["chosen"],
        "versions": manifest["versions"],
        "plugins": manifest["plugins"],
        "machine": manifest["machine"],
        "kernel": manifest["kernel"],
        "git": manifest["git"],
    }


def _not_finite(scores: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    return [
        f"{split} {name} is not finite: it counts as missing"
        for split, found in scores.items()
        for name, value in found.items()
        if value is None or not math.isfinite(value)
    ]


def _check_machine(order: Order) -> None:
    """Refuse a machine whose code, versions or device are not those that the cell is named by."""
    here = {**order.made_from, **Sources().of(order.config).model_dump()}
    if told := differences(here, order.made_from, "where the study was planned"):
        raise CheckpointError(f"{'; '.join(told)}; expected the same on every machine")


def _check_origin(made_from: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Refuse a run whose data or teacher are not those that the study was prepared with."""
    for name, found in manifest["data"].items():
        if made_from["data"].get(name) != found:
            raise CheckpointError(
                f"the {name} split is {found} here and {made_from['data'].get(name)} where the study was prepared; "
                "expected the same data on every machine, and unchanged files"
            )
    teacher = identity(manifest["teacher"])
    if teacher != made_from["teacher"]:
        raise CheckpointError(
            f"the teacher is {teacher} here and {made_from['teacher']} where the study was prepared; expected the same"
        )


def _curve(path: Path, final: str) -> list[dict[str, Any]]:
    """The validation rows of the model that the run ends with: ``step``, ``stage``, and each score by its name.

    Rows of a stage that trains another (an assistant, a small network on the way) are no steps of its curve.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    prefix = "validation."
    found = []
    for row in rows:
        scores = {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
        if scores and row["model"] == final:
            found.append({"step": row["step"], "stage": row["stage"], **scores})
    return found


def most_memory() -> int:
    """The most bytes of main memory that this process has held so far.

    A cell's own is the rise from its beginning: its process is forked from one that holds every import.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gpu_memory() -> int | None:
    """The most bytes that torch has held on the GPU; None where none was used."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def prepare_pair(configs: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[dict[str, Facts], list[str]]:
    """Make a pair's data and teacher, once for all methods; facts by method, and the modules that this imported.

    What a method raises is a fact of it, and the others go on; WriteFailed ends all.

    configs
        Methods, each with its resolved config.
    """
    facts = {}
    for method, config in configs:
        try:
            facts[method] = _facts(config)
        except WriteFailed:
            raise
        except Exception as error:  # noqa: BLE001 - of a plugin's code anything may come
            if not isinstance(error, StillhouseError):
                traceback.print_exc()
            told = _told(error)
            words = [
                told["message"] or told["type"],
                *told["notes"],
                *([told["where"]] if told["where"] else []),
            ]
            facts[method] = Facts(refused="; ".join(words), status=FAILED)
    return facts, [name for name, module in sys.modules.items() if importable(name, module)]


def _facts(config: Mapping[str, Any]) -> Facts:
    made = prepare(validate(config), say=lambda message: print(message, flush=True))
    return Facts(
        data=made.data,
        higher=made.higher,
        teacher_files=_teacher_files(made.teacher),
        teacher=identity(made.teacher),
        teacher_scores=made.teacher.get("validation", {}),
        metric=made.metric,
        metrics=made.metrics,
        refused=made.refused,
    )


def _teacher_files(facts: Mapping[str, Any]) -> list[str]:
    """The files in the cache that trained teachers are kept in."""
    told = ("key", "digest", "found", "validation")
    return [
        Cache(TEACHERS).path({name: value for name, value in own.items() if name not in told}).name
        for own in facts.get("each", {"teacher": facts}).values()
        if "key" in own
    ]


def importable(name: str, module: Any) -> bool:
    """Whether the name is one that another process can import again."""
    spec = getattr(module, "__spec__", None)
    return spec is not None and spec.name == name and not name.startswith("__")
