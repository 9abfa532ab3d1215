"""What stands in a store's files, checked: a store may come from another writer, or from somebody who means harm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from stillhouse.errors import ConfigError, DamagedFile
from stillhouse.softlabels.codes import whole_numbers
from stillhouse.softlabels.forms import Form

Count = Annotated[int, Field(ge=0, lt=2**62)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_STRICT = ConfigDict(extra="allow", strict=True)
_LOOKED_AT = 2**18
"""Entries at a time."""
PLANES = {"indices": 3, "log_probs": 0, "counts": 0, "log_rest": 0, "distinct": 0}
"""Planes of each field of a packed block; 0: as many as its dtype has bytes."""


@with_config(_STRICT)
class _Ids(TypedDict):
    first: Count
    last: Count
    count: Annotated[int, Field(ge=1, lt=2**62)]
    contiguous: bool


@with_config(_STRICT)
class _Features(TypedDict):
    per_row: list[str]
    per_sample: list[str]


@with_config(_STRICT)
class _Recipe(TypedDict):
    batch_size: Count
    seed: Count
    feature_dtype: str


@with_config(_STRICT)
class _Shared(TypedDict):
    version: Literal[1]
    form: dict[str, Any]
    row_shape: list[Count] | None
    features: _Features
    fingerprint: dict[str, str]
    recipe: NotRequired[_Recipe | None]


@with_config(_STRICT)
class _Store(_Shared):
    samples: Count
    head: Digest | None


@with_config(_STRICT)
class _Manifest(_Shared):
    file: str
    bytes: Count
    sha256: Digest
    ids: _Ids
    rows: Count
    data: list[Annotated[list[Any], Field(min_length=2, max_length=2)]]


_OF_STORE, _OF_SHARD = TypeAdapter(_Store), TypeAdapter(_Manifest)


def check_store(found: Mapping[str, Any], what: str) -> None:
    """Raise DamagedFile unless this is what ``store.json`` holds."""
    _check(_OF_STORE, found, what)


def check_manifest(found: Mapping[str, Any], name: str, what: str) -> None:
    """Raise DamagedFile unless this is the manifest of the shard ``name``."""
    _check(_OF_SHARD, found, what)
    ids, shape, problem = found["ids"], found["row_shape"], ""
    if found["file"] != name.removesuffix(".json") + ".safetensors":  # a file beside it, and no other
        problem = f"file is {found['file']!r:.80}"
    elif ids["contiguous"] and ids["last"] - ids["first"] + 1 != ids["count"]:
        problem = f"ids {ids['first']} to {ids['last']} are not {ids['count']}"
    elif shape is not None and int(np.prod(shape, dtype=object)) * ids["count"] != found["rows"]:
        problem = f"{ids['count']} samples of {shape} rows are not {found['rows']}"
    elif not all(
        isinstance(count, int) and count > 0 and isinstance(data, str) for count, data in found["data"]
    ):
        problem = "data is no list of numbers of samples with digests"
    if problem:
        raise DamagedFile(f"{what} can't be used: {problem}")


def _check(kind: TypeAdapter[Any], found: Mapping[str, Any], what: str) -> None:
    try:
        kind.validate_python(dict(found))
        Form.read(found["form"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedFile(f"{what} can't be used: {where}: {first['msg'].lower()}") from None
    except ConfigError as error:
        raise DamagedFile(f"{what} can't be used: form: {error}") from None


def check_tensors(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], form: Form, what: str) -> None:
    """Raise DamagedFile unless a shard's tensors are what its manifest says, with class numbers that the model has.

    The losses don't look at them again.
    """
    for name, problem in _problems(tensors, manifest, form):
        raise DamagedFile(f"{what} can't be used: tensor {name} {problem}")


def _problems(
    tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], form: Form
) -> Iterator[tuple[str, str]]:
    samples, rows = manifest["ids"]["count"], manifest["rows"]
    for name, dtype, shape in _expected(tensors, manifest, form):
        value = tensors.get(name)
        if value is None:
            yield name, "is missing"
        elif value.dtype != dtype or (shape is not None and tuple(value.shape) != shape):
            yield name, f"is {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}"
        elif name in ("rows", "entries", "blocks") and (int(value[0]) != 0 or bool((value.diff() < 0).any())):
            yield name, "does not rise from 0"
    if "ids" in tensors and len(torch.unique(tensors["ids"])) != samples:
        yield "ids", "holds an id twice"
    if manifest["row_shape"] is None and int(tensors["rows"][-1]) != rows:
        yield "rows", f"ends at {int(tensors['rows'][-1])}, expected {rows}"
    if form.packed and int(tensors["blocks"][-1]) > len(tensors["packed"]):
        yield "blocks", f"ends at {int(tensors['blocks'][-1])}, and {len(tensors['packed'])} bytes are packed"
    if (
        not form.packed
        and form.kind == "sampled"
        and int(tensors["distinct"].long().sum()) != len(tensors["indices"])
    ):
        yield "distinct", "counts other entries than there are"
    if "indices" in tensors and not form.packed:
        check = class_problem(form, tensors["indices"])
        if check:
            yield "indices", check
    for kind, first in (("per_row", rows), ("per_sample", samples)):
        for feature in manifest["features"][kind]:
            value = tensors.get(f"feature.{feature}")
            if value is None or value.dim() == 0 or len(value) != first:
                yield f"feature.{feature}", f"is missing, or not of {first} {kind[4:]}s"


def class_problem(form: Form, indices: Tensor) -> str:
    """What is wrong with class numbers in three bytes; empty where nothing is."""
    flat = indices.reshape(-1, 3)
    for start in range(0, len(flat), _LOOKED_AT):
        largest = int(whole_numbers(flat[start : start + _LOOKED_AT].numpy()).max())
        if largest >= form.outputs:
            return f"holds class {largest}, and there are {form.outputs}"
    return ""


def _expected(
    tensors: Mapping[str, Tensor], manifest: Mapping[str, Any], form: Form
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...] | None]]:
    """Each tensor's dtype and shape; None: any."""
    samples, rows = manifest["ids"]["count"], manifest["rows"]
    own, k = form.torch_dtype, form.k
    if not manifest["ids"]["contiguous"]:
        yield "ids", torch.int64, (samples,)
    if manifest["row_shape"] is None:
        yield "rows", torch.int64, (samples + 1,)
    entries = 0
    if form.kind == "sampled":
        yield "entries", torch.int64, (samples + 1,)
        ends = tensors.get("entries")
        entries = int(ends[-1]) if ends is not None and ends.dim() == 1 and len(ends) else 0
    if form.packed:
        planes = sum(PLANES[name] or own.itemsize for name in form.fields)
        yield "packed", torch.uint8, None
        yield "blocks", torch.int64, (samples * planes + 1,)
        return
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "logits": (own, (rows, form.outputs)),
        "shift": (torch.float32, (rows,)),
        "hidden": (own, (rows, form.width)),
        "indices": (torch.uint8, (entries, 3) if form.kind == "sampled" else (rows, k, 3)),
        "log_probs": (own, (rows, k)),
        "log_rest": (own, (rows,)),
        "counts": (own, (entries,)),
        "distinct": (own, (rows,)),
    }
    for name in form.fields:
        yield name, *shapes[name]
