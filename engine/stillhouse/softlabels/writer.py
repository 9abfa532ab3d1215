"""Making a store: what is missing is found, and each range of samples is made by one writer.

What is published is kept: the same call again goes on where a killed one ended, with the same bytes, and makes anew
only shards that are damaged or missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.contract.splits import Split
from stillhouse.errors import ConfigError, DamagedFile, WriteFailed
from stillhouse.softlabels.fidelity import Fidelity
from stillhouse.softlabels.fingerprint import PLAIN, differs, parts_digests, rows_digest, with_data
from stillhouse.softlabels.forms import Form
from stillhouse.softlabels.holding import LOCK, held
from stillhouse.softlabels.label import Answered, Asking, Recipe, check_head, find_head, origin
from stillhouse.softlabels.places import Folder, Place, place, sha256, unsealed
from stillhouse.softlabels.schema import check_store
from stillhouse.softlabels.shard import PREFIX, Shard, publish, read_manifest, samples
from stillhouse.softlabels.store import HEAD, SHARD_BYTES, SHARD_SAMPLES, STORE, StoredLabels, describe

_PROBED = 8
"""Samples that the teacher is asked about first: for shapes, and for the size to expect."""
HELD_OUT = 64
"""Samples, spread over the data, on which what is stored is compared with the exact answer."""


@dataclass(frozen=True)
class Range:
    """Samples ``first`` to ``stop - 1``: what one writer makes one shard of."""

    first: int
    stop: int

    @property
    def ids(self) -> Tensor:
        return torch.arange(self.first, self.stop)

    def __str__(self) -> str:
        return f"samples {self.first} to {self.stop - 1}"


@dataclass
class Plan:
    """A store to be made, and what of it is still to do.

    made_from
        The fingerprint of all shards; a digest of its rows is added to each.
    shape
        Of each sample's rows; None where they differ.
    expected_bytes
        Of the ranges to do, before packing, estimated from the first samples.
    damaged
        Why shards that were there are made again.
    """

    place: Place
    recipe: Recipe
    made_from: dict[str, str]
    shape: tuple[int, ...] | None
    total: int
    shard_samples: int
    expected_bytes: int
    todo: list[Range]
    done: int
    damaged: list[str] = field(default_factory=list)


def plan(
    where: Place,
    asking: Asking,
    split: Split,
    recipe: Recipe,
    *,
    tokenizer: str = "none",
    shard_samples: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> Plan:
    """Look at what is there, refuse what can't be gone on with, and write ``store.json`` where it is missing or grows.

    about
        Further keys of ``store.json``.

    Raises ConfigError or CheckpointError before a sample is labelled: for data that change at every reading, a store of
    another origin or form, and a disk that won't hold it.
    """
    Form.read(recipe.form.about())  # one that was put together by hand may have no meaning
    if not 0 <= recipe.seed < 2**62:
        raise ConfigError(f"seed = {recipe.seed}; expected 0 to 2^62 - 1")
    if not len(split):
        raise ConfigError("there is no sample to label; expected data with one at least")
    if not split.fixed:
        raise ConfigError(
            "the data change at every reading (a random input transform), so a label belongs to no sample; expected fixed "
            "rows: label the data without the transform"
        )
    answered = asking.ask(split.batch(torch.arange(min(_PROBED, len(split)))))
    _same_sizes(answered, recipe.form)
    head = _head(asking, answered) if recipe.form.kind == "hidden" else None
    made_from = {**PLAIN, "teacher": origin(asking.teacher), "tokenizer": tokenizer}
    per_sample = recipe.form.row_bytes * float(answered.counts.float().mean())
    for value in (*answered.per_row.values(), *answered.per_sample.values()):
        per_sample += getattr(torch, recipe.feature_dtype).itemsize * value.numel() / len(answered.counts)
    usual = max(1, min(SHARD_SAMPLES, int(SHARD_BYTES / max(per_sample, 1))))
    more = {
        **(about or {}),
        "shard_samples": shard_samples or usual,
        "recipe": recipe.about(),
    }
    shape = None if answered.shape is None else list(answered.shape)
    features = {"per_row": sorted(answered.per_row), "per_sample": sorted(answered.per_sample)}
    asked = {
        "form": recipe.form.about(),
        "row_shape": shape,
        "features": features,
        "recipe": recipe.about(),
    }
    found = _Found(where)
    stored = found.about()
    if stored is not None:
        _same_store(where, stored, {**asked, "fingerprint": dict(made_from)}, len(split))
        more["shard_samples"] = stored.get("shard_samples", more["shard_samples"])
    found.look(asked, made_from, split, told=stored is not None)
    again = head is not None and stored is not None and not found.has_head(stored["head"])
    todo = missing(found.good, len(split), more["shard_samples"])
    left = sum(part.stop - part.first for part in todo)
    made = Plan(
        where, recipe, made_from, answered.shape, len(split), more["shard_samples"], int(per_sample * left), todo,
        len(split) - left, found.damaged,
    )  # fmt: skip
    _fits(made)
    if stored is None or stored["samples"] != len(split) or again:
        describe(
            where, recipe.form, made_from, samples=len(split), row_shape=shape, **features, head=head, **more
        )
    return made


def _same_sizes(answered: Answered, form: Form) -> None:
    """Raise ConfigError unless the form has as many outputs as the teacher, and hidden states of its width."""
    if not isinstance(answered.answer, Tensor):
        largest = int(answered.answer.indices.max()) if answered.answer.indices.numel() else 0
        if largest >= form.outputs:
            raise ConfigError(
                f"the teacher answers with class {largest}, and the form is for {form.outputs} outputs; expected as many as "
                "the teacher has"
            )
        return
    outputs = answered.answer.shape[-1]
    if outputs != form.outputs:
        raise ConfigError(
            f"the teacher gives {outputs} outputs, and the form is for {form.outputs}; expected the same: "
            f"Form.choose({outputs}, ...)"
        )
    if form.kind == "hidden" and answered.hidden is not None and answered.hidden.shape[-1] != form.width:
        raise ConfigError(
            f"the teacher's hidden states have width {answered.hidden.shape[-1]}, and the form has {form.width}; expected the "
            f"same: width={answered.hidden.shape[-1]}"
        )


def _head(asking: Asking, answered: Any) -> tuple[Tensor, Tensor | None]:
    name, module = find_head(asking.teacher, asking.head)
    check_head(answered, module, name)
    return module.weight, module.bias


def _fits(made: Plan) -> None:
    if not isinstance(made.place, Folder) or not made.todo:
        return
    folder = made.place.path
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < made.expected_bytes:
        raise ConfigError(
            f"{made.place} needs about {size(made.expected_bytes)} for {len(made.todo)} shards, and {size(free)} are free; "
            "free some space, or keep fewer entries (--form, --k)"
        )


class _Found:
    """What lies in a place already."""

    def __init__(self, where: Place) -> None:
        self.place, self.names = where, set(where.names()) - {LOCK}
        self.good: list[Range] = []
        self.damaged: list[str] = []

    def about(self) -> dict[str, Any] | None:
        """What ``store.json`` says; None where it is missing or damaged, and the shards' manifests say it all."""
        if STORE not in self.names:
            if self.names and not any(name.startswith(PREFIX) for name in self.names):
                strange = sorted(name for name in self.names if not name.startswith("."))
                if strange:
                    raise ConfigError(
                        f"{self.place} holds {strange[0]} and no soft labels; expected an empty or a new directory"
                    )
            return None
        try:
            about = unsealed(self.place.read(STORE), f"{self.place}/{STORE}")
            check_store(about, f"{self.place}/{STORE}")
        except DamagedFile as error:
            self.damaged.append(str(error))
            return None
        return about

    def has_head(self, sha: str | None) -> bool:
        """Whether the teacher's head is there as it was written."""
        if HEAD in self.names and sha256(self.place.read(HEAD)) == sha:
            return True
        how = "was changed or damaged" if HEAD in self.names else "is missing"
        self.damaged.append(f"{self.place}/{HEAD} {how}")
        return False

    def look(
        self, asked: Mapping[str, Any], made_from: Mapping[str, str], split: Split, *, told: bool
    ) -> None:
        """Find the shards that are whole; one made otherwise is refused, and a damaged one is made again.

        asked
            What manifests say beside the fingerprint: form, row_shape, features, recipe.
        told
            Whether ``store.json`` said the recipe: shards of earlier versions do not.
        """
        for name in sorted(self.names):
            if not (name.startswith(PREFIX) and name.endswith(".json")):
                continue
            try:
                manifest = read_manifest(self.place, name)
                Shard(self.place, manifest, anew=True).check_values()
            except DamagedFile as error:
                self.damaged.append(str(error))
                continue
            ids = manifest["ids"]
            part = Range(ids["first"], ids["first"] + ids["count"])
            if not ids["contiguous"]:
                raise ConfigError(
                    f"{self.place} holds imported samples; expected a directory that labelling made"
                )
            _same_kind(f"{self.place} ({samples(manifest)})", manifest, asked, told=told)
            if part.stop > len(split):
                raise differs(
                    str(self.place), "data", f"{part.stop} samples or more", f"{len(split)} samples"
                )
            origin_ = with_data(made_from, parts_digests(split, part.ids, manifest["data"]))
            for key, value in origin_.items():
                if manifest["fingerprint"].get(key) != value:
                    where = f"{self.place} ({samples(manifest)})"
                    raise differs(where, key, manifest["fingerprint"].get(key), value)
            self.good.append(part)


def _same_kind(
    where: str, manifest: Mapping[str, Any], asked: Mapping[str, Any], *, told: bool = True
) -> None:
    """Raise CheckpointError where a shard's rows were made otherwise than is asked."""
    known = dict(asked)
    if manifest.get("recipe") is None:
        if not told and asked["form"]["kind"] == "sampled":
            raise ConfigError(
                f"soft labels {where} are draws, and nothing says of which seed: the {STORE} is missing or damaged, and the "
                "shard is of an earlier version; label into a new directory"
            )
        del known["recipe"]
    _same(where, manifest, known)


def _same_store(where: Place, stored: Mapping[str, Any], asked: Mapping[str, Any], total: int) -> None:
    _same(str(where), stored, asked)
    if stored["samples"] > total:
        raise differs(str(where), "data", f"{stored['samples']} samples", f"{total} samples")


def _same(where: str, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for field_name, value in asked.items():
        if stored.get(field_name) == value:
            continue
        here = stored.get(field_name) or {}
        if isinstance(value, dict) and field_name != "features":
            field_name = next((key for key in value if here.get(key) != value[key]), field_name)  # noqa: PLW2901
            raise differs(where, field_name, here.get(field_name), value.get(field_name))
        raise differs(where, field_name, stored.get(field_name), value)


def missing(good: Iterable[Range], total: int, size: int) -> list[Range]:
    """The samples of 0 to ``total - 1`` in no range of ``good``, cut into ranges of at most ``size``."""
    found, at = [], 0
    for part in [*sorted(good, key=lambda part: part.first), Range(total, total)]:
        while at < part.first:
            stop = min(part.first, at + size)
            found.append(Range(at, stop))
            at = stop
        at = max(at, part.stop)
    return found


def make(made: Plan, asking: Asking, split: Split, part: Range) -> dict[str, Any]:
    """Label one range and publish its shard; the manifest."""
    rows = asking.rows(split, part.ids, made.recipe, made.shape)
    data = [(len(part.ids), rows_digest(split, part.ids))]
    shape = None if made.shape is None else list(made.shape)
    try:
        return publish(
            made.place,
            made.recipe.form,
            rows,
            shape,
            with_data(made.made_from, data),
            data,
            made.recipe.about(),
        )
    except WriteFailed as error:
        left = len([other for other in made.todo if other.first >= part.first])
        raise WriteFailed(
            f"{error}; {left} of {len(made.todo)} shards are still to be written, at about "
            f"{size(made.expected_bytes // max(1, len(made.todo)))} each: run the same command again when there is room",
            error.errno,
        ) from None


def labelled(
    made: Plan, asking: Asking, split: Split, say: Callable[[str], None] = lambda message: None
) -> Iterator[dict[str, Any]]:
    """Make every range that is to do, in this process; manifests as they are published."""
    for number, part in enumerate(made.todo):
        yield make(made, asking, split, part)
        say(f"{part}: written ({number + 1} of {len(made.todo)})")


def compare(labels: StoredLabels, asking: Asking, split: Split, batch_size: int) -> dict[str, float]:
    """What is stored beside the exact answer, on samples spread over the data; empty for a teacher that gives no logits."""
    ids = torch.unique(torch.linspace(0, len(split) - 1, min(HELD_OUT, len(split))).long())
    found = Fidelity()
    for some in torch.split(ids, batch_size):
        batch = split.batch(some)
        answered = asking.ask(batch)
        if not isinstance(answered.answer, Tensor):
            return {}
        kept = labels.rows(some)
        found.add(answered.answer.cpu(), kept)
    return found.means()


def label_split(
    where: Place | Path | str,
    teacher: torch.nn.Module,
    split: Split,
    recipe: Recipe,
    *,
    device: torch.device | None = None,
    tokenizer: str = "none",
    shard_samples: int | None = None,
) -> StoredLabels:
    """Label a split from Python objects, in this process; what is published already is kept. See ``plan`` for errors.

    where
        A directory or a URI, held meanwhile by the same lock as ``stillhouse label`` takes: InUse, saying who writes there.
    """
    if isinstance(where, str | Path):
        where = place(where)
    asked = Asking(teacher, device or torch.device("cpu"), recipe.features, recipe.head)
    with asked as asking, held(where):
        made = plan(where, asking, split, recipe, tokenizer=tokenizer, shard_samples=shard_samples)
        for _ in labelled(made, asking, split):
            pass
    return StoredLabels(where)


def size(count: float) -> str:
    """Bytes for a person to read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
