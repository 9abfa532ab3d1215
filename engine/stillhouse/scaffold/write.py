"""``stillhouse plugins new``: a template filled in and written. Imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from string import Template

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

        Raises ConfigError for a name that can't be a package's.
        """
        short = name.removeprefix(_PREFIX)
        if not _NAME.fullmatch(short):
            raise ConfigError(
                f"plugin name '{name}': expected lower-case letters and digits, in words joined by - or _, as in "
                "'my-method'"
            )
        words = re.split(r"[-_]", short)
        return cls(
            name=short,
            kind=kind,
            distribution=_PREFIX + "-".join(words),
            module="stillhouse_" + "_".join(words),
            title="".join(word.capitalize() for word in words),
            engine=version("stillhouse"),
        )


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
            path.write_text(Template(template.read_text()).substitute(asdict(names)))
            written.append(path)
    return sorted(written)
