"""Soft labels as Parquet, for other programs: a row of the table is a sample, its lists are the sample's rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import ConfigError, DamagedFile, MissingExtra
from stillhouse.softlabels.codes import byte_table, from_three_bytes, one_byte, three_bytes
from stillhouse.softlabels.fingerprint import with_data
from stillhouse.softlabels.forms import Form
from stillhouse.softlabels.places import Place, place
from stillhouse.softlabels.shard import Rows, publish
from stillhouse.softlabels.store import SHARD_BYTES, SHARD_SAMPLES, STORE, StoredLabels, describe

ABOUT = b"stillhouse"
"""The key of the table's metadata."""
_LISTED = {
    "dense": ("logits",),
    "topk": ("indices", "log_probs", "log_rest"),
    "sampled": ("indices", "counts"),
}
_GROUP = 1024
"""Samples of a row group."""


def parquet() -> Any:
    """pyarrow.parquet; MissingExtra without it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("Parquet", "pyarrow", "parquet") from None
    return pyarrow.parquet


def write_parquet(labels: StoredLabels, path: Path) -> int:
    """Write every sample; the number of rows. Columns: ``id``, and lists of the sample's rows.

    dense: ``logits``; topk: ``indices``, ``log_probs``, ``log_rest``, as they are kept, before they are scaled to sum to one;
    sampled: ``indices``, ``counts``.

    Raises ConfigError for hidden states and named features, which are no table: copy the directory.
    """
    if labels.form.kind == "hidden" or any(labels.about["features"].values()):
        raise ConfigError(
            "hidden states and features have no place in Parquet; expected logits or what stands for them"
        )
    import pyarrow as pa

    pq, rows = parquet(), 0
    about = {name: labels.about[name] for name in ("version", "form", "row_shape", "fingerprint", "samples")}
    about["recipe"] = next((manifest.get("recipe") for manifest in labels.manifests), None)
    about["data"] = [pair for manifest in labels.manifests for pair in manifest["data"]]
    half = path.with_name(f".{path.name}.part")
    writer = None
    try:
        for number in range(len(labels.manifests)):
            kept = labels.raw(number)
            rows += int(kept.counts.sum())
            table = pa.table(_columns(pa, labels.form, kept)).replace_schema_metadata(
                {ABOUT: json.dumps(about)}
            )
            writer = writer or pq.ParquetWriter(half, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=_GROUP)
        if writer is None:
            raise ConfigError(f"{labels.place} holds no sample; expected some to export")
        writer.close()
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    return rows


def _columns(pa: Any, form: Form, kept: Rows) -> dict[str, Any]:
    arrays = dict(kept.arrays)
    ends = torch.nn.functional.pad(kept.counts.cumsum(0), (1, 0)).int().numpy()

    def each(values: Any) -> Any:
        return pa.ListArray.from_arrays(ends, values)

    def fixed(values: Tensor) -> Any:
        return pa.FixedSizeListArray.from_arrays(values.reshape(-1).numpy(), values.shape[-1])

    found: dict[str, Any] = {"id": kept.ids.numpy()}
    if form.kind == "dense":
        logits = arrays["logits"].float()
        logits = logits + arrays["shift"][:, None] if "shift" in arrays else logits
        return {**found, "logits": each(fixed(logits))}
    indices = from_three_bytes(arrays["indices"]).int()
    if form.kind == "topk":
        table = byte_table() if form.dtype == "uint8" else None
        logs = {
            name: table[arrays[name].int()] if table is not None else arrays[name].float()
            for name in ("log_probs", "log_rest")
        }
        return {
            **found,
            "indices": each(fixed(indices)),
            "log_probs": each(fixed(logs["log_probs"])),
            "log_rest": each(logs["log_rest"].numpy()),
        }
    inner = torch.nn.functional.pad(arrays["distinct"].long().cumsum(0), (1, 0)).int().numpy()
    counts = arrays["counts"].int().numpy()
    return {
        **found,
        "indices": each(pa.ListArray.from_arrays(inner, indices.numpy())),
        "counts": each(pa.ListArray.from_arrays(inner, counts)),
    }


def read_any(source: Path, where: Place | Path, made_from: Mapping[str, str]) -> StoredLabels:
    """Import a Parquet file that ``write_parquet`` wrote, or a directory that DistillKit wrote, into an empty place.

    made_from
        What the labels were made from (``teacher``, ``tokenizer``, ``data``), where the source does not say; a field that
        nobody says is none, and a run that asks for it is refused.
    """
    from stillhouse.softlabels.distillkit import is_distillkit, read_distillkit

    where = place(where)
    if STORE in where.names():
        raise ConfigError(f"{where} holds soft labels already; expected a new directory")
    if is_distillkit(source):
        return read_distillkit(source, where, made_from)
    return _read_parquet(source, where, made_from)


def _read_parquet(source: Path, where: Place, made_from: Mapping[str, str]) -> StoredLabels:
    pq = parquet()
    try:
        file = pq.ParquetFile(source)
        about = json.loads((file.schema_arrow.metadata or {}).get(ABOUT, b"null"))
    except (OSError, ValueError) as error:
        raise DamagedFile(f"Parquet {source} can't be read: {error}") from None
    if not isinstance(about, dict):
        raise ConfigError(
            f"Parquet {source} says nothing of soft labels (metadata '{ABOUT.decode()}'); expected a file that 'labels export' "
            "wrote, or DistillKit's directory"
        )
    form = Form.read(about["form"])
    missing = {"id", *_LISTED[form.kind]} - set(file.schema_arrow.names)
    if missing:
        raise ConfigError(
            f"Parquet {source} has no column '{min(missing)}'; expected {', '.join(_LISTED[form.kind])}"
        )
    fingerprint = {**about["fingerprint"], **made_from}
    _once(source, file)

    def parts() -> Iterator[Rows]:
        for batch in file.iter_batches(_GROUP):
            yield _from_columns(form, batch)

    return store(
        where, form, parts(), fingerprint, about["row_shape"], list(map(tuple, about.get("data", []))),
        samples=int(about.get("samples", 0)), recipe=about.get("recipe"),
    )  # fmt: skip


def _once(source: Path, file: Any) -> None:
    """Raise DamagedFile unless every row has a number of its own."""
    ids = file.read(columns=["id"]).column("id")
    if ids.null_count or not str(ids.type).startswith(("int", "uint")):
        raise DamagedFile(
            f"Parquet {source}: column 'id' is {ids.type} with {ids.null_count} empty; expected a number a row"
        )
    known = torch.from_numpy(ids.to_numpy().astype("int64")).sort().values
    twice = (known.diff() == 0).nonzero()
    if len(twice):
        raise DamagedFile(
            f"Parquet {source} holds sample {int(known[twice[0, 0]])} twice; expected each once"
        )
    if len(known) and int(known[0]) < 0:
        raise DamagedFile(f"Parquet {source} holds sample {int(known[0])}; expected 0 or above")


def _from_columns(form: Form, batch: Any) -> Rows:
    ids = torch.from_numpy(batch.column("id").to_numpy().copy())
    lists = {name: batch.column(name) for name in _LISTED[form.kind]}
    first = next(iter(lists.values()))
    counts = torch.from_numpy(first.value_lengths().to_numpy().copy()).long()
    flat = {name: column.flatten() for name, column in lists.items()}

    def numbers(name: str) -> Tensor:
        values = flat[name]
        while hasattr(values, "flatten") and str(values.type).startswith(("list", "fixed_size_list")):
            values = values.flatten()
        return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())

    if form.kind == "dense":
        logits = numbers("logits").reshape(-1, form.outputs)
        if form.dtype == "float32":
            return Rows(ids, counts, {"logits": logits})
        shift = logits.amax(-1)
        return Rows(ids, counts, {"logits": (logits - shift[:, None]).half(), "shift": shift})
    indices = three_bytes(numbers("indices").long())
    if form.kind == "sampled":
        distinct = torch.from_numpy(flat["counts"].value_lengths().to_numpy().copy())
        arrays = {"counts": numbers("counts"), "distinct": distinct}
        arrays = {name: value.to(form.torch_dtype) for name, value in arrays.items()}
        return Rows(ids, counts, {"indices": indices, **arrays})
    code: Callable[[Tensor], Tensor] = (
        one_byte if form.dtype == "uint8" else lambda values: values.to(form.torch_dtype)
    )
    return Rows(
        ids,
        counts,
        {
            "indices": indices.reshape(-1, form.k, 3),
            "log_probs": code(numbers("log_probs")).reshape(-1, form.k),
            "log_rest": code(numbers("log_rest")),
        },
    )


def store(
    where: Place,
    form: Form,
    parts: Iterator[Rows],
    fingerprint: Mapping[str, str],
    row_shape: list[int] | None,
    data: list[tuple[int, str]] | None = None,
    *,
    samples: int = 0,
    recipe: Mapping[str, Any] | None = None,
) -> StoredLabels:
    """Write a store from parts of samples that come in order.

    data
        Digests of the rows' data with how many samples each is of; shards then end where they do.
    samples
        How many there should be: those of an incomplete store stay incomplete. At least those that come.
    recipe
        What is known of how the rows were made, see ``publish``.
    """
    sizes = [int(count) for count, _ in data or ()]
    waiting: list[Rows] = []
    total, shard = 0, 0
    for part in parts:
        waiting.append(part)
        while waiting and (size := _ready(waiting, form, sizes[shard] if shard < len(sizes) else None)):
            joined = Rows.joined(waiting)
            now, rest = cut(form, joined, size)
            here = [data[shard]] if data and shard < len(data) else []
            publish(where, form, now, row_shape, with_data(fingerprint, here), here, recipe)
            total, shard = total + len(now.ids), shard + 1
            waiting = [rest] if len(rest.ids) else []
    if waiting:
        joined = Rows.joined(waiting)
        publish(where, form, joined, row_shape, fingerprint, recipe=recipe)
        total += len(joined.ids)
    describe(where, form, fingerprint, samples=max(total, samples), row_shape=row_shape)
    return StoredLabels(where)


def _ready(waiting: list[Rows], form: Form, wanted: int | None) -> int:
    """Samples of the next shard; 0 while there are not enough."""
    there = sum(len(part.ids) for part in waiting)
    if wanted is not None:
        return wanted if there >= wanted else 0
    rows = sum(int(part.counts.sum()) for part in waiting)
    return there if there >= SHARD_SAMPLES or rows * form.row_bytes >= SHARD_BYTES else 0


def cut(form: Form, rows: Rows, at: int) -> tuple[Rows, Rows]:
    """The first ``at`` samples, and the others; without features."""
    upto = int(rows.counts[:at].sum())
    entries = int(rows.arrays["distinct"][:upto].long().sum()) if form.kind == "sampled" else upto

    def where(name: str) -> int:
        return entries if form.kind == "sampled" and name != "distinct" else upto

    first = {name: value[: where(name)] for name, value in rows.arrays.items()}
    rest = {name: value[where(name) :] for name, value in rows.arrays.items()}
    return Rows(rows.ids[:at], rows.counts[:at], first), Rows(rows.ids[at:], rows.counts[at:], rest)
