"""What a study runs: a cell for each trial and seed, named by the digest of what makes it.

A plan is plain values: it is kept in the study's directory, and everything after it (running, resuming, merging, the
report) is a function of the plan and of the results that are there.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, Field, PrivateAttr

from stillhouse.config import STRICT, apply_override, dump
from stillhouse.config import validate as validate_run
from stillhouse.errors import ConfigError
from stillhouse.plugin.catalog import find
from stillhouse.runs.directory import FREE
from stillhouse.runs.resolve import pick_device, resolve
from stillhouse.study.schema import Metric, Study
from stillhouse.study.space import points

Phase = Literal["tuning", "final", "default"]
LIBRARIES = ("stillhouse", "torch", "numpy", "numba")
"""Whose version is part of what makes a cell, beside the plugins' own distributions."""
OPEN = tuple(key for key in FREE if key not in ("threads", "device", "evaluate_batch_size"))
"""Keys of a run's config that don't enter its figures; threads and batches of another size move the last bits."""


class Facts(BaseModel):
    """What is known of a method on a pair once its data and teacher are made.

    teacher, teacher_files
        The digest of its weights; the files of the cache that hold them, of each that was trained for the study.
    metric, higher, metrics
        The score that decides, whether more of it is better, and all that the task gives.
    refused
        Why it can't run there: a capability that the task lacks, models that don't fit.
    """

    model_config = STRICT
    data: dict[str, str] = Field(default_factory=dict)
    teacher: str | None = None
    teacher_files: list[str] = Field(default_factory=list)
    teacher_scores: dict[str, float] = Field(default_factory=dict)
    metric: str = ""
    higher: bool = True
    metrics: list[str] = Field(default_factory=list)
    refused: str | None = None

    def better(self, one: float, other: float) -> bool:
        """Whether the first score is the better one."""
        return one > other if self.higher else one < other


class Trial(BaseModel):
    """One setting of a method on a pair: what was asked for, and the run's config with every default filled in."""

    model_config = STRICT
    settings: dict[str, Any]
    config: dict[str, Any]


class Entry(BaseModel):
    """A method on a pair.

    given
        The keys of its runs as the study's file has them.
    """

    model_config = STRICT
    method: str
    pair: str
    given: dict[str, Any]
    trials: list[Trial]
    versions: dict[str, str]
    device: str
    facts: Facts = Facts()
    _cells: dict[tuple[int, int, Phase], Cell] = PrivateAttr(default_factory=dict)

    def with_facts(self, facts: Facts) -> Entry:
        """The entry after preparation, its cells made anew."""
        return Entry.model_validate(dict(self) | {"facts": facts})

    def cell(self, trial: int, seed: int, phase: Phase) -> Cell:
        """The cell, made once: who runs a study asks for all of them whenever one has ended."""
        key = (trial, seed, phase)
        if key not in self._cells:
            self._cells[key] = _cell(self, *key)
        return self._cells[key]


class Plan(BaseModel):
    """A study, with every config resolved."""

    model_config = STRICT
    name: str
    question: str
    baseline: str
    metric: Metric | None
    updates: int
    tuned: bool
    defaults: bool
    tuning_seeds: list[int]
    fresh_seeds: list[int]
    titles: dict[str, str]
    spaces: dict[str, dict[str, Any]]
    pairs: list[str]
    entries: list[Entry]
    remarks: list[str] = Field(default_factory=list)

    def entry(self, method: str, pair: str) -> Entry:
        """The method on the pair."""
        return next(entry for entry in self.entries if (entry.method, entry.pair) == (method, pair))

    def with_facts(self, facts: Mapping[tuple[str, str], Facts]) -> Plan:
        """The plan after preparation, by method and pair."""
        entries = [entry.with_facts(facts[entry.method, entry.pair]) for entry in self.entries]
        return self.model_copy(update={"entries": entries})


@dataclass(frozen=True)
class Cell:
    """One run: a method on a pair with one setting and one seed.

    config
        The run's config, with the keys that don't enter its figures.
    made_from
        All that enters them.
    """

    method: str
    pair: str
    trial: int
    seed: int
    phase: Phase
    config: dict[str, Any]
    made_from: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """Names the cell's directory: equal for whatever gives equal figures."""
        return digest(self.made_from)

    @property
    def test(self) -> bool:
        """Whether the test split is opened at its end; a tuning cell is not given one."""
        return self.phase != "tuning"


def digest(content: Any) -> str:
    """16 hexadecimal digits of JSON-ready values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def cell(entry: Entry, trial: int, seed: int, phase: Phase) -> Cell:
    """The cell with all that makes its figures: config, data, teacher, versions, device."""
    return entry.cell(trial, seed, phase)


def _cell(entry: Entry, trial: int, seed: int, phase: Phase) -> Cell:
    config = {**entry.trials[trial].config, "seed": seed}
    made_from = {
        "config": {
            **{key: value for key, value in config.items() if key not in OPEN},
            "device": entry.device,
        },
        "test": phase != "tuning",
        "data": entry.facts.data,
        "teacher": entry.facts.teacher,
        "versions": entry.versions,
    }
    return Cell(entry.method, entry.pair, trial, seed, phase, config, made_from)


def cells(plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """Every cell that the results allow to run: those of tuning, and behind each finished tuning the reported ones.

    results
        By digest, what the cells that are there gave.
    """
    found: list[Cell] = []
    for entry in plan.entries:
        if entry.facts.refused is not None:
            continue
        tuning = list(tuning_cells(plan, entry))
        found += tuning
        if plan.defaults:
            found += [cell(entry, 0, seed, "default") for seed in plan.fresh_seeds]
        if all(one.digest in results for one in tuning):
            best = chosen(plan, entry, results)
            if best is not None:
                found += [cell(entry, best, seed, "final") for seed in plan.fresh_seeds]
    return found


def expected(plan: Plan) -> int:
    """How many cells there will be at most."""
    each = len(plan.fresh_seeds) * (2 if plan.defaults else 1)
    tuning = len(plan.tuning_seeds) if plan.tuned else 0
    return sum(each + tuning * len(entry.trials) for entry in plan.entries if entry.facts.refused is None)


def tuning_cells(plan: Plan, entry: Entry) -> Iterator[Cell]:
    """The cells whose validation scores choose the entry's setting; none where it isn't tuned."""
    if plan.tuned:
        for trial in range(len(entry.trials)):
            for seed in plan.tuning_seeds:
                yield cell(entry, trial, seed, "tuning")


def trial_scores(plan: Plan, entry: Entry, results: Mapping[str, Mapping[str, Any]]) -> list[float | None]:
    """Each trial's mean validation score over the tuning seeds; None where a cell of it failed or is not there."""
    made: dict[int, list[float | None]] = {}
    for one in tuning_cells(plan, entry):
        made.setdefault(one.trial, []).append(
            score(results.get(one.digest), "validation", entry.facts.metric)
        )
    return [
        None
        if any(value is None for value in values)
        else fmean(value for value in values if value is not None)
        for _, values in sorted(made.items())
    ]


def chosen(plan: Plan, entry: Entry, results: Mapping[str, Mapping[str, Any]]) -> int | None:
    """The trial with the best validation score, the earliest of equals; None where all failed."""
    if not plan.tuned:
        return 0
    best: int | None = None
    scores = trial_scores(plan, entry, results)
    for number, value in enumerate(scores):
        if value is None:
            continue
        before = None if best is None else scores[best]
        if before is None or entry.facts.better(value, before):
            best = number
    return best


def score(result: Mapping[str, Any] | None, split: str, metric: str) -> float | None:
    """A result's score, or None where the cell has none."""
    if result is None or result["status"] != "done":
        return None
    value = result["scores"].get(split, {}).get(metric)
    return None if value is None else float(value)


def of_study(study: Study) -> Plan:
    """The plan of a study's file. Loads every plugin and checks every setting of every trial; nothing is run.

    Raises ConfigError or PluginError with the method and pair that it is of.
    """
    entries = []
    for pair in study.pairs:
        models = {
            key: dump(value)
            for key in ("task", "teacher", "student", "target")
            if (value := getattr(pair, key)) is not None
        }
        for name, method in study.methods.items():
            given = {**study.common, **pair.config, **models, **method.config, "steps": study.budget.updates}
            entries.append(_entry(name, pair.name, given, method.search, study.budget.trials))
    return Plan(
        name=study.name,
        question=study.question,
        baseline=study.baseline,
        metric=study.metric,
        updates=study.budget.updates,
        tuned=study.budget.trials > 0,
        defaults=study.defaults and study.budget.trials > 0,
        tuning_seeds=study.seeds.tuning,
        fresh_seeds=study.seeds.fresh,
        titles={name: method.title or name for name, method in study.methods.items()},
        spaces={name: method.model_dump(mode="json")["search"] for name, method in study.methods.items()},
        pairs=[pair.name for pair in study.pairs],
        entries=entries,
    )


def _entry(name: str, pair: str, given: Mapping[str, Any], search: Mapping[str, Any], trials: int) -> Entry:
    known: dict[str, dict[str, Any]] = {}

    def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            known[key] = _resolved(given, settings, f"method {name} on {pair}")
        return known[key]

    settings = points(search, trials, name, key=lambda one: json.dumps(resolved(one), sort_keys=True))
    made = [Trial(settings=one, config=resolved(one)) for one in settings]
    return entry_of(name, pair, given, made)


def entry_of(name: str, pair: str, given: Mapping[str, Any], trials: Sequence[Trial]) -> Entry:
    """An entry with the versions that its figures depend on."""
    config = trials[0].config
    return Entry(
        method=name,
        pair=pair,
        given=dict(given),
        trials=list(trials),
        versions=versions(config),
        device=str(pick_device(config["device"])),
    )


def _resolved(given: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = copy.deepcopy(dict(given))
    try:
        for path, value in settings.items():
            apply_override(content, f"{path}={json.dumps(value)}")
        return dump(resolve(validate_run(content)).config)
    except ConfigError as error:
        tried = (
            f" with {', '.join(f'{path}={value}' for path, value in settings.items())}" if settings else ""
        )
        raise ConfigError(f"{where}{tried}: {error}") from None


def versions(config: Mapping[str, Any]) -> dict[str, str]:
    """Versions of the libraries and of the plugins' distributions that a config's figures depend on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    methods = [config["method"]] if config.get("method") else config["methods"]
    for kind, spec in [("task", config["task"]), *(("method", method) for method in methods)]:
        entry = find(kind, spec["name"])  # type: ignore[arg-type]
        found[entry.distribution] = entry.version
    return dict(sorted(found.items()))
