"""One run: task, teacher, student, stages, and a directory that explains itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from stillhouse.api import Task
from stillhouse.config import Named, RunConfig, dump
from stillhouse.contract.batch import Batch
from stillhouse.contract.context import STUDENT, TARGET
from stillhouse.contract.observers import RunRecord
from stillhouse.contract.splits import Splits
from stillhouse.errors import ConfigError
from stillhouse.files import write_bytes, write_json
from stillhouse.models.integrity import digest, freeze
from stillhouse.plugin.dispatch import Plugins
from stillhouse.runs import directory, page, teachers
from stillhouse.runs.display import Display
from stillhouse.runs.evaluate import Sealed, score
from stillhouse.runs.recorder import Interrupted, Recorder
from stillhouse.runs.resolve import Parts, builder_of, pick_device, resolve
from stillhouse.training.compatibility import OFFERED, check_fit
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
) -> Summary:
    """Make the run, or go on with it, and return what ``summary.json`` holds.

    splits
        How a task's data are made; a comparison hands the same data to all of its runs.
    """
    parts = resolve(config)
    display = display or Display()
    device = pick_device(config.device)
    data = splits(parts.task)
    data.validate()
    finished = directory.look(parts.config, resume=resume, overwrite=overwrite)
    if finished is not None:
        display.say(
            f"{config.run_dir} holds this run, finished; its figures are shown (--overwrite makes it again)"
        )
        return finished
    outside = RandomState.capture()
    try:
        with cpu_threads(config.threads):
            return train(parts, data, device, display, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:  # between updates: a teacher is trained, labels are taken, or it came twice
        raise Interrupted("interrupted; what was written before is whole: go on with --resume") from None
    finally:
        display.close()
        outside.restore()


def train(
    parts: Parts,
    data: Splits,
    device: torch.device,
    display: Display,
    *,
    resume: bool,
    overwrite: bool = False,
) -> Summary:
    """Teacher, models, stages, final scores: everything after the config and the data are known."""
    config, folder = parts.config, parts.folder
    sealed, data = Sealed(data.test), replace(data, test=None)
    teacher, teacher_facts = _teacher(parts, data, device, display.say)
    # The models are made right after seeding, in one order: methods compared start from the same weights.
    torch.manual_seed(config.seed)
    models = {role: parts.builders[role]().to(device) for role in (STUDENT, TARGET) if role in parts.builders}
    step = DistillStep(
        parts.methods,
        student=models[STUDENT],
        target=models.get(TARGET),
        teacher=teacher,
        probe=_probe(data, device),
        splits=data,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seed,
        dir=folder,
        offers=_offers(data),
        say=display.say,
        build=lambda spec: builder_of(Named.model_validate(dict(spec)), parts.task.students, "network")[
            0
        ]().to(device),
    )
    with closing(step):  # after an error too: nothing stays frozen, no hook stays on the caller's models
        for name, auxiliary in step.auxiliary.items():
            auxiliary.module.to(device)
            display.say(f"auxiliary module {name}: {_size(auxiliary.module):,} parameters")
        recorder = Recorder(config, parts.task, data.validation, device, display, folder, parts.observers)
        loop = Loop(step, data, config, device, recorder)
        manifest = directory.manifest(
            config,
            step.plugins,
            device,
            task=dump(config.task),
            data=data.fingerprint(),
            teacher=teacher_facts,
            stages=_stages(loop),
            parameters={name: _size(model) for name, model in step.run.models.items()},
            chosen=step.run.chosen,
        )
        if folder is not None:
            directory.claim(config, overwrite=overwrite)
            if resume:
                directory.same_origin(folder, manifest["data"], teacher_facts.get("digest"))
            write_json(folder / directory.MANIFEST, manifest)
            for observer in parts.observers:
                observer.on_run_start(RunRecord(config.name, folder, dump(config), manifest))
        if resume:
            at = recorder.resume(loop)
            display.say("no checkpoint yet: from the start" if at is None else f"resumed after update {at}")
        with recorder.interruptible():
            loop.run()
        step.plugins.notify("on_run_end", run=step.run)
        summary = _finish(parts, loop, recorder, sealed, manifest)
        for observer in parts.observers:
            observer.on_run_end(summary)
        return summary


@dataclass
class Prepared:
    """What runs of one config share.

    data
        Fingerprints of the splits.
    teacher
        The teacher's fingerprint and validation scores; empty without one.
    metric, metrics
        The score that the task is judged by, and all that it gives.
    refused
        Why the methods, the models and the task don't fit; None where they do. Then no teacher was trained.
    """

    data: dict[str, str]
    teacher: dict[str, Any]
    metric: str
    metrics: list[str]
    refused: str | None = None


def prepare(config: RunConfig, say: Callable[[str], None] = lambda message: None) -> Prepared:
    """Make the data and the teacher that runs of this config will find kept, and check that all of it fits.

    Raises what a run would raise before its first update, but for a misfit, which is told in ``refused``. No score of
    the test split is taken.
    """
    parts = resolve(config)
    device = pick_device(config.device)
    outside = RandomState.capture()
    try:
        with cpu_threads(config.threads):
            data = parts.task.splits()
            data.validate()
            found, data = data.fingerprint(), replace(data, test=None)
            models = {
                role: parts.builders[role]().to(device)
                for role in (STUDENT, TARGET)
                if role in parts.builders
            }
            metrics: list[str] = []
            if data.validation is not None and data.validation.labelled:
                metrics = list(score(parts.task, models[STUDENT], data.validation, device))
            untrained = parts.builders["teacher"]().to(device) if "teacher" in parts.builders else None
            try:
                check_fit(
                    Plugins(parts.methods),
                    models,
                    untrained,
                    _probe(data, device),
                    splits=data,
                    offers=_offers(data),
                )
            except ConfigError as error:
                return Prepared(found, {}, parts.task.metric, metrics, str(error))
            teacher = _teacher(parts, data, device, say)[1]
            return Prepared(found, teacher, parts.task.metric, metrics)
    finally:
        outside.restore()


def _teacher(
    parts: Parts, data: Splits, device: torch.device, say: Callable[[str], None]
) -> tuple[nn.Module | None, dict[str, Any]]:
    spec = parts.config.teacher
    facts: dict[str, Any]
    if parts.teacher is not None:
        model, facts = parts.teacher.to(device), {"found": "given", "digest": digest(parts.teacher)}
    elif "teacher" not in parts.builders or spec is None:
        return None, {}
    elif spec.checkpoint is not None:
        model = parts.builders["teacher"]().to(device)
        teachers.load(model, spec.checkpoint)
        facts = {"found": str(spec.checkpoint), "digest": digest(model)}
    else:
        settings = teachers.training(spec.train, parts.task).model_copy(
            update={"device": parts.config.device}
        )
        named = {"name": spec.name, **spec.settings}
        model, made = teachers.trained(
            parts.builders["teacher"],
            named,
            data,
            settings,
            device,
            say,
            before=lambda untrained: _check_models(parts, data, device, untrained),
        )
        facts = dict(made)
    if data.validation is not None and data.validation.labelled:
        facts["validation"] = score(parts.task, model, data.validation, device, teacher=True)
    return freeze(model), facts


def _check_models(parts: Parts, data: Splits, device: torch.device, teacher: nn.Module) -> None:
    """Refuse what doesn't fit before a teacher is trained for it."""
    with torch.random.fork_rng():
        models = {
            role: parts.builders[role]().to(device) for role in (STUDENT, TARGET) if role in parts.builders
        }
    plugins = Plugins(parts.methods)
    check_fit(plugins, models, teacher, _probe(data, device), splits=data, offers=_offers(data))


def _probe(data: Splits, device: torch.device) -> Batch:
    return data.train.batch(torch.arange(min(4, len(data.train)))).to(device)


def _offers(data: Splits) -> frozenset[str]:
    return OFFERED if data.train.labelled else OFFERED - {"labels"}


def _stages(loop: Loop) -> list[dict[str, Any]]:
    return [
        {
            "name": stage.name,
            "steps": steps,
            "data": stage.data,
            "model": stage.model,
            "teacher": stage.teacher,
            "train": ", ".join(loop.step.trained(stage)),
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
    model = loop.step.model(loop.step.stages[-1])
    seconds = recorder.elapsed()
    scores, test = {}, sealed.open()
    for name, split in (("validation", loop.splits.validation), ("test", test)):
        if split is not None:
            scores[name] = score(parts.task, model, split, device)
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
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(folder / directory.STUDENT, save(weights))
    page.curve(
        recorder.rows, parts.task.metric, folder / directory.CURVE, f"{config.name}, seed {config.seed}"
    )
    page.page(summary, manifest, folder / directory.REPORT)
    write_json(folder / directory.SUMMARY, summary)  # last: its presence says that the run is finished
    return summary


def _warnings(
    task: Task, scores: Mapping[str, Mapping[str, float]], manifest: Mapping[str, Any]
) -> list[str]:
    teacher = manifest["teacher"].get("validation")
    if not teacher or "validation" not in scores:
        return []
    source, own = teacher[task.metric], scores["validation"][task.metric]
    if source > own:
        return []
    return [
        f"the teacher's validation {task.metric} ({source:.4f}) is no better than the trained model's "
        f"({own:.4f}): distilling from it may hurt; compare with method hard_labels"
    ]
