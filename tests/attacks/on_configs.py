"""Configs from a stranger, and configs that are accepted: refused in words, at once, or run to their end."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from attacks.lab import CONFIG, Figures, Lab
from stillhouse.config import apply_override, parse, shipped, validate
from stillhouse.errors import StillhouseError
from stillhouse.runs.resolve import pick_device, resolve

PATIENCE = 20
"""Seconds after which a config is said to hang; what is measured is printed."""
WORDS = (
    "2024-01-01", "2024-13-45", "9" * 5000, "-" + "9" * 300, "!!int x", "!!float x", "!!bool x", "!!binary aGk=", "!!set {a}",
    "!!timestamp 1", "!!python/object/apply:os.system ['true']", "!x y", ".nan", ".inf", "-.inf", "1e999", "1e-320", "0x1g",
    "0b1", "017", "1_000", "1:30", "~", "null", "yes", "''", "'\\0'", '"\\0"', '"\\ud800"', '"\\x1b[2J"', "[" * 3000, "{" * 500, "[" * 30 + "]" * 30,
    "&a [*a]", "&a {b: *a}", "*b", "&a", "<<: *a", "? [1]", "- - -", "|", ">", "%", "@", "`", "\t", "\x00", "\u2028", "\ufeff",
    "a: b: c", "{a: 1, a: 2}", "[1, 2", "2147483648", "4294967296", "-1", "0", "1e18", "99999999999999999999", "meta", "cuda:99",
    "cpu:7", "mps", "cuda:-1", "/dev/zero", "/proc/self/mem", "../" * 50, "~nobody-here/x", "x" * 5000, "größe", "🜂", "true", "3.5",
    "{name: kd, temperature: 1e-9}", "[kd, kd, kd]", "{name: sld, labels: [1]}", "{name: [kd]}", "{1: 2}", "{name: kd, ? [x] : 1}",
)  # fmt: skip
LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{this}: &{this} [{','.join([f'*{before}'] * 9)}]\n"
    for before, this in zip("abcdefgh", "bcdefghi", strict=True)
)
WHOLE = (
    LAUGHS, "a: &a\n  <<: *a\n", "x: " + "[" * 100_000, "? " * 5000, "- " * 5000, "a: " * 2000, "", "\x00", "---\n---\n", "!!map",
    "%YAML 9.9\n---\n", "&a *a", "task: digits\nmethod: kd\n" + "# x\n" * 200_000, "a: 'x\n" * 3000, "\n".join(f"k{n}: {n}" for n in range(30_000)),
    "{" + ",".join(f"k{n}: [{n}]" for n in range(20_000)) + "}", 'a: "' + "\\x41" * 50_000 + '"', "k: " + "9" * 200_000,
)  # fmt: skip
KEYS = (
    "steps", "batch_size", "micro_batch_size", "optimizer", "optimizer.name", "optimizer.lr", "optimizer.betas", "optimizer.eps",
    "optimizer.weight_decay", "scheduler", "scheduler.name", "clip", "precision", "seed", "device", "cache_teacher", "name", "task",
    "task.labelled", "task.seed", "teacher", "teacher.name", "teacher.checkpoint", "teacher.train", "teacher.train.steps",
    "teacher.train.optimizer", "student", "student.hidden", "target", "method", "method.name", "method.temperature", "methods",
    "methods.0", "methods.²", "observers", "out", "threads", "log_every", "validate_every", "checkpoint_every", "a" * 200, "a." * 60, "",
    ".", "task..x", "optimizer.lr.x", "\x00",
)  # fmt: skip


@contextmanager
def _no_longer_than(seconds: int) -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _text(chance: random.Random, plain: list[str]) -> str:
    """A config's text, changed in some places; or one that is nothing but an attack."""
    if chance.random() < 0.04:
        return chance.choice(WHOLE)
    text = chance.choice(plain)
    for _ in range(chance.choice([1, 1, 2, 4])):
        place, kind = chance.randrange(len(text) + 1), chance.randrange(6)
        if kind == 0:
            text = text[:place] + chance.choice(WORDS) + text[place:]
        elif kind == 1:
            text = text[:place] + chr(chance.randrange(0, 0x3000)) + text[place + 1 :]
        elif kind == 2:
            text = text[:place] + text[place + chance.randrange(1, 20) :]
        else:
            lines = text.splitlines() or [""]
            line = chance.randrange(len(lines))
            key, colon, _ = lines[line].partition(":")
            if kind == 3:
                lines[line] = f"{key}{colon} {chance.choice(WORDS)}"
            elif kind == 4:
                lines.insert(line, f"{chance.choice(KEYS)}: {chance.choice(WORDS)}")
            else:
                lines[line] = "  " * chance.randrange(4) + lines[line]
            text = "\n".join(lines)
    return text


def configs(lab: Lab | None, count: int, chance: random.Random) -> Figures:
    """Texts and overrides made at random: a config, or an error in words, and never long."""
    figures = Figures()
    plain = [path.read_text(encoding="utf-8") for path in shipped().values()] + [yaml.safe_dump(CONFIG)]
    slowest = 0.0
    _once(plain[0])
    for number in range(count):
        text = _text(chance, plain)
        overrides = [
            f"{chance.choice(KEYS)}={chance.choice(WORDS)}"
            for _ in range(chance.choice([0, 0, 1, 2]) if number % 2 else 0)
        ]
        started = time.process_time()
        try:
            with _no_longer_than(PATIENCE):
                content = {"name": "fuzzed", **parse(text, "fuzzed.yaml")}
                for override in overrides:
                    apply_override(content, override)
                config = resolve(validate(content)).config
                pick_device(config.device)
            figures.judged("same")
        except StillhouseError as error:
            figures.judged("told" if str(error).strip() else "an error without a word")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            figures.judged(f"{type(error).__name__}: {str(error)[:120]} for {text[:200]!r} {overrides}")
        slowest = max(slowest, time.process_time() - started)
    figures.note = f"the slowest took {slowest:.2f} s"
    return figures


def _once(text: str) -> None:
    """What is imported with the first config is not what a config takes."""
    resolve(validate(parse(text, "first.yaml")))


CHOICES: dict[str, list[Any]] = {
    "optimizer": [
        "AdamW", "SGD", "SparseAdam", "Adam", "LBFGS", "Rprop", "Adagrad", "Adafactor", "NAdam", "RAdam", "ASGD", "Adamax", "RMSprop", "Adadelta", "Muon",
        {"name": "AdamW", "capturable": True}, {"name": "SGD", "momentum": 0.9, "nesterov": True}, {"name": "AdamW", "betas": [0.9, 1.5]},
        {"name": "SGD", "lr": 1e12}, {"name": "AdamW", "fused": True}, {"name": "AdamW", "foreach": True, "amsgrad": True}, {"name": "AdamW", "eps": 0},
        {"name": "AdamW", "differentiable": True}, {"name": "SGD", "maximize": True},
    ],
    "scheduler": [
        None, None, "CosineAnnealingLR", "LinearLR", "ConstantLR", {"name": "StepLR", "step_size": 3}, {"name": "OneCycleLR", "max_lr": 0.01},
        "ReduceLROnPlateau", {"name": "CyclicLR", "base_lr": 0.001, "max_lr": 0.01}, {"name": "LambdaLR", "lr_lambda": 3}, "PolynomialLR",
        {"name": "MultiStepLR", "milestones": [2, 4]}, {"name": "CosineAnnealingWarmRestarts", "T_0": 0}, {"name": "StepLR", "step_size": 0},
        {"name": "ExponentialLR", "gamma": 1e30},
    ],
    "method": [
        "hard_labels", "kd", "sld", "fitnets", "ibmd", "pddm", "tcmd", "hldm", {"name": "kd", "temperature": 1e-9}, {"name": "kd", "temperature": 1e9},
        {"name": "sld", "shares": [1, 0, 0]}, {"name": "sld", "top_per_class": 1}, {"name": "sld", "labels": "hard"},
        {"name": "hldm", "methods": ["kd", "fitnets"]}, {"name": "fitnets", "student_layer": "0"}, {"name": "fitnets", "teacher_layer": ""},
        {"name": "kd", "alpha": 0}, {"name": "pddm", "points": 2}, {"name": "label_smoothing"},
    ],
    "methods": [
        None, None, None, ["fitnets", "pddm"], ["kd", "fitnets"], ["mixup", "kd"], ["label_smoothing", "hard_labels"], ["kd", "kd"], ["augment", "sld"],
        ["hard_labels", "kd", "fitnets"], ["label_correction", "kd"],
    ],
    "target": [None, None, {"name": "mlp", "hidden": 5}, "mlp"],
    "batch_size": [16, 1, 2, 60, 500, 10**9, 10**12, 4000],
    "micro_batch_size": [None, None, 1, 7, 10**9],
    "clip": [None, 1.0, 1e-30, 1e30],
    "precision": ["fp32", "bf16"],
    "steps": [6, 1, 2, 3],
    "teacher.train": [{"steps": 6}, {"steps": 6, "optimizer": "SparseAdam"}, {"steps": 6, "batch_size": 10**9}, {"steps": 6, "precision": "bf16"}],
    "cache_teacher": [True, False],
    "threads": [1, 2, 2**31],
    "task.labelled": [60, 10, 3],
    "task.unlabelled": [60, 0],
}  # fmt: skip


def accepted(lab: Lab, count: int, chance: random.Random) -> Figures:
    """Configs of valid keys and values that may not go together: run to the end, or refused before a teacher is trained."""
    figures = Figures()
    for number in range(count):
        place = lab.place()
        content = {key: dict(value) if isinstance(value, dict) else value for key, value in CONFIG.items()}
        for key in chance.sample(sorted(CHOICES), chance.choice([1, 2, 3])):
            value = chance.choice(CHOICES[key])
            outer, _, inner = key.partition(".")
            if inner:
                content[outer][inner] = value
            else:
                content[outer] = value
        if content.get("methods"):
            content["method"] = None
        content["teacher"]["hidden"] = 8 + number % 5
        own = place.folder / "cache"
        (place.folder / "run.yaml").write_text(yaml.safe_dump(content))
        code = place.go(env={"STILLHOUSE_CACHE": str(own)})
        said = place.said()
        trained = own.exists() and any((own / "teachers").glob("*.safetensors"))
        changed = {key: content.get(key) for key in CHOICES if content.get(key) != CONFIG.get(key)}
        if code == 0 and "Traceback" not in said:
            figures.judged("same")
        elif code == 2 and "error: " in said and "Traceback" not in said and not trained:
            figures.judged("told")
        elif code == 2 and trained and "not finite" in said:
            figures.judged("told")  # whether training diverges is known only by training
        else:
            figures.judged(
                f"{changed}: exit {code}{', after the teacher was trained' if trained else ''}: {said[-300:]}"
            )
        shutil.rmtree(place.folder)
    return figures
