"""The same labels in other shards: after many appended or imported ones, or to pack them."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.errors import ConfigError
from stillhouse.softlabels.fingerprint import with_data
from stillhouse.softlabels.forms import Form
from stillhouse.softlabels.places import Place
from stillhouse.softlabels.shard import Rows, publish
from stillhouse.softlabels.store import SHARD_BYTES, SHARD_SAMPLES, STORE, StoredLabels, describe


def compact(labels: StoredLabels, where: Place, *, packed: bool = False) -> StoredLabels:
    """Write the labels into an empty place, neighbouring shards together up to 32 MiB; every number stays as it is.

    Raises ConfigError where a store lies there already, or the form can't be packed.
    """
    if STORE in where.names():
        raise ConfigError(f"{where} holds soft labels already; expected a new directory")
    old = labels.form
    form = Form.choose(old.outputs, old.kind, old.dtype, old.k or None, width=old.width, packed=packed)
    about = labels.about
    shared = {name: value for name, value in about["fingerprint"].items() if name != "data"}
    for group in _groups(labels):
        rows = Rows.joined([labels.raw(number) for number in group])
        data = [
            (int(count), digest) for number in group for count, digest in labels.manifests[number]["data"]
        ]
        recipe = labels.manifests[group[0]].get("recipe")
        publish(where, form, rows, about["row_shape"], with_data(shared, data), data, recipe)
    known = ("version", "form", "row_shape", "features", "fingerprint", "samples", "head", "seal")
    describe(
        where,
        form,
        shared,
        samples=about["samples"],
        row_shape=about["row_shape"],
        per_row=about["features"]["per_row"],
        per_sample=about["features"]["per_sample"],
        head=labels.head(),
        **{name: value for name, value in about.items() if name not in known},
    )
    return StoredLabels(where)


def _groups(labels: StoredLabels) -> Iterator[list[int]]:
    """Numbers of shards that go into one."""
    group: list[int] = []
    size = count = 0
    for number, manifest in enumerate(labels.manifests):
        more, samples = int(manifest["bytes"]), int(manifest["ids"]["count"])
        if group and (size + more > SHARD_BYTES or count + samples > SHARD_SAMPLES):
            yield group
            group, size, count = [], 0, 0
        group.append(number)
        size, count = size + more, count + samples
    if group:
        yield group
