"""One run: task, teacher, student, stages, and a directory that explains itself."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.api import Task
from stillhouse.config import Named, RunConfig, dump
from stillhouse.contract.batch import Batch
from stillhouse.contract.context import STUDENT, TARGET
from stillhouse.contract.metrics import higher_is_better, metric_behind
from stillhouse.contract.observers import RunRecord
from stillhouse.contract.splits import Splits
from stillhouse.errors import Diverged, WriteFailed
from stillhouse.files import digest as file_digest
from stillhouse.files import write_bytes, write_json
from stillhouse.files.lock import Lock
from stillhouse.files.tensors import tensor_bytes
from stillhouse.runs import contents, directory, page, stored, weights
from stillhouse.runs.answering import teacher_of
from stillhouse.runs.display import Display
from stillhouse.runs.evaluate import Sealed, check_score, score
from stillhouse.runs.interrupts import Interrupted
from stillhouse.runs.recorder import Recorder
from stillhouse.runs.rehearsal import offers, rehearse
from stillhouse.runs.resolve import Parts, builder_of, pick_device, resolve
from stillhouse.training.loop import Loop
from stillhouse.training.random_state import RandomState
from stillhouse.training.step import DistillStep

Summary = dict[str, Any]


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """``count`` CPU threads (None: torch's); the caller's number is put back."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
    splits: Callable[[Task], Splits] = lambda task: task.splits(),
    picture: bool = True,
) -> Summary:
    """Make the run, or go on with it, and return what ``summary.json`` holds.

    splits
        How a task's data are made; a comparison hands the same data to all of its runs.
    picture
        Whether the learning curve is drawn; a study's report has the curves of all of its runs.
    """
    parts = resolve(config)
    parts.picture = picture
    display = display or Display()
    device = pick_device(config.device)
    data = splits(parts.task)
    data.validate()
    summary, found = make(parts, data, device, display, resume=resume, overwrite=overwrite)
    if found:
        display.say(
            f"{config.run_dir} holds this run, finished; its figures are shown (--overwrite makes it again)"
        )
    return summary


def make(
    parts: Parts, data: Splits, device: torch.device, display: Display, *, resume: bool, overwrite: bool
) -> tuple[Summary, bool]:
    """Train while holding the directory's lock, or find the run finished there.

    Returns its summary, and whether it was there. The caller's random generators and threads are as they were.
    """
    outside = RandomState.capture()
    try:
        with cpu_threads(parts.config.threads):
            if parts.folder is None:
                return train(parts, data, device, display, resume=resume), False
            finished = directory.look(parts.config, resume=resume, overwrite=overwrite)
            if finished is not None:
                return finished, True
            with Lock(parts.folder) as parts.lock:  # and look again: it may have been another's until now
                finished = directory.look(parts.config, resume=resume, overwrite=overwrite, say=display.say)
                if finished is not None:
                    return finished, True
                if parts.rebuilt:
                    rehearse(parts, data, device)
                return train(parts, data, device, display, resume=resume, overwrite=overwrite), False
    except (
        KeyboardInterrupt
    ) as ended:  # between updates: a teacher is trained, labels are taken, or it came twice
        raise Interrupted(
            "interrupted; what was written before is whole: go on with --resume",
            getattr(ended, "number", signal.SIGINT),
        ) from None
    except WriteFailed as error:
        if parts.folder is not None and "--resume" not in str(error):
            raise WriteFailed(f"{error}: then go on with --resume", error.errno) from error
        raise
    finally:
        display.close()
        outside.restore()


def train(
    parts: Parts,
    data: Splits,
    device: torch.device,
    display: Display,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Teacher, models, stages, final scores: everything after the config and the data are known."""
    config, folder = parts.config, parts.folder
    sealed, data = Sealed(data.test), replace(data, test=None)
    teacher, teacher_facts = teacher_of(parts, data, device, display.say)
    # The models are made right after seeding, in one order: methods compared start from the same weights.
    torch.manual_seed(config.seed)
    models = {role: parts.builders[role]().to(device) for role in (STUDENT, TARGET) if role in parts.builders}
    step = DistillStep(
        parts.methods,
        student=models[STUDENT],
        target=models.get(TARGET),
        teacher=teacher,
        probe=_probe(data, device),
        task=parts.task.kind,
        splits=data,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seed,
        dir=folder,
        offers=offers(data),
        say=display.say,
        soft_labels=parts.soft_labels,
        build=lambda spec: builder_of(Named.model_validate(dict(spec)), parts.task.students, "network")[
            0
        ]().to(device),
    )
    with closing(step):  # after an error too: nothing stays frozen, no hook stays on the caller's models
        stored.check_stages(step, data)
        for name, auxiliary in step.auxiliary.items():
            display.say(f"auxiliary module {name}: {_size(auxiliary.module):,} parameters")
        final = step.model(step.stages[-1])
        if folder is not None:
            weights.check_saveable(final)
        check_score(parts.task, final, data, device)
        if step.kind.labels == "classes":
            sealed.check_labels(step.batches.classes)
        fingerprints = data.fingerprint()
        origin = directory.origin(fingerprints, teacher_facts)
        recorder = Recorder(
            config, parts.task, data.validation, device, display, folder, parts.observers, origin, parts.lock
        )
        loop = Loop(step, data, config, device, recorder)
        manifest = directory.manifest(
            config,
            step.plugins,
            device,
            writes=contents.declared([*(plugin.method for plugin in parts.methods), *parts.observers]),
            task=dump(config.task),
            data=fingerprints,
            teacher=teacher_facts,
            stages=_stages(loop),
            parameters={name: _size(model) for name, model in step.run.models.items()},
            chosen=step.run.chosen,
        )
        with _told(parts, manifest) as failing:
            if folder is not None:
                _begin(folder, parts, manifest, recorder, loop, resume=resume, overwrite=overwrite)
            try:
                with recorder.interrupts.caught():
                    loop.run()
            except Diverged as error:
                failing(recorder.diverged(loop, error))
                raise recorder.advised(error) from error
            step.plugins.notify("on_run_end", run=step.run)
            summary = _finish(parts, loop, recorder, sealed, manifest)
            for observer in parts.observers:
                observer.on_run_end(summary)
        return summary


def _begin(
    folder: Path,
    parts: Parts,
    manifest: dict[str, Any],
    recorder: Recorder,
    loop: Loop,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Claim the directory, tell the observers, and take up the last checkpoint where there is one."""
    config, say = parts.config, recorder.display.say
    if resume and (before := directory.kept(folder)) is not None:
        origin = directory.origin(before["data"], before["teacher"])
        directory.same_origin(folder, origin, recorder.origin)
    kept = directory.claim(config, manifest, overwrite=overwrite)
    for observer in parts.observers:
        observer.on_run_start(RunRecord(config.name, folder, dump(config), manifest))
    if not resume:
        return
    changed, versions = directory.changes(kept, manifest)
    again = kept is not None and directory.diverged(kept) and bool(changed)
    free, upto = directory.retreat(kept) if again and kept is not None else ((), float("inf"))
    at = recorder.resume(loop, free=free, upto=upto)
    say("no checkpoint yet: from the start" if at is None else f"resumed after update {at}")
    for name, (old, new) in {**changed, **versions}.items():
        say(
            f"not as before: {name} was {old}, is {new}{' (the last bits may differ)' if name in versions else ''}"
        )
    manifest["history"].append({"event": "resumed", "at": at or 0, "changed": changed, "versions": versions})
    write_json(folder / directory.MANIFEST, manifest, sealed=True)


@contextmanager
def _told(parts: Parts, manifest: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Tell the observers where the run fails; the yielded function writes an event down in the manifest's history."""

    def write(event: dict[str, Any]) -> None:
        manifest["history"].append(event)
        if parts.folder is not None:
            with suppress(WriteFailed):  # the error that is being raised says more
                write_json(parts.folder / directory.MANIFEST, manifest, sealed=True)

    try:
        yield write
    except BaseException as error:
        for observer in parts.observers:
            with suppress(Exception):  # one that fails here too would hide the error
                observer.on_run_failed(error)
        raise


def _probe(data: Splits, device: torch.device) -> Batch:
    return data.train.probe(4).to(device)


def _stages(loop: Loop) -> list[dict[str, Any]]:
    return [
        {
            "name": stage.name,
            "steps": steps,
            "data": stage.data,
            "model": stage.model,
            "teacher": stage.teacher,
            "train": ", ".join(loop.step.modules.of(stage)),
        }
        for stage, steps in zip(loop.step.stages, loop.lengths, strict=True)
    ]


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _finish(
    parts: Parts,
    loop: Loop,
    recorder: Recorder,
    sealed: Sealed,
    manifest: dict[str, Any],
) -> Summary:
    """Score the final model, open the test split (once), and write what the run leaves behind."""
    config, folder, device = parts.config, parts.folder, loop.device
    recorder.check_place()
    model = loop.step.model(loop.step.stages[-1])
    seconds = recorder.elapsed()
    scores, test = {}, sealed.open()
    for name, split in (("validation", loop.splits.validation), ("test", test)):
        if split is not None:
            scores[name] = score(parts.task, model, split, device, config=config, like=loop.splits.train)
    summary: Summary = {
        "name": config.name,
        "methods": [plugin.name for plugin in parts.methods],
        "task": config.task.name,
        "metric": parts.task.metric,
        "seed": config.seed,
        "steps": loop.at.step,
        "batch_size": config.batch_size,
        "scores": scores,
        "teacher": manifest["teacher"].get("validation"),
        "teacher_calls": loop.step.teacher_calls,
        "parameters": manifest["parameters"],
        "seconds": round(seconds, 2),
        "test_opened": sealed.opened,
        "warnings": _warnings(parts.task, scores, manifest),
        "dir": None if folder is None else str(folder),
    }
    if folder is None:
        return summary
    write_bytes(folder / directory.STUDENT, tensor_bytes(weights.plain_state(model)))
    if parts.picture:
        page.curve(
            recorder.metrics.rows,
            parts.task.metric,
            folder / directory.CURVE,
            f"{config.name}, seed {config.seed}",
        )
    if contents.is_our_page(folder / directory.REPORT):
        page.page(summary, manifest, folder / directory.REPORT)
    else:
        recorder.display.say(f"{folder / directory.REPORT} is somebody's, and is left as it is")
    names = (directory.STUDENT, directory.METRICS, directory.CURVE, directory.REPORT)
    summary["files"] = {name: file_digest(folder / name) for name in names if (folder / name).is_file()}
    write_json(
        folder / directory.SUMMARY, summary, sealed=True
    )  # last: its presence says that the run is finished
    return summary


def _warnings(
    task: Task, scores: Mapping[str, Mapping[str, float]], manifest: Mapping[str, Any]
) -> list[str]:
    teacher = manifest["teacher"].get("validation")
    if not teacher or "validation" not in scores:
        return []
    source, own = teacher[task.metric], scores["validation"][task.metric]
    higher = higher_is_better(task.metric, metric_behind(task.metric, task.metrics()))
    if (source > own) == higher and source != own:
        return []
    return [
        f"the teacher's validation {task.metric} ({source:.4f}) is no better than the trained model's "
        f"({own:.4f}): distilling from it may hurt; compare with method hard_labels"
    ]
