"""Docstrings of Python's standard library under three questions, each with rows and labels of its own.

Real text that every machine with Python has. Which docstrings there are depends on Python's version; a study's
fingerprints say so.
"""

from __future__ import annotations

import ast
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import ConfigError, Metrics, Splits, Task, TaskConfig, made_once
from stillhouse_tasks.multihead import EachTask, MultiHead, labelled, unlabelled

PACKAGES = ("asyncio", "email", "importlib", "logging", "mailbox", "multiprocessing", "unittest", "xml")
"""The classes of the first question."""
TASKS = {"package": len(PACKAGES), "method": 2, "returns": 2}
"""Which package a docstring is from; whether it is a method's or a function's; whether that returns a value."""
SKIPPED = frozenset(("test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"))
WORDS, LENGTH = 4096, 64
"""Words are told apart by a hash of so many values (0 is no word); of a docstring so many are read."""


class TextsConfig(TaskConfig):
    """Sizes of the splits. A labelled row has the label of one task alone; what is left over has none."""

    package: int = Field(500, gt=0, description="Training rows labelled with the package.")
    method: int = Field(300, gt=0, description="Training rows labelled with method or function.")
    returns: int = Field(300, gt=0, description="Training rows labelled with whether a value is returned.")
    validation: int = Field(300, gt=0, description="Validation rows of each task.")
    test: int = Field(500, gt=0, description="Test rows of each task.")
    seed: int = Field(0, ge=0, description="Of the division.")


class Bag(nn.Module):
    """Words ``(B, LENGTH)`` to features ``(B, width)``: the mean of their embeddings, and one layer."""

    def __init__(self, embedded: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS + 1, embedded, padding_idx=0)
        self.out = nn.Linear(embedded, width)

    def forward(self, words: Tensor) -> Tensor:
        count = (words != 0).sum(1, keepdim=True).clamp(min=1)
        found: Tensor = self.out(self.embedding(words).sum(1) / count).relu()
        return found


def wide(embedded: int = 256, width: int = 256) -> nn.Module:
    """A wide bag of words, shared by three heads: of few texts it learns more than convolutions do."""
    return bag(embedded, width)


def bag(embedded: int = 16, width: int = 32) -> nn.Module:
    """A bag of words, shared by three heads."""
    return MultiHead(Bag(embedded, width), width, list(TASKS.values()))


class StdlibTexts(Task):
    """Three questions about docstrings; the models are told which is asked by ``task`` among their inputs.

    ``extra["task"]`` holds the same ids, and -1 for rows without a label. ``accuracy`` is the mean over tasks.
    """

    api_version = 1
    Config = TextsConfig
    config: TextsConfig
    teachers = {"wide": wide}
    students = {"bag": bag}
    teacher_training = {
        "steps": 300,
        "batch_size": 64,
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1},
        "scheduler": "CosineAnnealingLR",
    }

    def splits(self) -> Splits:
        config = self.config
        words, packages, methods, returns = rows()
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(config.seed))
        of_package = order[packages[order] >= 0]
        others = order[packages[order] < 0]
        each = [config.validation, config.test]
        first = [config.package, *each]
        rest = [config.method, config.returns, *(size for size in each for _ in range(2))]
        for name, there, sizes in (("package", of_package, first), ("method and returns", others, rest)):
            if sum(sizes) > len(there):
                raise ConfigError(
                    f"task: {sum(sizes)} rows of {name} asked for; expected at most the {len(there)} that this Python has"
                )
        asked = torch.split(of_package[: sum(first)], first)
        further = torch.split(others[: sum(rest)], rest)
        left = torch.cat([of_package[sum(first) :], others[sum(rest) :]])

        def part(package: Tensor, method: Tensor, returning: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            chosen = [package, method, returning]
            classes = [packages[package], methods[method], returns[returning]]
            return [words[one] for one in chosen], classes

        sizes = list(TASKS.values())
        return Splits(
            train=labelled(*part(asked[0], further[0], further[1]), sizes),
            validation=labelled(*part(asked[1], further[2], further[3]), sizes),
            test=labelled(*part(asked[2], further[4], further[5]), sizes),
            unlabelled=unlabelled(words[left]) if len(left) else None,
        )

    def metrics(self) -> Metrics:
        return {"": EachTask(TASKS)}


def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words ``(n, LENGTH)``; then ``(n,)``: the package (-1: another), 1 for a method, 1 for what returns a value."""
    made_from = {"task": "stdlib-texts", "python": platform.python_version(), "alike": "once"}
    made = made_once("data", made_from, _read)
    return made["words"], made["packages"], made["methods"], made["returns"]


def _read() -> dict[str, Tensor]:
    texts = {text: labels for text, *labels in _documented(Path(sysconfig.get_path("stdlib")))}
    found: dict[tuple[int, ...], list[int]] = {}
    for text in sorted(texts):  # whatever the order of the files
        ids = [hashed(word) for word in re.findall(r"[a-z]+|[^\sa-z]", text.lower())[:LENGTH]]
        # Texts that begin with the same words are one row: in two splits, the test would hold what was trained on.
        found.setdefault((*ids, *[0] * (LENGTH - len(ids))), texts[text])
    words, labels = torch.tensor(list(found)), torch.tensor(list(found.values()))
    return {"words": words, "packages": labels[:, 0], "methods": labels[:, 1], "returns": labels[:, 2]}


def hashed(word: str) -> int:
    """1 to WORDS, the same on every machine."""
    return zlib.crc32(word.encode()) % WORDS + 1


def _documented(folder: Path) -> Iterator[tuple[str, int, int, int]]:
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if SKIPPED & set(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # the library keeps files that are wrong on purpose
            continue
        package = parts[0].removesuffix(".py")
        number = PACKAGES.index(package) if package in PACKAGES else -1
        for parent in ast.walk(tree):
            for node in ast.iter_child_nodes(parent):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
                    text := ast.get_docstring(node)
                ):
                    gives = any(
                        isinstance(one, ast.Return) and one.value is not None for one in ast.walk(node)
                    )
                    yield text, number, int(isinstance(parent, ast.ClassDef)), int(gives)
