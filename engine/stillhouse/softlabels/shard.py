"""A shard: the rows of some samples in one safetensors file, with a JSON manifest that is published after it.

A shard is there when its manifest is. Neither is ever changed; docs/soft-labels.md says what stands in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from stillhouse.errors import DamagedFile, DataError
from stillhouse.files import digest
from stillhouse.softlabels.codes import from_planes, pack, planes, unpack
from stillhouse.softlabels.forms import Form
from stillhouse.softlabels.pages import give_back, mapped
from stillhouse.softlabels.places import Place, sealed, sha256, unsealed
from stillhouse.softlabels.schema import PLANES, check_manifest, check_tensors, class_problem
from stillhouse.softlabels.values import holds_nan, value_problems

VERSION = 1
PREFIX = "shard-"
_LOOKED_AT = 2**24
"""Bytes, about, whose values are checked at a time."""


@dataclass
class Rows:
    """Encoded rows of some samples, on their way to a shard.

    ids
        Sample ids ``(samples,)``.
    counts
        Rows of each sample ``(samples,)``.
    arrays
        What ``encode`` gave, for all rows.
    per_row, per_sample
        Named features: ``(rows, ...)`` and ``(samples, ...)``.
    """

    ids: Tensor
    counts: Tensor
    arrays: dict[str, Tensor]
    per_row: dict[str, Tensor] = field(default_factory=dict)
    per_sample: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The samples of all parts, in order."""

        def join(of: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([part[name] for part in of]) for name in of[0]}

        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.counts for part in parts]),
            join([part.arrays for part in parts]),
            join([part.per_row for part in parts]),
            join([part.per_sample for part in parts]),
        )


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.long().cumsum(0), (1, 0))


def publish(
    place: Place,
    form: Form,
    rows: Rows,
    row_shape: Sequence[int] | None,
    fingerprint: Mapping[str, str],
    data: Sequence[tuple[int, str]] = (),
    recipe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the shard and then its manifest, which is returned.

    data
        Digests of the samples' rows, as ``rows_digest`` makes them, each with how many samples it is of.

    row_shape
        The shape of each sample's rows, equal for all (``()``: one row); None where samples differ in length.
    recipe
        What else their bytes depend on, as ``Recipe.about`` says it; None where nobody knows.
    """
    tensors, first = dict(rows.arrays), int(rows.ids[0])
    contiguous = bool((torch.diff(rows.ids) == 1).all())
    if not contiguous:
        tensors["ids"] = rows.ids
    if row_shape is None:
        tensors["rows"] = _offsets(rows.counts)
    if form.kind == "sampled":
        ends = _offsets(rows.arrays["distinct"])
        tensors["entries"] = ends[_offsets(rows.counts)]
    if form.packed:
        tensors = _packed(form, tensors, rows.counts)
    tensors |= {f"feature.{name}": value for name, value in (rows.per_row | rows.per_sample).items()}
    content = save({name: value.contiguous() for name, value in tensors.items()})
    name = f"{PREFIX}{first:012d}"
    manifest = {
        "version": VERSION,
        "file": f"{name}.safetensors",
        "sha256": sha256(content),
        "bytes": len(content),
        "ids": {
            "first": first,
            "last": int(rows.ids.max()),
            "count": len(rows.ids),
            "contiguous": contiguous,
        },
        "rows": int(rows.counts.sum()),
        "row_shape": None if row_shape is None else list(row_shape),
        "form": form.about(),
        "features": {"per_row": sorted(rows.per_row), "per_sample": sorted(rows.per_sample)},
        "fingerprint": dict(fingerprint),
        "data": [[count, found] for count, found in data],
        **({} if recipe is None else {"recipe": dict(recipe)}),
    }
    place.write(f"{name}.safetensors", content)
    place.write(f"{name}.json", sealed(manifest))
    return manifest


def _packed(form: Form, tensors: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
    """Each sample's fields as zstd frames, one behind the other; ``blocks`` says where each begins."""
    frames: list[bytes] = []
    rows = _offsets(counts)
    entries = tensors.get("entries", rows)
    for number in range(len(counts)):
        for name in form.fields:
            ends = entries if form.kind == "sampled" and name != "distinct" else rows
            part = tensors[name][int(ends[number]) : int(ends[number + 1])]
            wide = name == "indices"
            frames += [pack(plane) for plane in planes(part, wide=wide, rising=_rising(form, name))]
    joined = torch.frombuffer(bytearray(b"".join(frames) or b"\0"), dtype=torch.uint8)
    kept = {name: value for name, value in tensors.items() if name not in form.fields}
    return {**kept, "packed": joined, "blocks": _offsets(torch.tensor([len(frame) for frame in frames]))}


def _rising(form: Form, name: str) -> bool:
    return form.dtype == "uint8" and name == "log_probs"


def read_manifest(place: Place, name: str) -> dict[str, Any]:
    """A shard's manifest; DamagedFile where it was changed, naming it."""
    found = unsealed(place.read(name), f"the manifest {place}/{name} of soft labels")
    if found.get("version") != VERSION:
        raise DamagedFile(
            f"soft labels {place}/{name} are of version {found.get('version')}; expected {VERSION}: read them with the "
            "stillhouse that wrote them"
        )
    check_manifest(found, name, f"the manifest {place}/{name} of soft labels")
    return found


def samples(manifest: Mapping[str, Any]) -> str:
    """``samples 0 to 4095``."""
    ids = manifest["ids"]
    return f"samples {ids['first']} to {ids['last']}"


class Shard:
    """A shard's file, mapped into memory.

    trusted
        Its digest was checked before.
    anew
        Look at the file itself, where it lies at a URI, and at no copy of it.
    """

    def __init__(
        self, place: Place, manifest: Mapping[str, Any], *, trusted: bool = False, anew: bool = False
    ) -> None:
        self.manifest = manifest
        self.form = Form.read(manifest["form"])
        self.count = int(manifest["ids"]["count"])
        name, sha = manifest["file"], manifest["sha256"]
        path = place.local(name, sha) if trusted else checked(place, manifest, anew=anew)
        self._what = f"soft labels: shard {manifest['file']} of {place} ({samples(manifest)})"
        try:
            self._map, self.tensors, _ = mapped(path)
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, RecursionError) as error:
            raise DamagedFile(f"{self._what} is no safetensors file: {error}") from None
        shape = manifest["row_shape"]
        self._each = None if shape is None else int(torch.Size(shape).numel())
        if not trusted:
            check_tensors(self.tensors, manifest, self.form, self._what)
            if any(holds_nan(self.tensors[name]) for name in self.form.fields if name in self.tensors):
                self.check_values()
            self.forget()
        # where samples have one size, a sample is one stretch of bytes
        self.alike = shape is not None and not self.form.packed and self.form.kind != "sampled"
        self.stretches = self._stretches(shape) if self.alike else {}

    def _stretches(self, shape: Sequence[int]) -> dict[str, np.ndarray[Any, Any]]:
        """The form's arrays with a sample on the first axis and its rows behind it; bfloat16 as its bits."""
        found = {name: self.tensors[name] for name in self.form.fields}
        return {
            name: (value.view(torch.int16) if value.dtype == torch.bfloat16 else value)
            .reshape(self.count, *shape, *value.shape[1:])
            .numpy()
            for name, value in found.items()
        }

    def row_counts(self, positions: Tensor) -> Tensor:
        """Rows of the samples at these positions of the shard."""
        if self._each is not None:
            return torch.full_like(positions, self._each)
        return self.tensors["rows"][positions + 1] - self.tensors["rows"][positions]

    def _starts(self, positions: Tensor) -> Tensor:
        return positions * self._each if self._each is not None else self.tensors["rows"][positions]

    def take(self, positions: Tensor) -> dict[str, Tensor]:
        """The form's arrays for the rows of these samples, in order."""
        if self.form.packed:
            return self._unpacked(positions)
        rows = self.row_index(positions)
        if self.form.kind != "sampled":
            return {name: torch.index_select(self.tensors[name], 0, rows) for name in self.form.fields}
        ends = self.tensors["entries"]
        entries = segments(ends[positions], ends[positions + 1] - ends[positions])
        return {
            "indices": self.tensors["indices"][entries],
            "counts": self.tensors["counts"][entries],
            "distinct": self.tensors["distinct"][rows],
        }

    def row_index(self, positions: Tensor) -> Tensor:
        """Row numbers, in the shard, of these samples' rows."""
        if self._each == 1:
            return positions
        return segments(self._starts(positions), self.row_counts(positions))

    def features(self, positions: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Named features of these samples: those of each row, and those of each sample."""
        names = self.manifest["features"]
        rows = self.row_index(positions) if names["per_row"] else positions
        return (
            {name: self.tensors[f"feature.{name}"][rows] for name in names["per_row"]},
            {name: self.tensors[f"feature.{name}"][positions] for name in names["per_sample"]},
        )

    def _unpacked(self, positions: Tensor) -> dict[str, Tensor]:
        sizes = self.row_counts(positions).tolist()
        parts = [self._block(int(at), int(size)) for at, size in zip(positions, sizes, strict=True)]
        return {name: torch.cat([part[name] for part in parts]) for name in self.form.fields}

    def _block(self, position: int, rows: int) -> dict[str, Tensor]:
        blocks, packed = self.tensors["blocks"], self.tensors["packed"]
        size = self.form.torch_dtype.itemsize
        planes_of = {name: PLANES[name] or size for name in self.form.fields}
        frame, found = position * sum(planes_of.values()), {}
        entries = rows
        if self.form.kind == "sampled":
            entries = int(self.tensors["entries"][position + 1] - self.tensors["entries"][position])
        for name, count in planes_of.items():
            lead = [rows] if name in ("distinct", "log_rest") or self.form.kind == "topk" else [entries]
            lead += [self.form.k] if self.form.kind == "topk" and name != "log_rest" else []
            each = int(torch.Size(lead).numel())
            ends = blocks[frame : frame + count + 1].tolist()
            kept = [unpack(packed[start:end].numpy().tobytes(), each) for start, end in pairwise(ends)]
            dtype = torch.uint8 if name == "indices" else self.form.torch_dtype
            shape = [*lead, 3] if name == "indices" else lead
            found[name] = from_planes(kept, shape, dtype, rising=_rising(self.form, name))
            frame += count
            if name == "indices" and (problem := class_problem(self.form, found[name])):
                raise DamagedFile(f"{self._what} can't be used: sample number {position} in it {problem}")
            if holds_nan(found[name]):
                raise DamagedFile(
                    f"{self._what} can't be used: sample number {position} in it holds NaN in {name}"
                )
        return found

    def check_values(self) -> None:
        """Raise DamagedFile, naming the first sample whose rows hold what no teacher's answer is."""
        at_once = max(1, _LOOKED_AT * self.count // max(1, self.size))
        for positions in torch.split(torch.arange(self.count), at_once):
            try:
                arrays = self.take(positions)
            except DataError as error:
                raise DamagedFile(f"{self._what} can't be used: {error}") from None
            self._check(positions, arrays)
            self.forget()

    def _check(self, positions: Tensor, arrays: Mapping[str, Tensor]) -> None:
        for bad, problem in value_problems(self.form, arrays):
            if bool(bad.any()):
                row = int(bad.nonzero()[0, 0])
                ends = self.row_counts(positions).cumsum(0)
                at = int(positions[int(torch.searchsorted(ends, row, right=True))])
                sample = (
                    int(self.tensors["ids"][at])
                    if "ids" in self.tensors
                    else self.manifest["ids"]["first"] + at
                )
                raise DamagedFile(f"{self._what} can't be used: sample {sample} {problem}")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return int(self.manifest["bytes"])

    def forget(self) -> None:
        """Give the mapped pages back; they stay in the page cache, and come again when they are read."""
        give_back(self._map)


def segments(starts: Tensor, counts: Tensor) -> Tensor:
    """The numbers ``start, start + 1, ...``, ``count`` of them, for each pair, one behind the other."""
    ends = counts.cumsum(0)
    within = torch.arange(int(ends[-1]) if len(ends) else 0) - torch.repeat_interleave(ends - counts, counts)
    return torch.repeat_interleave(starts, counts) + within


def checked(place: Place, manifest: Mapping[str, Any], *, anew: bool = False) -> Path:
    """The shard's file on this machine, with the digest that its manifest has; a damaged copy is fetched anew.

    Raises DamagedFile, naming the shard and its samples, where it is missing or was changed.
    """
    name, sha = manifest["file"], manifest["sha256"]
    path = place.local(name, sha, anew=anew)
    problem = ""
    if not path.is_file():
        problem = "is missing"
    elif digest(path) != sha and digest(place.local(name, sha, anew=True)) != sha:
        problem = "was changed or damaged since it was written"
    if problem:
        raise DamagedFile(
            f"soft labels: shard {manifest['file']} of {place} ({samples(manifest)}) {problem}; label again into the same "
            "directory, which makes that shard alone"
        )
    return path
