"""A cell, in a process of its own: a run with its figures, or the error that ended it."""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse.api import Task
from stillhouse.cache import Cache
from stillhouse.config import validate
from stillhouse.contract.metrics import higher_is_better
from stillhouse.contract.splits import Splits
from stillhouse.errors import CheckpointError, ConfigError, StillhouseError
from stillhouse.runs import directory
from stillhouse.runs.display import Lines
from stillhouse.runs.interrupts import Interrupted
from stillhouse.runs.prepare import prepare
from stillhouse.runs.stored import identity
from stillhouse.runs.train import Summary, run
from stillhouse.study.plan import Cell, Facts

DONE, FAILED, REFUSED = "done", "failed", "not applicable"
RUN = "run"
TEACHERS = "teachers"
"""The kind of what is kept in the cache."""


@dataclass(frozen=True)
class Order:
    """A cell to be made.

    folder
        The cell's own; its run directory is made in it.
    keep
        Whether the run directory stays: of a tuning cell the figures alone do.
    """

    digest: str
    made_from: dict[str, Any]
    config: dict[str, Any]
    folder: str
    test: bool
    keep: bool


def order(cell: Cell, folder: Path) -> Order:
    """What a worker has to know of the cell."""
    return Order(cell.digest, cell.made_from, cell.config, str(folder), cell.test, cell.test)


def work(order: Order) -> dict[str, Any]:
    """Run the cell and return its result; an error of it is a result too.

    Raises Interrupted alone. A run that was begun goes on from its last checkpoint.
    """
    started, used = time.time(), time.process_time()
    result: dict[str, Any] = {"digest": order.digest, "made_from": order.made_from, "started": started}
    try:
        result |= _figures(order, _run(order)) | {"status": DONE}
        if not order.keep:
            shutil.rmtree(Path(order.folder) / RUN)
    except (Interrupted, KeyboardInterrupt):
        raise
    except ConfigError as error:
        result |= {"status": REFUSED, "error": _told(error)}
    except Exception as error:  # noqa: BLE001 - of a plugin's code anything may come; the other cells go on
        traceback.print_exc()
        result |= {"status": FAILED, "error": _told(error)}
    seconds = {"wall": time.time() - started, "cpu": time.process_time() - used}
    return {**result, **{f"{clock}_seconds": round(value, 3) for clock, value in seconds.items()}}


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
    kept = ("scores", "metric", "steps", "teacher", "teacher_calls", "parameters", "seconds", "warnings")
    return {
        **{key: summary[key] for key in kept},
        "test_opened": summary["test_opened"] if order.test else 0,
        "curve": _curve(folder / directory.METRICS),
        "peak_memory": peak_memory(),
        "chosen": manifest["chosen"],
        "versions": manifest["versions"],
        "plugins": manifest["plugins"],
        "machine": manifest["machine"],
        "kernel": manifest["kernel"],
        "git": manifest["git"],
    }


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


def _curve(path: Path) -> list[dict[str, Any]]:
    """The validation rows of a run: ``step``, and each score by its name."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    prefix = "validation."
    found = []
    for row in rows:
        scores = {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
        if scores:
            found.append({"step": row["step"], **scores})
    return found


def peak_memory() -> int:
    """The most bytes of main memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def prepare_pair(configs: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[dict[str, Facts], list[str]]:
    """Make a pair's data and teacher, once for all methods; facts by method, and the modules that this imported.

    configs
        Methods, each with its resolved config.
    """
    facts = {}
    for method, config in configs:
        made = prepare(validate(config), say=lambda message: print(message, flush=True))
        facts[method] = Facts(
            data=made.data,
            higher=higher_is_better(made.metric),
            teacher_files=_teacher_files(made.teacher),
            teacher=identity(made.teacher),
            teacher_scores=made.teacher.get("validation", {}),
            metric=made.metric,
            metrics=made.metrics,
            refused=made.refused,
        )
    return facts, [name for name, module in sys.modules.items() if importable(name, module)]


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
