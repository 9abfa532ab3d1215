"""``stillhouse plugins new``: a template filled in and written. Imports nothing heavy."""

from __future__ import annotations

import ast
import keyword
import re
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from string import Template

import yaml

from stillhouse.errors import ConfigError

KINDS = ("method", "task", "observer")
_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_PREFIX = "stillhouse-"


@dataclass(frozen=True)
class Names:
    """What a plugin package's files, module and class are called."""

    name: str
    kind: str
    distribution: str
    module: str
    title: str
    engine: str
    """The version of Stillhouse that the package asks for at least."""

    @classmethod
    def of(cls, name: str, kind: str) -> Names:
        """The names that follow from a plugin's name.

        Raises ConfigError for a name that can't be a package's, a config's or a class's.
        """
        short = name.removeprefix(_PREFIX).removeprefix("stillhouse_")
        if not _NAME.fullmatch(short):
            raise ConfigError(
                f"plugin name '{name}': expected lower-case letters and digits, in words joined by - or _, as in "
                "'my-method'"
            )
        if yaml.safe_load(short) != short:
            raise ConfigError(
                f"plugin name '{name}': a config would read it as {yaml.safe_load(short)!r}; expected a name that YAML "
                f"takes for a word, as in 'my-{short}'"
            )
        words = re.split(r"[-_]", short)
        title = "".join(word.capitalize() for word in words)
        if keyword.iskeyword(title) or title in _used(kind):
            raise ConfigError(
                f"plugin name '{name}': its class would be called {title}, which is taken in the {kind}'s module; "
                f"choose another name, as in 'my-{short}'"
            )
        return cls(
            name=short,
            kind=kind,
            distribution=_PREFIX + "-".join(words),
            module="stillhouse_" + "_".join(words),
            title=title,
            engine=version("stillhouse"),
        )


def _used(kind: str) -> set[str]:
    """The names in the code of a kind's module, which a class of that name would hide."""
    source = Template((resources.files(__package__) / kind / "MODULE.py.tmpl").read_text(encoding="utf-8"))
    tree = ast.parse(source.substitute(title="_", name="_", module="_"))
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def write(names: Names, folder: Path) -> list[Path]:
    """Write the package into ``folder`` and return its files.

    Raises ConfigError, having written nothing, if the folder holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already and not empty; choose another place with --dir")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for source in ("common", names.kind):
        for template in sorted((resources.files(__package__) / source).iterdir(), key=lambda path: path.name):
            path = folder / template.name.removesuffix(".tmpl").replace("MODULE", names.module)
            text = template.read_text(encoding="utf-8")
            path.write_text(Template(text).substitute(asdict(names)), encoding="utf-8")
            written.append(path)
    return sorted(written)
