"""A store of soft labels: shards on disk or at a URI, read through memory maps, found by sample id."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from stillhouse.contract.splits import Split
from stillhouse.errors import CheckpointError, ConfigError, DamagedFile, DataError
from stillhouse.softlabels.base import SoftLabels
from stillhouse.softlabels.fingerprint import check_same, differs, parts_digests, with_data
from stillhouse.softlabels.forms import Form, Labels, decode, decoded, moved, shaped, spread
from stillhouse.softlabels.pages import Held, most_files
from stillhouse.softlabels.places import Place, sealed, sha256, unsealed
from stillhouse.softlabels.schema import check_store
from stillhouse.softlabels.shard import PREFIX, VERSION, Rows, Shard, read_manifest, samples, segments

STORE, HEAD = "store.json", "head.safetensors"
SHARD_BYTES, SHARD_SAMPLES = 32 * 2**20, 16_384
"""The most of a shard."""
_RELABEL = "label again, or use the data that made them"


class StoredLabels(SoftLabels):
    """A store on disk or at a URI. Each shard's digest is checked when it is first read."""

    def __init__(self, where: Place) -> None:
        self.place = where
        names = set(where.names())
        if STORE not in names:
            raise DamagedFile(
                f"soft labels {where} can't be read: there is no {STORE}; expected a directory that 'stillhouse label' wrote"
            )
        self.about = unsealed(where.read(STORE), f"soft labels {where}/{STORE}")
        if self.about.get("version") != VERSION:
            raise DamagedFile(
                f"soft labels {where} are of version {self.about.get('version')}; expected {VERSION}"
            )
        check_store(self.about, f"soft labels {where}/{STORE}")
        self.form = Form.read(self.about["form"])
        self.data = str(self.about.get("data", "all"))
        shape = self.about["row_shape"]
        self._shape = None if shape is None else tuple(shape)
        self._alike = shape is not None and not self.form.packed and self.form.kind != "sampled"
        shards = sorted(name for name in names if name.startswith(PREFIX) and name.endswith(".json"))
        self.manifests = [read_manifest(where, name) for name in shards]
        for manifest in self.manifests:
            _one_kind(where, self.about, manifest)
        self.fingerprint = {**self.about["fingerprint"], **_data(self.manifests)}
        self._opened: dict[int, Shard] = {}
        self._sound: set[int] = set()
        """Shards whose digest was checked."""
        self._held, self._mapped = Held(), 0
        self._head: tuple[Tensor, Tensor | None] | None = None
        self._index()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy for a data loader's worker opens the store anew."""
        return SoftLabels.open, (str(self.place),)

    def _index(self) -> None:
        self.manifests.sort(key=lambda manifest: manifest["ids"]["first"])
        firsts = torch.tensor([manifest["ids"]["first"] for manifest in self.manifests], dtype=torch.long)
        counts = torch.tensor([manifest["ids"]["count"] for manifest in self.manifests], dtype=torch.long)
        self._count = int(counts.sum())
        self._each = sum(int(manifest["bytes"]) for manifest in self.manifests) // max(1, self._count)
        self._ids: Tensor | None = None
        if all(manifest["ids"]["contiguous"] for manifest in self.manifests):
            self._firsts, self._ends = firsts, firsts + counts
            self._lengths = counts.numpy().view(np.uint64)
            twice = (self._ends[:-1] > firsts[1:]).nonzero()
            if len(twice):
                self._refuse_twice(int(firsts[int(twice[0, 0]) + 1]))
            return
        found = [self._shard_ids(number) for number in range(len(self.manifests))]
        shard = torch.repeat_interleave(torch.arange(len(counts)), counts)
        position = torch.cat([torch.arange(len(ids)) for ids in found])
        self._ids, order = torch.cat(found).sort(stable=True)
        twice = (torch.diff(self._ids) == 0).nonzero()
        if len(twice):
            self._refuse_twice(int(self._ids[int(twice[0, 0])]))
        self._shard, self._position = shard[order], position[order]

    def _shard_ids(self, number: int) -> Tensor:
        ids = self.manifests[number]["ids"]
        if ids["contiguous"]:
            return torch.arange(ids["first"], ids["first"] + ids["count"])
        return self._open(number).tensors["ids"].clone()

    def _refuse_twice(self, sample: int) -> None:
        raise DamagedFile(
            f"soft labels {self.place} hold sample {sample} in two shards; expected once: remove one of them"
        )

    def __len__(self) -> int:
        return self._count

    def __str__(self) -> str:
        return str(self.place)

    def count(self, first: int, stop: int) -> int:
        if self._ids is not None:
            ends = torch.searchsorted(self._ids, torch.tensor([first, max(first, stop)]))
            return int(ends[1] - ends[0])
        return int((self._ends.clamp(max=stop) - self._firsts.clamp(min=first)).clamp(min=0).sum())

    @property
    def ids(self) -> Tensor:
        """Every sample's id, rising ``(samples,)``."""
        if self._ids is not None:
            return self._ids
        return segments(self._firsts, self._ends - self._firsts)

    def _find(self, asked: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        """Each sample's shard and position in it."""
        known = (self._firsts if self._ids is None else self._ids).numpy()
        if not len(known):
            at, wrong = np.zeros_like(asked), np.ones(len(asked), dtype=bool)
        elif self._ids is None:
            at = known.searchsorted(asked, "right") - 1
            within = asked - known[at]
            wrong = within.view(np.uint64) >= self._lengths[at]  # below 0 is above all
        else:
            at = known.searchsorted(asked).clip(max=len(known) - 1)
            wrong = known[at] != asked
        if wrong.any():
            raise DataError(
                f"sample {int(asked[wrong][0])} is not in soft labels {self.place}, which hold {len(self):,} samples; label "
                "the rest into the same directory, or check that the ids are those of this data set"
            )
        return (at, within) if self._ids is None else (self._shard.numpy()[at], self._position.numpy()[at])

    def _open(self, number: int) -> Shard:
        found = self._opened.get(number)
        if found is None:
            if len(self._opened) >= most_files():  # the one that was opened first
                self._mapped -= self._opened.pop(next(iter(self._opened))).size
            found = Shard(self.place, self.manifests[number], trusted=number in self._sound)
            self._opened[number] = found
            self._sound.add(number)
            self._mapped += found.size
        return found

    def _groups(self, ids: Tensor) -> list[tuple[Shard, Any, Any]]:
        """The shards of these samples, each with the places in ``ids`` and in the shard; at least one, if there is any."""
        numbers, positions = self._find(ids.numpy())
        if not len(ids):
            return [(self._open(0), numbers, positions)]
        if len(self.manifests) == 1 or (numbers == numbers[0]).all():
            return [(self._open(int(numbers[0])), np.arange(len(ids)), positions)]
        order = numbers.argsort(kind="stable")
        ends = [*np.flatnonzero(np.diff(numbers[order])) + 1, len(ids)]
        found, start = [], 0
        for end in ends:
            where = order[start:end]
            found.append((self._open(int(numbers[where[0]])), where, positions[where]))
            start = end
        return found

    def _parts(self, ids: Tensor) -> list[tuple[Shard, Tensor, Tensor]]:
        """``_groups`` with tensors."""
        return [(shard, torch.from_numpy(a), torch.from_numpy(b)) for shard, a, b in self._groups(ids)]

    def _settle(self, samples: int) -> None:
        if self._held.too_much(samples, self._each, self._mapped):
            for shard in self._opened.values():
                shard.forget()

    def counts(self, ids: Tensor) -> Tensor:
        """Rows of each sample ``(B,)``."""
        ids = ids.cpu()
        found = torch.empty_like(ids)
        for shard, where, positions in self._parts(ids):
            found[where] = shard.row_counts(positions)
        return found

    def lookup(self, ids: Tensor, mask: Tensor | None = None) -> Labels:
        device, ids = ids.device, ids.cpu()
        shape = self._shape
        if self._alike and (mask is None or not shape or tuple(mask.shape[1:]) == shape):
            return moved(self._stretch(ids), device)
        counts, labels = self._rows(ids)
        return moved(self._placed(labels, ids, counts, mask), device)

    def rows(self, ids: Tensor) -> Labels:
        """The answers to these samples, their rows one behind the other ``(rows, ...)``, with no padding."""
        return self._rows(ids.cpu())[1]

    def _stretch(self, ids: Tensor) -> Labels:
        """The answers to samples of one size, each a stretch of bytes."""
        groups = self._groups(ids)
        if len(groups) == 1:
            shard, _, positions = groups[0]
            arrays = {name: value.take(positions, 0) for name, value in shard.stretches.items()}
        else:
            like = groups[0][0].stretches
            arrays = {
                name: np.empty((len(ids), *value.shape[1:]), value.dtype) for name, value in like.items()
            }
            for shard, where, positions in groups:
                for name, value in shard.stretches.items():
                    arrays[name][where] = value[positions]
        self._settle(len(ids))
        return decoded(self.form, arrays, self.head())

    def _rows(self, ids: Tensor) -> tuple[Tensor, Labels]:
        groups = self._parts(ids)
        parts = [
            (where, shard.row_counts(positions), shard.take(positions)) for shard, where, positions in groups
        ]
        counts, arrays = self._merged(len(ids), parts)
        self._settle(len(ids))
        return counts, decode(self.form, arrays, self.head())

    def _merged(
        self, samples: int, parts: list[tuple[Tensor, Tensor, dict[str, Tensor]]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The shards' arrays as one, in the order of the samples that were asked for."""
        if len(parts) == 1:
            return parts[0][1], parts[0][2]
        counts = torch.zeros(samples, dtype=torch.long)
        for where, each, _ in parts:
            counts[where] = each
        order = torch.cat([where for where, _, _ in parts])
        joined = {name: torch.cat([part[name] for _, _, part in parts]) for name in self.form.fields}
        rows = _order(order, torch.cat([each for _, each, _ in parts]))
        if self.form.kind != "sampled":
            return counts, {name: torch.index_select(value, 0, rows) for name, value in joined.items()}
        distinct = joined["distinct"].long()
        starts = distinct.cumsum(0) - distinct
        entries = segments(starts[rows], distinct[rows])
        return counts, {
            "distinct": joined["distinct"][rows],
            "indices": joined["indices"][entries],
            "counts": joined["counts"][entries],
        }

    def _placed(self, labels: Labels, ids: Tensor, counts: Tensor, mask: Tensor | None) -> Labels:
        shape = self.about["row_shape"]
        if shape is not None and (mask is None or not shape or tuple(mask.shape[1:]) == tuple(shape)):
            return shaped(labels, (len(ids), *shape))
        return spread(labels, self._mask(ids, counts, mask))

    def _mask(self, ids: Tensor, counts: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            longest = int(counts.max()) if len(counts) else 0
            return torch.arange(longest)[None, :] < counts[:, None]
        mask = mask.cpu()
        asked = mask.reshape(len(ids), -1).sum(-1)
        if not torch.equal(asked, counts):
            wrong = int((asked != counts).nonzero()[0, 0])
            raise DataError(
                f"sample {int(ids[wrong])} has {int(counts[wrong])} rows in soft labels {self.place}, and "
                f"{int(asked[wrong])} in this batch's mask; expected the same: use the data, the tokenizer and the mask that "
                "they were made with"
            )
        return mask

    def features(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        names = self.about["features"]
        if not names["per_row"] and not names["per_sample"]:
            return {}
        device, ids = ids.device, ids.cpu()
        parts = []
        for shard, where, positions in self._parts(ids):
            parts.append((where, shard.row_counts(positions), *shard.features(positions)))
        self._settle(len(ids))
        order = torch.cat([part[0] for part in parts])
        each = torch.cat([part[1] for part in parts])
        counts = torch.empty_like(each)
        counts[order] = each
        back, rows, found = order.argsort(), _order(order, each), {}
        for name in names["per_sample"]:
            found[name] = torch.cat([part[3][name] for part in parts])[back].to(device)
        for name in names["per_row"]:
            value = torch.cat([part[2][name] for part in parts])[rows]
            placed = self._placed(value, ids, counts, mask)
            assert isinstance(placed, Tensor)
            found[name] = placed.to(device)
        return found

    def head(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight ``(outputs, width)`` and bias of the teacher's head, for hidden states."""
        if self.form.kind == "hidden" and self._head is None:
            content = self.place.read(HEAD)
            if sha256(content) != self.about["head"]:
                raise DamagedFile(
                    f"soft labels {self.place}: {HEAD} was changed or damaged since it was written"
                )
            tensors = load(content)
            self._head = tensors["weight"], tensors.get("bias")
        return self._head

    def blocks(self, size: int = 4096) -> Iterator[tuple[Tensor, Labels]]:
        for ids in torch.split(self.ids, size):
            yield ids, self.lookup(ids)

    # Whether they are what is asked for.

    def check_whole(self) -> None:
        """Raise CheckpointError unless every sample of the data set is there."""
        expected = self.about["samples"]
        if len(self) != expected:
            raise CheckpointError(
                f"soft labels {self.place} hold {len(self):,} of {expected:,} samples; label the rest into the same directory"
            )

    def check(
        self,
        *,
        teacher: str | None = None,
        tokenizer: str | None = None,
        transform: str = "none",
        temperature: str = "1",
        split: Split | None = None,
    ) -> None:
        """Raise CheckpointError where they were made from something else, naming the field, what is stored and asked.

        teacher, tokenizer
            Digests (``models.integrity.digest``, ``fingerprint.tokenizer_digest``); None is not compared.
        split
            The data: every row of every shard is hashed, and the first shard that differs is named.
        """
        asked = {
            "teacher": teacher,
            "tokenizer": tokenizer,
            "transform": transform,
            "temperature": temperature,
        }
        for field, value in asked.items():
            stored = self.about["fingerprint"].get(field)
            if value is not None and stored != value:
                raise differs(str(self.place), field, stored, value)
        if split is not None and not hasattr(split, "batch"):
            raise ConfigError(
                f"split is a {type(split).__name__}; expected a split, such as DatasetSplit(data, fixed=True, collate=..., "
                "kind=...): the labels are bound to what the teacher reads of its batches"
            )
        if split is not None:
            self._check_data(split)

    def _check_data(self, split: Split) -> None:
        for number, manifest in enumerate(self.manifests):
            ids = self._shard_ids(number)
            where, stored = f"{self.place} ({samples(manifest)})", manifest["fingerprint"].get("data")
            if int(ids.max()) >= len(split):
                raise differs(where, "data", f"sample {int(ids.max())}", f"{len(split)} samples", _RELABEL)
            if not manifest["data"]:
                raise differs(
                    where,
                    "data",
                    stored,
                    "the rows of this data set",
                    "import them with the data they belong to",
                )
            asked = with_data({}, parts_digests(split, ids, manifest["data"]))["data"]
            if stored != asked:
                raise differs(where, "data", stored, asked, _RELABEL)

    def raw(self, number: int) -> Rows:
        """What is kept of the samples of one shard, as it is kept."""
        shard = self._open(number)
        positions = torch.arange(shard.count)
        per_row, per_sample = shard.features(positions)
        ids = self._shard_ids(number)
        return Rows(ids, shard.row_counts(positions), shard.take(positions), per_row, per_sample)


def _order(order: Tensor, each: Tensor) -> Tensor:
    """Row numbers that bring the rows of samples, standing in ``order``, into the order of the samples."""
    starts, back = each.cumsum(0) - each, order.argsort()
    return segments(starts[back], each[back])


def _one_kind(where: Place, about: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    same = ["form", "features", "row_shape"]
    if about.get("recipe") is not None and manifest.get("recipe") is not None:
        same.append("recipe")
    stored = {key: json.dumps(manifest[key], sort_keys=True) for key in same}
    asked = {key: json.dumps(about[key], sort_keys=True) for key in same}
    made_from = {name: value for name, value in manifest["fingerprint"].items() if name != "data"}
    if about["fingerprint"].get("data") is not None:
        made_from = dict(manifest["fingerprint"])
    check_same(f"{where}/{manifest['file']}", {**stored, **made_from}, {**asked, **about["fingerprint"]})


def _data(manifests: list[dict[str, Any]]) -> dict[str, str]:
    """The digest of all rows: that of the shards' digests."""
    found = [str(manifest["fingerprint"].get("data")) for manifest in manifests]
    if len(set(found)) == 1:
        return {"data": found[0]}
    return {"data": sha256(" ".join(found).encode())[:16]} if found else {}


def describe(
    where: Place,
    form: Form,
    fingerprint: Mapping[str, str],
    *,
    samples: int,
    row_shape: list[int] | None,
    per_row: list[str] | None = None,
    per_sample: list[str] | None = None,
    head: tuple[Tensor, Tensor | None] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write what all shards have in common, and the teacher's head, and return it."""
    about: dict[str, Any] = {
        "version": VERSION,
        "form": form.about(),
        "row_shape": row_shape,
        "features": {"per_row": sorted(per_row or ()), "per_sample": sorted(per_sample or ())},
        "fingerprint": dict(fingerprint),
        "samples": samples,
        "head": None,
        **more,
    }
    if head is not None:
        named = {"weight": head[0]} | ({} if head[1] is None else {"bias": head[1]})
        content = save({name: value.detach().cpu().contiguous() for name, value in named.items()})
        where.write(HEAD, content)
        about["head"] = sha256(content)
    where.write(STORE, sealed(about))
    return about
