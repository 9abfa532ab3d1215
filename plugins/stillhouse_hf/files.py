"""Rows of a user's files: json, jsonl, csv, parquet and text, read by ``datasets``; hub names where they are asked for."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stillhouse.api import DataError, MissingExtra

FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".py": "text",
}
BLOCK = 1 << 20


def rows(path: str, columns: Mapping[str, str], *, documents: bool = False) -> list[dict[str, Any]]:
    """The rows of a file, of every file of a folder, or of a data set of the hub (``org/name`` or ``org/name:split``).

    columns
        Our names of the columns that are read to the file's; rows come with ours. A text file has the column ``text``.
    documents
        Whether a text file is one row; else each of its lines is, but for blank ones.

    Raises DataError for a file that is not there, empty, no UTF-8 or unreadable, and for a missing column or value.
    """
    found = Path(path).expanduser()
    if found.exists():
        table = [row for file in _files(found) for row in _read(file, columns, documents=documents)]
        source = str(found)
    else:
        table, source = _hub(path, columns), path
    if not table:
        raise DataError(f"{source} has no rows; expected one at least")
    for number, row in enumerate(table):
        for name in columns.values():
            if row.get(name) is None:
                raise DataError(
                    f"{source}: row {number} has no '{name}'; expected one in each row: fill it in, or drop the row"
                )
    return [{own: row[given] for own, given in columns.items()} for row in table]


def is_hub_name(name: str) -> bool:
    """Whether ``org/name`` may stand for something of the hub, rather than a path that is not here."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~"))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in FORMATS and file.is_file())
    if not files:
        raise DataError(f"{path} holds no file that can be read; expected some of {', '.join(FORMATS)}")
    return files


def _read(path: Path, columns: Mapping[str, str], *, documents: bool) -> list[dict[str, Any]]:
    if path.suffix not in FORMATS:
        raise DataError(f"{path}: files that end so can't be read; expected one of {', '.join(FORMATS)}")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty; expected one row at least")
    form = FORMATS[path.suffix]
    if form != "parquet":
        _refuse_other_than_utf8(path)
    options = {"sample_by": "document" if documents else "line"} if form == "text" else {}
    datasets = _datasets()
    with TemporaryDirectory() as cache:
        try:
            read = getattr(datasets.Dataset, f"from_{form}")
            table = read(str(path), cache_dir=cache, keep_in_memory=True, **options)
        except Exception as error:  # noqa: BLE001 - whatever the library makes of a bad file
            if "corresponds to no data" in str(error):
                raise DataError(f"{path} has no rows; expected one at least") from None
            reason = str(error.__cause__ or error).splitlines()[0]
            raise DataError(
                f"{path} can't be read as {form} ({reason}); expected a file of that format"
            ) from None
        _refuse_missing(path, table.column_names, columns)
        wanted = columns.values()
        kept = list(table.select_columns([name for name in table.column_names if name in wanted]))
    return [row for row in kept if row["text"].strip()] if form == "text" else kept


def _refuse_missing(source: object, there: Sequence[str], columns: Mapping[str, str]) -> None:
    for own, name in columns.items():
        if name not in there:
            raise DataError(
                f"{source} has no column '{name}'; it has {', '.join(there)}: name the right one in the config, as in "
                f"task: {{{own}_column: NAME}}"
            )


def _refuse_other_than_utf8(path: Path) -> None:
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            block = file.read(BLOCK)
            before = len(decoder.getstate()[0])  # bytes of a letter that the block before cut
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} is no UTF-8: byte {read - before + error.start} is {error.object[error.start]:#04x}; save "
                    "it as UTF-8"
                ) from None
            if not block:
                return
            read += len(block)


def _hub(name: str, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """A data set of the hub: only a name of the form ``org/name`` goes there."""
    name, _, split = name.partition(":")
    if not is_hub_name(name):
        raise DataError(f"{name}: no such file or folder; expected one, or a data set of the hub (org/name)")
    try:
        table = _datasets().load_dataset(name, split=split or "train")
    except Exception as error:  # noqa: BLE001 - whatever the library makes of a bad file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name}: no such file or folder here, and the hub gave no data set ({reason}); expected a path, or a name "
            "of the hub and a network"
        ) from None
    _refuse_missing(name, table.column_names, columns)
    return list(table)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("tasks over files", "datasets", "hf") from None
    datasets.disable_progress_bars()
    return datasets
