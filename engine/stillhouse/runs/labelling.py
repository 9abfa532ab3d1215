"""``stillhouse label``: a config's teacher over its data, its answers kept.

stillhouse label CONFIG|NAME --out DIR [--form topk --k 64] [--workers N]
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stillhouse.config import RunConfig
from stillhouse.contract.kinds import KINDS, TaskKind
from stillhouse.contract.splits import Split, Splits
from stillhouse.errors import ConfigError, MissingExtra, StillhouseError
from stillhouse.models.integrity import freeze, stochastic_module
from stillhouse.models.served import Served
from stillhouse.plugin.dispatch import Plugins
from stillhouse.runs import teachers
from stillhouse.runs.resolve import Parts, pick_device, resolve
from stillhouse.softlabels import Form
from stillhouse.softlabels.fingerprint import tokenizer_digest
from stillhouse.softlabels.holding import held
from stillhouse.softlabels.label import Asking, Recipe, find_head
from stillhouse.softlabels.places import place, sealed
from stillhouse.softlabels.store import STORE, StoredLabels
from stillhouse.softlabels.writer import Plan, Range, compare, labelled, make, plan, size


@dataclass(frozen=True)
class Options:
    """What the command line says beside the config. None: by the number of outputs, see ``Form.choose``."""

    form: str | None = None
    k: int | None = None
    dtype: str | None = None
    packed: bool = False
    features: tuple[str, ...] = ()
    head: str = ""
    data: str = "all"
    batch_size: int = 64
    shard_samples: int | None = None
    workers: int = 1
    ray: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Labelled:
    """What came of it: the store, the samples that were labelled now, its size, and how near to exact it is."""

    labels: StoredLabels
    made: int
    bytes: int
    seconds: float
    fidelity: dict[str, float] = field(default_factory=dict)


@dataclass
class Setting:
    """A teacher and the data that it labels, made from a config; each worker makes its own."""

    asking: Asking
    split: Split
    recipe: Recipe
    tokenizer: str


def label(
    config: RunConfig, out: str, options: Options, say: Callable[[str], None] = lambda message: None
) -> Labelled:
    """Label a config's data into ``out``, a directory or a URI; go on where an earlier call ended.

    Raises ConfigError, DataError or CheckpointError before anything is written where something doesn't fit, and InUse where
    somebody else writes there.
    """
    started = time.monotonic()
    where = place(out)
    setting = set_up(config, options, say)
    with setting.asking, held(where):
        about = {"config": config.name, "data": options.data}
        made = plan(
            where, setting.asking, setting.split, setting.recipe, tokenizer=setting.tokenizer,
            shard_samples=options.shard_samples, about=about,
        )  # fmt: skip
        _announce(made, say)
        written = sum(part.stop - part.first for part in made.todo)
        try:
            for number, manifest in enumerate(_work(made, setting, config, options)):
                say(f"{manifest['file']}: {size(manifest['bytes'])} ({number + 1} of {len(made.todo)})")
        except KeyboardInterrupt:
            raise StillhouseError(
                "interrupted; what was published is whole: the same command goes on from there"
            ) from None
        labels = StoredLabels(where)
        labels.check_whole()
        total = sum(int(manifest["bytes"]) for manifest in labels.manifests)
        fidelity = labels.about.get("fidelity") or {}
        if written or not fidelity:
            fidelity = compare(labels, setting.asking, setting.split, options.batch_size)
            where.write(STORE, sealed({**labels.about, "fidelity": fidelity}))
    return Labelled(labels, written, total, time.monotonic() - started, fidelity)


def _announce(made: Plan, say: Callable[[str], None]) -> None:
    for problem in made.damaged:
        say(f"to be made again: {problem}")
    if made.done:
        say(f"{made.done:,} of {made.total:,} samples are there already")
    say(
        f"{made.recipe.form}: {made.total - made.done:,} samples in {len(made.todo)} shards, about "
        f"{size(made.expected_bytes)}{' before packing' if made.recipe.form.packed else ''}"
    )


def set_up(config: RunConfig, options: Options, say: Callable[[str], None]) -> Setting:
    """The config's teacher and data. The teacher is read, or trained once and kept, as for a run."""
    parts = resolve(config)
    if Plugins(parts.methods).implements("batch_transform"):
        raise ConfigError(
            "a method of this config changes the inputs at random, and a kept label belongs to inputs as they are; leave that "
            "method out"
        )
    splits = parts.task.splits()
    splits.validate()
    split = splits.stage(options.data)
    device = pick_device(config.device)
    teacher, kind = _teacher(parts, splits, device, options, say), KINDS[parts.task.kind]
    probe = split.batch(torch.arange(min(2, len(split)))).to(device)
    if not isinstance(teacher, Served):
        stochastic = stochastic_module(teacher, probe.for_teacher, kind)
        if stochastic is not None:
            raise ConfigError(
                f"the teacher gave two answers to one batch: {stochastic} is stochastic; expected one that is not"
            )
    form, head = _form(teacher, probe, options, device, kind)
    recipe = Recipe(form, options.batch_size, options.seed, options.features, head=head)
    tokenizer = tokenizer_digest(getattr(parts.task, "tokenizer", None))
    return Setting(Asking(teacher, device, options.features, head, kind), split, recipe, tokenizer)


def _form(
    teacher: nn.Module, probe: Any, options: Options, device: torch.device, kind: TaskKind
) -> tuple[Form, str]:
    width, head = 0, ""
    if options.form == "hidden":
        head, module = find_head(teacher, options.head)
        width = module.in_features
        own = str(module.weight.dtype).removeprefix("torch.")
        form = Form.choose(module.out_features, "hidden", options.dtype or own, options.k, width=width)
        return form, head
    with Asking(teacher, device, kind=kind) as asking:
        answer = asking.ask(probe).answer
    if isinstance(answer, torch.Tensor):
        return Form.choose(
            answer.shape[-1], options.form, options.dtype, options.k, packed=options.packed
        ), head
    outputs, k = int(getattr(teacher, "outputs", 0)), answer.indices.shape[-1]
    return Form.choose(
        outputs or 2**24, options.form or "topk", options.dtype, options.k or k, packed=options.packed
    ), head


def _teacher(
    parts: Parts, splits: Splits, device: torch.device, options: Options, say: Callable[[str], None]
) -> nn.Module:
    spec = parts.config.teacher
    if parts.config.teachers:
        raise ConfigError(
            f"teachers: got {len(parts.config.teachers)}; expected one teacher, for labels are bound to what gave them"
        )
    if spec is None or "teacher" not in parts.builders:
        raise ConfigError(
            "this config's methods take no teacher; expected a config with one, such as mnist1d-kd"
        )
    if spec.checkpoint is not None:
        model = parts.builders["teacher"]().to(device)
        teachers.load(model, spec.checkpoint)
        return freeze(model)
    with torch.random.fork_rng():
        untrained = parts.builders["teacher"]()
    with Asking(untrained, device, options.features):
        pass  # names of modules that are not there are refused before it is trained
    if options.form == "hidden" and not isinstance(untrained, Served):
        find_head(untrained, options.head)
    if isinstance(untrained, Served):
        return freeze(untrained)
    settings = teachers.training(spec.train, parts.task).model_copy(update={"device": parts.config.device})
    named = {"name": spec.name, **spec.settings}
    model, _ = teachers.trained(
        parts.builders["teacher"], named, splits, settings, device, say, parts.task.kind
    )
    return freeze(model)


# Workers: each makes its own teacher, and writes whole ranges.


def _work(made: Plan, setting: Setting, config: RunConfig, options: Options) -> Iterator[dict[str, Any]]:
    if options.ray:
        return _by_ray(made, config, options)
    if options.workers > 1 and len(made.todo) > 1:
        return _by_processes(made, config, options)
    return labelled(made, setting.asking, setting.split)


_mine: Setting | None = None
"""In a worker process: its teacher and data."""


def _begin(config: RunConfig, options: Options) -> None:
    global _mine  # noqa: PLW0603 a pool's initializer has nowhere else to leave it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _mine = set_up(config, options, lambda message: None)


def _end_with_parent() -> None:
    """A killed parent takes its workers with it: they would write into a directory that nobody holds."""
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _one(made: Plan, part: Range) -> dict[str, Any]:
    assert _mine is not None
    return make(made, _mine.asking, _mine.split, part)


def _by_processes(made: Plan, config: RunConfig, options: Options) -> Iterator[dict[str, Any]]:
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    count = min(options.workers, len(made.todo))
    pool = ProcessPoolExecutor(count, get_context("spawn"), _begin, (config, options))
    try:
        waiting = [pool.submit(_one, made, part) for part in made.todo]
        for done in as_completed(waiting):
            yield done.result()
    except BrokenProcessPool:
        raise StillhouseError(
            "a worker process died (out of memory?); what was published is whole: run the same command again, with fewer "
            "--workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _by_ray(made: Plan, config: RunConfig, options: Options) -> Iterator[dict[str, Any]]:
    try:
        import ray
    except ImportError:
        raise MissingExtra("labelling on many machines", "ray", "ray") from None

    started = not ray.is_initialized()
    if started:
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)

    class Worker:
        def __init__(self) -> None:
            self.setting = set_up(config, options, lambda message: None)

        def make(self, part: Range) -> dict[str, Any]:
            return make(made, self.setting.asking, self.setting.split, part)

    try:
        count = min(max(1, options.workers), max(1, len(made.todo)))
        workers = [ray.remote(Worker).remote() for _ in range(count)]
        pool = ray.util.ActorPool(workers)
        yield from pool.map_unordered(lambda worker, part: worker.make.remote(part), made.todo)
    except ray.exceptions.RayTaskError as error:
        raise StillhouseError(f"a Ray worker failed: {error.cause}") from None
    finally:
        if started:
            ray.shutdown()
