"""A run's configuration: YAML, then ``a.b=c``, then pydantic. Unknown keys are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from stillhouse import plain_yaml
from stillhouse.errors import ConfigError, DamagedFile, nearest
from stillhouse.files import read_text

STRICT = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
OPEN = ConfigDict(extra="allow", frozen=True)


MOST = 10**12
"""More of anything that is counted here is a slip of the keyboard."""


def _usable(path: Path) -> Path:
    """A path as the user means it: ``~`` is the home directory."""
    if any(ord(character) < 32 or ord(character) == 127 for character in str(path)):
        raise ValueError("expected a path without control characters")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("no such user's home directory is known") from None


UserPath = Annotated[Path, AfterValidator(_usable)]


def _text(place: object) -> object:
    """A path from Python as the text that a config has."""
    return str(place) if isinstance(place, Path) else place


def _place(place: str) -> str:
    """A path as the user means it, or a URI as it is."""
    return place if "://" in place else str(_usable(Path(place)))


UserPlace = Annotated[str, BeforeValidator(_text), AfterValidator(_place), Field(min_length=1)]


class Named(BaseModel):
    """Something chosen by name, with its own settings beside the name; a bare string is the name."""

    model_config = OPEN
    name: str = Field(description="The registered name.")

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def settings(self) -> dict[str, Any]:
        """The keys beside ``name`` that this class has no field for."""
        return dict(self.model_extra or {})


class MethodSpec(Named):
    """A method by name, with its settings beside it."""

    model_config = ConfigDict(extra="allow", frozen=True, validate_by_name=True, validate_by_alias=True)
    alias: str | None = Field(
        None,
        alias="as",
        pattern=r"^[A-Za-z0-9_-]+$",
        description="What it is called here, where two are of one name.",
    )


class OptimizerConfig(Named):
    """A class of torch.optim; further keys are its arguments."""

    name: str = Field("AdamW", description="A class of torch.optim.")
    lr: float = Field(1e-3, gt=0, description="Learning rate.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled in AdamW.")


class Training(BaseModel):
    """How a student is trained, whatever the method."""

    model_config = STRICT
    steps: int = Field(3000, gt=0, le=MOST, description="Student updates of the whole run, over all stages.")
    batch_size: int = Field(128, gt=0, le=MOST, description="Samples in one update.")
    micro_batch_size: int | None = Field(
        None,
        gt=0,
        le=MOST,
        description="Samples in one forward pass; the update's loss does not depend on it.",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)  # type: ignore[arg-type]
    scheduler: Named | None = Field(None, description="A class of torch.optim.lr_scheduler.")
    clip: float | None = Field(None, gt=0, description="Greatest norm of the gradient.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast, float32 weights.")
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    workers: int | None = Field(
        None,
        ge=0,
        description="Processes that read a Dataset ahead; default: its DataLoader's own, else none.",
    )
    cache_teacher: bool = Field(
        True, description="Call a deterministic teacher once per sample and keep its outputs."
    )


class StudentConfig(Named):
    """A model: a builder's name with its arguments."""

    name: str = Field("", description="The builder; default: the task's first.")


class TeacherConfig(Named):
    """A teacher: a builder's name with its arguments, a checkpoint, or how to train it."""

    name: str = Field("", description="The builder; default: the task's first.")
    checkpoint: UserPath | None = Field(None, description="safetensors file of its weights.")
    train: dict[str, Any] = Field(
        default_factory=dict, description="Training settings where there is no checkpoint."
    )


class RunConfig(Training):
    """One run: a task, a teacher, a student, one or more methods, and how to train."""

    name: str = Field(
        "run", max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run directory."
    )
    task: Named
    teacher: TeacherConfig | None = Field(None, description="Default: the task's first teacher.")
    teachers: dict[str, TeacherConfig] = Field(
        default_factory=dict, description="Several teachers by name, in place of teacher: their mean answers."
    )
    soft_labels: UserPlace | None = Field(
        None, description="Directory or URI of kept labels, read in place of asking the teacher."
    )
    student: StudentConfig | None = Field(None, description="Default: the task's first student.")
    target: StudentConfig | None = Field(None, description="Another model to end with; default: the student.")
    method: MethodSpec | None = Field(None, description="The method and its settings.")
    methods: list[MethodSpec] = Field(default_factory=list, description="Several methods, in order.")
    observers: list[Named] = Field(default_factory=list)
    out: UserPath | None = Field(None, description="Run directory; default runs/NAME-seedN.")
    threads: int | None = Field(None, gt=0, le=4096, description="CPU threads; default: torch's.")
    log_every: int = Field(100, gt=0, le=MOST, description="Updates between rows of metrics.jsonl.")
    validate_every: int = Field(
        500, gt=0, le=MOST, description="Updates between looks at the validation split."
    )
    evaluate_batch_size: int | None = Field(
        None,
        gt=0,
        le=MOST,
        description="Samples scored at once; default: as many as take 64 MiB, up to 1,024.",
    )
    checkpoint_every: int = Field(500, gt=0, le=MOST, description="Updates between checkpoints.")

    @field_validator("methods", "observers", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Mapping) else value

    @model_validator(mode="after")
    def _one_way_to_name_teachers(self) -> RunConfig:
        if self.teacher is not None and self.teachers:
            raise ValueError("expected either 'teacher' (one) or 'teachers' (several by name), got both")
        if self.soft_labels is not None and self.teachers:
            raise ValueError(
                "expected either 'soft_labels', which are one teacher's, or 'teachers', got both"
            )
        for name in self.teachers:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or name in ("student", "target", "teacher"):
                raise ValueError(
                    f"teachers: got the name '{name}'; expected letters, digits, _ and -, and not student, target or teacher"
                )
        return self

    @model_validator(mode="after")
    def _one_way_to_name_methods(self) -> RunConfig:
        if (self.method is None) == (not self.methods):
            raise ValueError("expected either 'method' (one) or 'methods' (a list)")
        return self

    @property
    def named_methods(self) -> list[tuple[str, MethodSpec]]:
        """The methods in order, each with its path in the config."""
        if self.method is not None:
            return [("method", self.method)]
        return [(f"methods.{number}", method) for number, method in enumerate(self.methods)]

    @property
    def named_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers by their path in the config: ``teacher``, or ``teachers.NAME`` each."""
        if self.teacher is not None:
            return {"teacher": self.teacher}
        return {f"teachers.{name}": spec for name, spec in self.teachers.items()}

    @property
    def run_dir(self) -> Path:
        """Where the run is kept."""
        return self.out or Path("runs") / f"{self.name}-seed{self.seed}"


def shipped() -> dict[str, Path]:
    """The configs that come with Stillhouse, by name."""
    folder = Path(str(resources.files("stillhouse") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, or a shipped config by name, apply ``a.b=c`` overrides, and validate it.

    Raises ConfigError with the path of each offending key.
    """
    known = shipped()
    path = known.get(source) or Path(source).expanduser()
    if not _is_file(path):
        raise ConfigError(
            f"no config file '{source}', and no shipped config of that name{nearest(source, known)}"
        )
    try:
        text = read_text(path, mend="expected a YAML file in UTF-8", limit=plain_yaml.SIZE)
    except DamagedFile as error:
        raise ConfigError(str(error)) from None
    content = parse(text, str(path))
    content.setdefault("name", path.stem)
    if path.name == "config.yaml" and _is_file(path.with_name("manifest.json")):
        content.setdefault(
            "out", str(path.parent)
        )  # a run's own config: the run is where it lies, moved or not
    for override in overrides:
        apply_override(content, override)
    return validate(content)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def plain(value: Any, path: str = "", depth: int = 0) -> Any:
    """``value`` as YAML could hold it: numbers of numpy and torch as Python's, tuples as lists, objects of pydantic as is.

    Raises ConfigError for what has no such form: other objects, numbers that are not finite, text that is no Unicode,
    what is nested too deep.
    """
    if depth > plain_yaml.DEPTH:
        raise ConfigError(f"{path}: nested deeper than {plain_yaml.DEPTH}")
    if value is None or isinstance(value, bool | BaseModel | Path):
        return value
    if isinstance(value, str):
        if not value.isascii() and any(0xD800 <= ord(character) < 0xE000 for character in value):
            raise ConfigError(f"{path}: got half of a character ({value!a:.80}); expected text")
        return str(value)
    if isinstance(value, Mapping):
        return {
            key: plain(inner, f"{path}.{key}" if path else str(key), depth + 1)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(inner, f"{path}.{number}", depth + 1) for number, inner in enumerate(value)]
    if not isinstance(value, int | float) and hasattr(value, "tolist"):
        return plain(value.tolist(), path, depth + 1)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: got {value}; expected a finite number")
    if not isinstance(value, int | float):
        raise ConfigError(f"{path}: got {type(value).__name__}; expected a number, text, a list or a mapping")
    return int(value) if isinstance(value, int) else float(value)


def validate(content: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from plain values; ConfigError otherwise."""
    try:
        return RunConfig.model_validate(plain(content))
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from None


def parse(text: str, where: str) -> dict[str, Any]:
    """YAML text as a mapping. A tag that names code is refused and nothing of it runs."""
    try:
        content = plain_yaml.load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: {problem}; expected plain YAML") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: got {type(content).__name__}; expected keys and values")
    return content


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one ``a.b=c`` in place; ``c`` is read as YAML. A bare name is opened as ``{name: ...}``."""
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise ConfigError(f"override '{override}': expected KEY=VALUE, as in method.temperature=2")
    value = parse(f"value: {text}" if text else "value: null", f"override '{override}'")["value"]
    keys = path.split(".")
    if len(keys) > plain_yaml.DEPTH:
        raise ConfigError(f"override '{override:.80}...': a key in {len(keys)} parts; expected a few")
    here: Any = content
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(here, list):
            if not (key.isascii() and key.isdigit()) or len(key) > 6 or int(key) >= len(here):
                raise ConfigError(f"override '{override}': '{key}' is no index of a list of {len(here)}")
            slot: Any = int(key)
        else:
            slot = key
        if last:
            here[slot] = value
            return
        inner = here[slot] if isinstance(here, list) else here.get(slot)
        if isinstance(inner, str):
            inner = {"name": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict | list):
            raise ConfigError(f"override '{override}': '{key}' holds {inner!r}, which has no keys")
        here[slot] = inner
        here = inner


def explain(error: ValidationError, kind: type[BaseModel], path: str = "") -> str:
    """A validation error as lines of ``path: what is wrong``, with the nearest known key."""
    lines = []
    for item in error.errors():
        where = ".".join([*([path] if path else []), *(str(part) for part in item["loc"])])
        given = "" if isinstance(item.get("input"), Mapping) else f", got {_short(item.get('input'))}"
        if item["type"] == "extra_forbidden":
            known = _fields_at(kind, item["loc"][:-1])
            lines.append(f"{where}: unknown{nearest(str(item['loc'][-1]), known)}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {message[:1].lower()}{message[1:]}{given}" if where else message)
    return "\n".join(lines)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _fields_at(kind: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The known keys of the model at a location."""
    for part in location:
        field = kind.model_fields.get(str(part))
        if field is None:
            continue
        candidates = [field.annotation, *get_args(field.annotation)]
        inner = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        if inner:
            kind = inner[0]
    return list(kind.model_fields)


def dump(config: BaseModel) -> dict[str, Any]:
    """The config as plain values, as it is written to a run directory."""
    return config.model_dump(mode="json", exclude_none=True, by_alias=True)


def to_yaml(content: Mapping[str, Any]) -> str:
    """Plain values as YAML, in the given order."""
    return plain_yaml.dump(content)
