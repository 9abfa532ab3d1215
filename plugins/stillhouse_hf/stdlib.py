"""The Python standard library as text that is on every machine: docstrings, functions, source files.

It is that of the interpreter that runs: another version of Python has other text, and figures move a little with it.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
SKIPPED = frozenset(
    {
        "__pycache__", "_bundled", "dist-packages", "encodings", "idle_test", "lib2to3", "pydoc_data", "site-packages",
        "test", "tests", "turtledemo",
    }
)  # fmt: skip
"""Folders of tests, of tables, and of what is not the library's own."""
SHORTEST = 20
"""Characters of a docstring's first paragraph, at least."""
SALT = "b"
"""Chosen among nine for the parts' sizes, before anything was trained."""


@dataclass(frozen=True)
class Documented:
    """A docstring and what it stands in.

    module
        The top-level module or package.
    text
        All of the docstring, on one line.
    summary
        Its first paragraph, on one line.
    code
        The function without its docstring, dedented; "" where a module or a class is documented, or nothing else stands
        in it.
    """

    module: str
    text: str
    summary: str
    code: str


def part(module: str) -> Part:
    """The part of the data that a module belongs to, by its name alone: a fifth are tested on, a tenth validate."""
    number = int(hashlib.sha256(f"{SALT}{module}".encode()).hexdigest(), 16) % 100
    return "test" if number < 20 else "validation" if number < 30 else "train"


def files(modules: Sequence[str] | None = None) -> list[tuple[str, Path]]:
    """Top-level module and path of each source file, in the order of their names.

    modules
        Those that are wanted; None: all.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        module = parts[0].removesuffix(".py")
        built = parts[0].startswith("config-")  # how this interpreter was built
        if not SKIPPED & set(parts) and not built and (modules is None or module in modules):
            found.append((module, path))
    return found


def origin(modules: Sequence[str] | None = None) -> dict[str, Any]:
    """What texts made of these modules depend on, as JSON values: for what is kept of them."""
    digest = hashlib.sha256()
    for module, path in files(modules):
        digest.update(f"{module} {path.name} {path.stat().st_size}\n".encode())
    return {"python": platform.python_version(), "files": digest.hexdigest()[:16]}


def sources(modules: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
    """Module and text of each file that is UTF-8."""
    for module, path in files(modules):
        try:
            yield module, path.read_text("utf-8")
        except UnicodeDecodeError:
            continue


def documented(modules: Sequence[str] | None = None) -> list[Documented]:
    """Every docstring of some length, in the order of the files; of those with one first paragraph the first."""
    found: dict[str, Documented] = {}
    for module, text in sources(modules):
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        lines = text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                made = _documented(module, node, lines)
                if made is not None:
                    found.setdefault(made.summary, made)
    return list(found.values())


def _documented(
    module: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> Documented | None:
    text = ast.get_docstring(node)
    if not text:
        return None
    summary = " ".join(text.split("\n\n")[0].split())
    if len(summary) < SHORTEST:
        return None
    code = _code(node, lines) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
    return Documented(module, " ".join(text.split()), summary, code)


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The function's lines without those of its docstring."""
    first = node.body[0]
    if len(node.body) == 1 or first.lineno == node.lineno:
        return ""
    kept = [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno : node.end_lineno]]
    return textwrap.dedent("\n".join(kept)).strip()


def divided(
    rows: Sequence[Sequence[int]], modules: Sequence[str], most: Mapping[Part, int | None]
) -> tuple[list[int], list[int]]:
    """Numbers of the rows that are taken, part after part, and how many each part has; of equal rows the first alone.

    rows
        Tokens, as models will see them: texts that differ behind the cut are equal.
    modules
        Each row's.
    most
        Rows of each part, at most, evenly spread.
    """
    first: dict[tuple[int, ...], int] = {}
    for number, row in enumerate(rows):
        first.setdefault(tuple(row), number)
    taken: list[int] = []
    sizes: list[int] = []
    for name in PARTS:
        own = [number for number in first.values() if part(modules[number]) == name]
        own = [own[place] for place in spread(len(own), most[name])]
        taken, sizes = [*taken, *own], [*sizes, len(own)]
    return taken, sizes


def spread(count: int, most: int | None) -> list[int]:
    """``most`` of ``count`` numbers, evenly spread; all where there are no more."""
    if most is None or most >= count:
        return list(range(count))
    return [number * count // most for number in range(most)]
