"""STUDY.yaml: a question, methods, pairs, seeds and a budget. Unknown keys are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal
from unicodedata import category

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from stillhouse.config import (
    STRICT,
    Named,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    UserPlace,
    dump,
    explain,
    parse,
)
from stillhouse.errors import ConfigError, nearest

NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$"
NAMED = "expected up to 100 letters, digits and . _ + -, of which a letter or a digit comes first"
SEED = Field(strict=True, ge=0, lt=2**32)
"""As a run has them."""
OWN_KEYS = ("name", "out", "seed")
"""Keys of a run's config that a study sets for each of its cells."""
BUDGET_KEYS = ("steps", "batch_size")
"""Keys that say how much a run may learn from: the same for all methods."""
PAIR_KEYS = ("task", "teacher", "teachers", "soft_labels", "student", "target")
"""Keys that say what is distilled into what: the same for all methods on a pair."""


class Range(BaseModel):
    """Numbers between two ends."""

    model_config = STRICT
    low: float
    high: float
    log: bool = Field(False, description="Even in the logarithm.")

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"low {self.low:g}, high {self.high:g}: expected low < high, and above 0 where log is true"
            )
        return self


class Budget(BaseModel):
    """What every method may use, the same for all."""

    model_config = STRICT
    updates: int = Field(gt=0, description="Student updates of every cell.")
    trials: int = Field(
        0,
        ge=0,
        description="Settings tried for each method and pair, the given ones among them; 0: no tuning.",
    )


class Seeds(BaseModel):
    """Seeds to choose settings with, and others to report."""

    model_config = STRICT
    tuning: list[Annotated[int, SEED]] = Field(default_factory=list, description="Seeds of every trial.")
    fresh: list[Annotated[int, SEED]] = Field(
        min_length=1, description="Seeds of the reported cells; none of the tuning seeds."
    )

    @model_validator(mode="after")
    def _apart(self) -> Seeds:
        both = [*self.tuning, *self.fresh]
        if len(set(both)) < len(both):
            raise ValueError(
                f"seeds {both}: expected each once, and none of the tuning seeds among the fresh"
            )
        return self


class Metric(BaseModel):
    """A key of the task's scores other than its own metric."""

    model_config = STRICT
    name: str
    better: Literal["higher", "lower"]


class Pair(BaseModel):
    """A task with a teacher and a student."""

    model_config = STRICT
    name: str = Field(pattern=NAME)
    task: Named
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    soft_labels: UserPlace | None = None
    student: StudentConfig | None = None
    target: StudentConfig | None = None
    config: dict[str, Any] = Field(
        default_factory=dict, description="Further keys of a run, for all methods."
    )

    def keys(self) -> dict[str, Any]:
        """The pair's own keys of a run, as far as they are given."""
        content = dump(self)
        return {key: content[key] for key in PAIR_KEYS if content.get(key)}


def _searched(path: str, choices: Any) -> list[Any] | Range:
    """A list with different choices, or a range; ValueError with the path otherwise."""
    if isinstance(choices, list):
        if len(choices) < 2:
            raise ValueError(f"{path} has {len(choices)} choice; expected two or more, or none of it")
        if any(isinstance(one, float) and not isfinite(one) for one in choices):
            raise ValueError(f"{path}: got {choices}; expected finite numbers")
        if any(one in choices[:place] for place, one in enumerate(choices)):
            raise ValueError(f"{path}: got {choices}; expected each choice once")
        return choices
    if not isinstance(choices, Range | Mapping):
        raise ValueError(  # noqa: TRY004 - what pydantic tells
            f"{path}: got {choices!r}; expected a list of choices, or {{low, high, log}}"
        )
    try:
        return Range.model_validate(choices)
    except ValidationError as error:
        raise ValueError(explain(error, Range, path)) from None


def _plain(line: str) -> bool:
    """Whether the text has no line breaks, tabs, or other control characters."""
    return not any(category(letter) in ("Cc", "Zl", "Zp") for letter in line)


class MethodSpec(BaseModel):
    """A method: keys of a run's config, and what of them is searched."""

    model_config = STRICT
    title: str | None = Field(None, description="What tables call it; default: its key.")
    config: dict[str, Any] = Field(description="Keys of a run: method or methods, optimizer, ...")
    search: dict[str, list[Any] | Range] = Field(
        default_factory=dict,
        description="Paths such as optimizer.lr, each with a list of choices or {low, high, log}.",
    )

    @field_validator("title")
    @classmethod
    def _line(cls, title: str | None) -> str | None:
        if title is not None and (not title.strip() or not _plain(title)):
            raise ValueError("expected a line of text, or no title: then the method's key is")
        return title

    @field_validator("search", mode="before")
    @classmethod
    def _choices(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {path: _searched(str(path), choices) for path, choices in value.items()}

    @property
    def space(self) -> tuple[int, int]:
        """The declared size: how many ranges, and how many points the lists make."""
        points = 1
        for choices in self.search.values():
            points *= len(choices) if isinstance(choices, list) else 1
        return sum(isinstance(choices, Range) for choices in self.search.values()), points


class Study(BaseModel):
    """A comparison of methods over pairs of teacher and student, and seeds."""

    model_config = STRICT
    name: str = Field(pattern=NAME, description="Names the study's directory.")
    question: str = Field(min_length=1, description="What the study is to find out, in a sentence.")
    baseline: str = Field(description="The method that differences are taken to.")
    metric: Metric | None = Field(
        None, description="Default: each task's own, which says whether more of it is better."
    )
    budget: Budget
    seeds: Seeds
    defaults: bool = Field(
        False, description="Also run every method as it is given, to see what tuning gains."
    )
    common: dict[str, Any] = Field(
        default_factory=dict, description="Keys of a run, the same for every cell."
    )
    pairs: list[Pair] = Field(min_length=1)
    methods: dict[str, MethodSpec] = Field(min_length=1)
    quick: dict[str, Any] = Field(
        default_factory=dict, description="What --quick sets in place of the above, key by key."
    )

    @field_validator("question")
    @classmethod
    def _sentence(cls, question: str) -> str:
        line = " ".join(question.split())
        if not line or not _plain(line):
            raise ValueError("expected a sentence")
        return line

    @field_validator("methods")
    @classmethod
    def _told_apart(cls, methods: dict[str, MethodSpec]) -> dict[str, MethodSpec]:
        titles: dict[str, str] = {}
        for key, method in methods.items():
            if not re.match(NAME, key) or not _plain(key):
                raise ValueError(f"got the key {key[:200]!r}; {NAMED}: 'title' may say more")
            other = titles.setdefault(method.title or key, key)
            if other != key:
                raise ValueError(f"{other} and {key} have one title, '{method.title or key}'; expected two")
        return methods

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if self.baseline not in self.methods:
            raise ValueError(
                f"baseline '{self.baseline}' is no method of the study{nearest(self.baseline, self.methods)}"
            )
        names = [pair.name for pair in self.pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"pairs {names}: expected each name once")
        _check_keys("common", self.common, {*OWN_KEYS, "steps", *PAIR_KEYS})
        for pair in self.pairs:
            _check_keys(f"pairs.{pair.name}.config", pair.config, {*OWN_KEYS, "steps", *PAIR_KEYS})
        for name, method in self.methods.items():
            given = [*method.config, *(path.partition(".")[0] for path in method.search)]
            _check_keys(f"methods.{name}", given, {*OWN_KEYS, *BUDGET_KEYS, *PAIR_KEYS})
        self._check_tuning()
        return self

    def _check_tuning(self) -> None:
        trials, sizes = self.budget.trials, {name: method.space for name, method in self.methods.items()}
        if trials == 1 or (trials and not any(method.search for method in self.methods.values())):
            raise ValueError(
                f"budget.trials is {trials}; expected 0, or two or more and a search space to take them from"
            )
        if trials and not self.seeds.tuning:
            raise ValueError(
                f"budget.trials is {trials} and seeds.tuning is empty; expected at least one tuning seed"
            )
        if not trials and self.defaults:
            raise ValueError(
                "defaults is true and budget.trials is 0: without tuning every method runs as it is given; expected trials, "
                "or defaults: false"
            )
        if not trials:
            searched = [name for name, method in self.methods.items() if method.search]
            if searched or self.seeds.tuning:
                raise ValueError(
                    "budget.trials is 0, and there is a search or a tuning seed; expected trials, or neither"
                )
            return
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name}: {describe(size)}" for name, size in sizes.items())
            raise ValueError(
                f"the budgets differ: search spaces of {told}; expected the same size for every method"
            )


def describe(size: tuple[int, int]) -> str:
    """A search space's size in words."""
    ranges, points = size
    words = [f"{ranges} range{'s' * (ranges > 1)}"] if ranges else []
    return " by ".join([*words, f"{points} points"] if points > 1 or not ranges else words)


def _check_keys(where: str, keys: Any, taken: set[str]) -> None:
    for key in keys:
        if key in taken:
            why = {
                **dict.fromkeys(OWN_KEYS, "the study sets it for each cell"),
                **dict.fromkeys(PAIR_KEYS, "it belongs to a pair"),
                **dict.fromkeys(
                    BUDGET_KEYS, "the budgets would differ; 'budget' and 'common' say it for all"
                ),
            }[key]
            raise ValueError(f"{where}: got '{key}': {why}")
        if key not in RunConfig.model_fields:
            raise ValueError(f"{where}.{key}: unknown{nearest(key, RunConfig.model_fields)}")


def shipped() -> dict[str, Path]:
    """The studies that come with Stillhouse, by name."""
    folder = Path(str(resources.files("stillhouse") / "study" / "shipped"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read(source: str, *, quick: bool = False) -> Study:
    """Read a study file, or a shipped study by name; ConfigError with the path of each offending key.

    quick
        Put what stands under ``quick`` in place of the rest, and call the study NAME-quick.
    """
    known = shipped()
    path = known.get(source) or Path(source)
    if not path.is_file():
        raise ConfigError(
            f"no study file '{source}', and no shipped study of that name{nearest(source, known)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text; expected a YAML file in UTF-8") from None
    content = parse(text, str(path))
    content.setdefault("name", path.stem)
    study = validate(content)
    if not quick:
        return study
    if not study.quick:
        raise ConfigError(
            f"{source} has no key 'quick'; expected what --quick is to change, such as budget.updates"
        )
    changed = _overlaid({key: value for key, value in content.items() if key != "quick"}, study.quick)
    return validate({**changed, "name": f"{study.name}-quick"})


def validate(content: Mapping[str, Any]) -> Study:
    """A Study from plain values; ConfigError otherwise."""
    try:
        return Study.model_validate(dict(content))
    except ValidationError as error:
        raise ConfigError(explain(error, Study)) from None


def _overlaid(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(under)
    for key, value in over.items():
        below = made.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        made[key] = _overlaid(below, value) if both else value  # type: ignore[arg-type]
    return made


def to_text(study: Study) -> str:
    """The study as YAML, every default filled in."""
    content = study.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
