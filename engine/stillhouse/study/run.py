"""A study from its plan to its report: prepare, run the cells, go on after a kill, take over another machine's."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stillhouse.errors import CheckpointError, ConfigError, StillhouseError, WriteFailed, nearest
from stillhouse.runs.directory import differences as config_differences
from stillhouse.runs.resolve import pick_device
from stillhouse.study import directory, extra
from stillhouse.study.live import Live
from stillhouse.study.origin import differences
from stillhouse.study.plan import Cell, Entry, Facts, Plan, answered, cells, digest
from stillhouse.study.processes import (
    UNWRITABLE,
    Processes,
    Stopped,
    default_workers,
    last_words,
    prepared,
)
from stillhouse.study.work import DONE, FAILED, Order, order, prepare_pair

Results = dict[str, dict[str, Any]]
TICK = 0.5
"""Seconds between two looks at the clock while cells run."""


class Executor(Protocol):
    """Runs cells: on processes here, or on Ray's workers.

    stopping
        What ``stop`` does to those that run, in words.
    """

    workers: int
    stopping: str

    def start(self, order: Order) -> None: ...

    def finished(self, timeout: float) -> list[tuple[Order, int]]: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class Options:
    """How a study is run; nothing here enters its figures.

    workers
        Cells at once; None: as many as there are processors for.
    resume
        Go on with what the directory holds.
    limit
        Seconds after which a cell is killed; it then has failed, and is tried again by a resume.
    merge
        Directories of the same study from other machines, whose finished cells are taken over.
    """

    workers: int | None = None
    ray: bool = False
    resume: bool = False
    overwrite: bool = False
    limit: float | None = None
    merge: Sequence[Path] = ()


@dataclass
class Made:
    """What a study came to.

    seconds, cell_seconds
        The wall-clock time of running the cells, and the sum of the cells' own; 0 where nothing was run.
    """

    plan: Plan
    results: Results
    seconds: float
    cell_seconds: float
    workers: int


def make(plan: Plan, folder: Path, text: str, options: Options, live: Live) -> Made:
    """Run what is missing of the study in ``folder``.

    text
        The study's file, kept beside the plan.

    Raises CheckpointError where the directory is another study's, is held by another process, or holds an unfinished
    study and ``resume`` is False, or where a directory to merge is none of this study; MissingExtra where Ray is asked for
    and not installed. Nothing is run before that.
    """
    extra.check_installed(tuned=plan.tuned)
    _check_writable(folder)
    with directory.held(folder):
        kept = directory.read_plan(folder)
        if kept is not None:
            _same_study(kept, plan, folder)
        results = {} if options.overwrite else _kept_results(folder, live)
        if kept is not None and not options.overwrite:
            known, stale = plan.with_facts(_facts(kept)) if _entries(kept) == _entries(plan) else None, None
            if known is not None and _complete(known, results) and not options.merge:
                stale = _stale(known)
                if not stale:
                    directory.write_plan(folder, known, text)
                    return Made(known, results, 0.0, 0.0, 0)
                live.say(f"{folder} is finished, and what it was made from has changed: {'; '.join(stale)}")
            if not options.resume:
                raise CheckpointError(
                    f"{folder} holds this study, unfinished or with other {'data' if stale else 'settings'}; --resume runs "
                    "what is missing, --overwrite starts over, --out puts this one elsewhere"
                )
        theirs = [_of_same_study(plan, other, folder) for other in options.merge]
        if options.ray:
            extra.ray()
        workers = options.workers or default_workers(_threads(plan), _devices(plan))
        plan, modules = _prepare(plan, workers, live)
        if options.overwrite:
            directory.clear(folder)
        directory.write_plan(folder, plan, text)
        for other, found in zip(options.merge, theirs, strict=True):
            _merge(plan, folder, other, found, results, live)
        executor: Executor
        if options.ray:
            from stillhouse.study.on_ray import Ray

            executor = Ray(plan, _threads(plan), _devices(plan), modules, options.limit)
        else:
            executor = Processes(workers, modules, options.limit)
        started = time.perf_counter()
        with live.running(plan, results, executor.workers):
            made = _run(plan, folder, results, executor, live)
        executor.close()
        seconds = time.perf_counter() - started if made else 0.0
        own = sum(results[name]["wall_seconds"] for name in made)
        return Made(plan, results, seconds, own, executor.workers)


def load(folder: Path) -> tuple[Plan, Results]:
    """A study's plan and results, finished or not; CheckpointError where there is none."""
    plan = directory.read_plan(folder) if folder.is_dir() else None
    if plan is None:
        raise CheckpointError(f"{folder} holds no study; expected a directory that 'stillhouse study' made")
    return plan, directory.read_results(folder)[0]


def _check_writable(folder: Path) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "is no folder" if not there.is_dir() else "is not writable"
        raise CheckpointError(f"{folder} can't be made, {there} {problem}; choose another with --out")


def _kept_results(folder: Path, live: Live) -> Results:
    """The cells that had their turn, done or not; one that was lost is tried again, and what is damaged made again."""
    found, damaged = directory.read_results(folder)
    for name in damaged:
        live.say(f"cell {name} is damaged: it is to be made again")
        directory.drop_result(folder, name)
    return {name: result for name, result in found.items() if answered(result)}


def _same_study(kept: Plan, plan: Plan, folder: Path) -> None:
    if kept.name != plan.name:
        raise CheckpointError(
            f"{folder} holds the study '{kept.name}', and this is '{plan.name}'; choose another with --out"
        )


def _entries(plan: Plan) -> Any:
    return plan.model_dump(mode="json", exclude={"entries": {"__all__": {"facts"}}})


def _facts(plan: Plan) -> dict[tuple[str, str], Facts]:
    return {(entry.method, entry.pair): entry.facts for entry in plan.entries}


def _complete(plan: Plan, results: Results) -> bool:
    return all(entry.facts.metric and entry.facts.status != FAILED for entry in plan.entries) and all(
        cell.digest in results for cell in cells(plan, results)
    )


def _stale(plan: Plan) -> list[str]:
    """In words, which data and teachers are no longer those that the plan was prepared with; each is looked at once."""
    first: dict[tuple[str, str], Entry] = {}
    for entry in plan.entries:
        first.setdefault((entry.pair, digest([entry.facts.data, entry.facts.teacher])), entry)
    told: dict[str, None] = {}
    for entry in first.values():
        found = prepare_pair([(entry.method, entry.trials[0].config)])[0][entry.method]
        if found.status == FAILED:
            told[f"{entry.pair}: {found.refused}"] = None
            continue
        then, now = ({**entry.origin.model_dump(), **_seen(facts)} for facts in (entry.facts, found))
        told |= {f"{entry.pair}: {line}": None for line in differences(now, then, "when it was prepared")}
    return list(told)


def _seen(facts: Facts) -> dict[str, Any]:
    return {"data": facts.data, "teacher": facts.teacher}


def _threads(plan: Plan) -> int:
    """The most CPU threads that one cell uses."""
    return max(int(entry.origin.machine["threads"]) for entry in plan.entries)


def _devices(plan: Plan) -> set[str]:
    return {str(pick_device(entry.trials[0].config["device"])) for entry in plan.entries}


def _prepare(plan: Plan, workers: int, live: Live) -> tuple[Plan, list[str]]:
    """Make each pair's data and teachers, once; the plan with what is then known."""
    live.say(f"preparing {len(plan.pairs)} pair{'s' * (len(plan.pairs) > 1)}: data and teachers")
    pairs = [
        [(entry.method, entry.trials[0].config) for entry in plan.entries if entry.pair == pair]
        for pair in plan.pairs
    ]
    made, modules = prepared(pairs, workers)
    facts = {}
    for pair, of_pair in zip(plan.pairs, made, strict=True):
        fine = [found for found in of_pair.values() if found.status != FAILED]
        for method, found in of_pair.items():
            judged = _judged(plan, pair, found if found in fine or not fine else _like(found, fine[0]))
            facts[method, pair] = judged
            if found.refused is not None:
                live.say(f"{found.status}: {method} on {pair}: {found.refused}")
    if all(found.status == FAILED for found in facts.values()):
        raise StillhouseError(f"nothing can be run: {next(iter(facts.values())).refused}")
    return plan.with_facts(facts), modules


def _like(failed: Facts, other: Facts) -> Facts:
    """The facts of a method that failed, with what is the same for all on its pair."""
    shared = {"metric": other.metric, "higher": other.higher, "metrics": other.metrics}
    return failed.model_copy(update=shared)


def _judged(plan: Plan, pair: str, found: Facts) -> Facts:
    """The facts with the metric that the study asks for."""
    wanted = found.metric if plan.metric is None else plan.metric.name
    if not found.metrics and found.status == FAILED:
        return found
    if not found.metrics:
        raise ConfigError(
            f"pair {pair}: its task has no labelled validation split; expected one, to choose and to judge by"
        )
    if wanted not in found.metrics:
        raise ConfigError(
            f"metric.name: the task of pair {pair} has no '{wanted}'{nearest(wanted, found.metrics)}"
        )
    higher = found.higher if plan.metric is None else plan.metric.better == "higher"
    return found.model_copy(update={"metric": wanted, "higher": higher})


def _run(plan: Plan, folder: Path, results: Results, executor: Executor, live: Live) -> list[str]:
    """Run every cell that has no result yet; their digests. Ctrl-C stops them and raises Stopped."""
    made: list[str] = []
    running: dict[str, Cell] = {}
    try:
        while True:
            for cell in _missing(plan, results, running, executor.workers - len(running)):
                executor.start(order(cell, directory.cell_folder(folder, cell.digest)))
                running[cell.digest] = cell
                live.started(cell)
            if not running:
                return made
            ended = executor.finished(TICK)
            live.tick()
            for done, code in ended:
                results[done.digest] = _result(done, code)
                made.append(done.digest)
                live.ended(running.pop(done.digest), results[done.digest])
    except KeyboardInterrupt:
        live.say(f"stopping: {executor.stopping}")
        executor.stop()
        raise Stopped(
            f"interrupted with {len(made)} cells finished and {len(running)} begun; go on with --resume"
        ) from None
    except WriteFailed as error:
        executor.stop()
        told = str(error) if "--resume" in str(error) else f"{error}: then go on with --resume"
        raise WriteFailed(told, error.errno) from error
    except BaseException:
        executor.stop()
        raise


def _missing(plan: Plan, results: Results, running: Mapping[str, Cell], room: int) -> list[Cell]:
    """The next cells, each once: two methods may share one."""
    if room <= 0:
        return []
    found: dict[str, Cell] = {}
    for cell in cells(plan, results):
        if cell.digest not in results and cell.digest not in running:
            found.setdefault(cell.digest, cell)
            if len(found) == room:
                break
    return list(found.values())


def _result(order: Order, code: int) -> dict[str, Any]:
    if code == UNWRITABLE:
        raise WriteFailed(last_words(Path(order.folder)))
    result = directory.read_result(Path(order.folder))
    if result is None:
        raise WriteFailed(f"{order.folder}: its result was written and can't be read")
    return result


def _of_same_study(plan: Plan, other: Path, folder: Path) -> Results:
    """The finished cells of another directory; CheckpointError where it is none of this study."""
    if other.resolve() == folder.resolve():
        raise CheckpointError(f"--merge {other}: got the study's own directory; expected another machine's")
    theirs_plan, theirs = load(other)
    _same_study(theirs_plan, plan, other)
    return {name: result for name, result in theirs.items() if result["status"] == DONE}


def _merge(plan: Plan, folder: Path, other: Path, done: Results, results: Results, live: Live) -> None:
    """Take over another directory's finished cells that this study needs, where all that made them is the same."""
    taken = 0
    while wanted := {cell.digest for cell in cells(plan, results)} & (set(done) - set(results)):
        for name in sorted(wanted):
            _copy(directory.cell_folder(other, name), directory.cell_folder(folder, name))
            results[name] = done[name]
            taken += 1
    live.say(f"{other}: {taken} finished cells taken over")
    needed = {_asked(cell.made_from): cell.made_from for cell in cells(plan, results)}
    reasons = set()
    for name in set(done) - set(results):
        ours = needed.get(_asked(done[name]["made_from"]))
        if ours is not None:
            reasons.add("; ".join(differences(ours, done[name]["made_from"])))
    if not taken and not reasons:
        reasons = _unlike(needed.values(), [done[name] for name in sorted(set(done) - set(results))])
    for reason in sorted(reasons):
        live.say(f"{other}: cells not taken over: {reason}")


def _unlike(needed: Collection[Mapping[str, Any]], done: Sequence[Mapping[str, Any]]) -> set[str]:
    """How another directory's first finished cell differs from the cell of this study that is most like it."""
    if not done or not needed:
        return set()
    theirs = done[0]["made_from"]["config"]
    found = min((config_differences(ours["config"], theirs) for ours in needed), key=len)
    told = ", ".join(f"{path} is {its!r} there, {ours!r} here" for path, ours, its in found)
    return {told or "they are of another phase"}


def _asked(made_from: Mapping[str, Any]) -> str:
    return digest({"config": made_from["config"], "test": made_from["test"]})


def _copy(source: Path, target: Path) -> None:
    """The directory, whole or not there."""
    beside = target.with_name(f".{target.name}")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, beside)
    beside.rename(target)
