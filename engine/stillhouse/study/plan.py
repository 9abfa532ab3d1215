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
from math import isfinite
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from stillhouse.config import STRICT, apply_override, dump
from stillhouse.config import validate as validate_run
from stillhouse.contract.metrics import known_direction, metric_behind
from stillhouse.contract.task import Task
from stillhouse.errors import ConfigError, nearest
from stillhouse.runs.directory import FREE
from stillhouse.runs.resolve import resolve
from stillhouse.study.origin import Origin, Sources
from stillhouse.study.schema import Metric, Study
from stillhouse.study.space import points

Phase = Literal["tuning", "final", "default"]
OPEN = tuple(key for key in FREE if key != "evaluate_batch_size")
"""Keys of a run's config that don't enter its figures (batches of another size move the last bits), or that stand in its
origin: the device and the threads in force."""


class Facts(BaseModel):
    """What is known of a method on a pair once its data and teacher are made.

    teacher, teacher_files
        The digest of its weights; the files of the cache that hold them, of each that was trained for the study.
    metric, higher, metrics
        The score that decides, whether more of it is better, and all that the task gives.
    refused, status
        Why no cell of it can be made there, and whether it is ``not applicable`` (a capability that the task lacks, models
        that don't fit) or ``failed`` in its preparation, as a plugin's mistake does.
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
    status: Literal["not applicable", "failed"] = "not applicable"

    @field_validator("teacher_scores", mode="before")
    @classmethod
    def _finite(cls, scores: Mapping[str, Any]) -> dict[str, Any]:
        """A score that is not finite is none."""
        return {
            name: value
            for name, value in scores.items()
            if isinstance(value, int | float) and isfinite(value)
        }

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
    origin
        What its figures are made from beside configs, data and teacher.
    """

    model_config = STRICT
    method: str
    pair: str
    given: dict[str, Any]
    trials: list[Trial]
    origin: Origin
    facts: Facts = Facts()

    @cached_property
    def made(self) -> dict[tuple[int, int, Phase], Cell]:
        """Its cells so far, by trial, seed and phase."""
        return {}

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries, by distribution."""
        return self.origin.versions

    def with_facts(self, facts: Facts) -> Entry:
        """The entry after preparation, its cells made anew."""
        return Entry.model_validate(dict(self) | {"facts": facts})


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
    """The cell with all that makes its figures: config, data, teacher, code, versions, machine.

    It is made once: who runs a study asks for all of them whenever one has ended.
    """
    key = (trial, seed, phase)
    if key not in entry.made:
        config = {**entry.trials[trial].config, "seed": seed}
        made_from = {
            "config": {key: value for key, value in config.items() if key not in OPEN},
            "test": phase != "tuning",
            "data": entry.facts.data,
            "teacher": entry.facts.teacher,
            **entry.origin.model_dump(),
        }
        entry.made[key] = Cell(entry.method, entry.pair, trial, seed, phase, config, made_from)
    return entry.made[key]


def cells(plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """Every cell that the results allow to run: those of tuning, and behind each finished tuning the reported ones.

    A tuning cell that was lost (``again``) holds the reported ones back: its setting has not had its turn.

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
        if all(answered(results.get(one.digest)) for one in tuning):
            best = chosen(plan, entry, results)
            if best is not None:
                found += [cell(entry, best, seed, "final") for seed in plan.fresh_seeds]
    return found


def answered(result: Mapping[str, Any] | None) -> bool:
    """Whether the cell has had its turn: it is done, or failed in a way that would repeat itself."""
    return result is not None and not result.get("again", False)


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
    """Each trial's mean validation score over the tuning seeds; None where a cell of it has none."""
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
    """A result's score, or None where the cell has none, or one that is not finite."""
    if result is None or result["status"] != "done":
        return None
    value = result["scores"].get(split, {}).get(metric)
    return None if value is None or not isfinite(value) else float(value)


def ended_by(result: Mapping[str, Any]) -> str:
    """What a cell that gave no figures was ended by: its error's message, or the error's type where it says nothing."""
    error = result["error"]
    return str(error["message"]).strip() or str(error["type"])


def of_study(study: Study) -> Plan:
    """The plan of a study's file. Loads every plugin and checks every setting of every trial; nothing is run.

    Raises ConfigError or PluginError with the method and pair that it is of.
    """
    entries, sources = [], Sources()
    for pair in study.pairs:
        for name, method in study.methods.items():
            given = {
                **study.common,
                **pair.config,
                **pair.keys(),
                **method.config,
                "steps": study.budget.updates,
            }
            trials = _trials(name, pair.name, given, method.search, study)
            entries.append(entry_of(name, pair.name, given, trials, sources))
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


def _trials(
    name: str, pair: str, given: Mapping[str, Any], search: Mapping[str, Any], study: Study
) -> list[Trial]:
    known: dict[str, dict[str, Any]] = {}

    def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            known[key] = _resolved(given, settings, f"method {name} on {pair}", study.metric)
        return known[key]

    def figures(settings: dict[str, Any]) -> str:
        """What enters the figures: settings that are one cell are one setting."""
        return json.dumps({k: v for k, v in resolved(settings).items() if k not in OPEN}, sort_keys=True)

    seed = study.seeds.tuning[0] if study.seeds.tuning else 0
    settings = points(search, study.budget.trials, name, seed, key=figures)
    return [Trial(settings=one, config=resolved(one)) for one in settings]


def entry_of(
    name: str, pair: str, given: Mapping[str, Any], trials: Sequence[Trial], sources: Sources
) -> Entry:
    """An entry with the origin of its figures."""
    origin = sources.of(trials[0].config)
    return Entry(method=name, pair=pair, given=dict(given), trials=list(trials), origin=origin)


def _resolved(
    given: Mapping[str, Any], settings: Mapping[str, Any], where: str, metric: Metric | None
) -> dict[str, Any]:
    content = copy.deepcopy(dict(given))
    try:
        for path, value in settings.items():
            apply_override(content, f"{path}={json.dumps(value)}")
        parts = resolve(validate_run(content))
        check_metric(metric, parts.task)
        return dump(parts.config)
    except ConfigError as error:
        tried = (
            f" with {', '.join(f'{path}={value}' for path, value in settings.items())}" if settings else ""
        )
        raise ConfigError(f"{where}{tried}: {error}") from None


def check_metric(metric: Metric | None, task: Task) -> None:
    """ConfigError for a score that the task does not have, or one that nobody says whether more of it is better.

    A metric called ``""`` tells its names only once there are scores, and a task whose own is ``""`` takes the first.
    """
    known = task.metrics()
    if metric is not None:
        name = metric.name
        if known and "" not in known and not {name, name.partition(".")[0]} & set(known):
            raise ConfigError(f"metric.name: the task has no '{name}'{nearest(name, known)}")
    elif task.metric and known_direction(task.metric, metric_behind(task.metric, known)) is None:
        raise ConfigError(
            f"whether more of the task's metric '{task.metric}' is better is not known; expected higher_is_better (True or "
            "False) of its metric object, or in a study's file metric: {name: "
            f"{task.metric}, better: higher}} or lower"
        )
