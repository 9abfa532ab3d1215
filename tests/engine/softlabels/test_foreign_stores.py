"""A store by another writer, or by somebody who means harm: refused by name, whatever stands in its files."""

from __future__ import annotations

import copy
import json
import shutil

import making
import pytest
import torch
from making import V, made, tokens
from safetensors.torch import load_file, save_file

from stillhouse.errors import DamagedFile, StillhouseError
from stillhouse.files import digest
from stillhouse.softlabels import Form, SoftLabels
from stillhouse.softlabels.inspection import facts, verify
from stillhouse.softlabels.places import sealed

FORMS = {
    "topk": Form.choose(V, "topk", None, 9),
    "dense": Form.choose(V, "dense"),
    "sampled": Form.choose(V, "sampled", None, 20),
    "packed": Form.choose(V, "topk", None, 9, packed=True),
    "hidden": Form.choose(V, "hidden", width=6),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
NAME = "shard-000000000008"
GONE = object()
WRONG = (GONE, None, "x", -1, [], {}, 10**12, 1.5, True)


def store(folder, form: Form, **given):
    head = {"head": "head"} if form.kind == "hidden" else {}
    return made(folder, form, features=("body",), **head, **given)


def used(folder) -> None:
    """All that reads."""
    labels = SoftLabels.open(folder)
    labels.lookup(torch.arange(30))
    labels.features(torch.arange(30))
    facts(labels)
    assert list(labels.blocks(7))


def paths(value, path=()):
    """Every place in a nested object."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from paths(item, (*path, key))


def changed(content: dict, path: tuple, value: object) -> dict:
    found = copy.deepcopy(content)
    here = found
    for key in path[:-1]:
        here = here[key]
    if value is GONE:
        del here[path[-1]]
    else:
        here[path[-1]] = value
    return found


@pytest.mark.parametrize("file", ["store.json", f"{NAME}.json"])
@pytest.mark.parametrize("form", [FORMS["topk"], FORMS["sampled"]], ids=["topk", "sampled"])
def test_no_value_in_a_description_makes_a_traceback(form, file, tmp_path):
    store(tmp_path, form)
    whole = {k: v for k, v in json.loads((tmp_path / file).read_text()).items() if k != "seal"}
    refused = 0
    for path in paths(whole):
        for value in WRONG:
            (tmp_path / file).write_bytes(sealed(changed(whole, path, value)))
            for act in (used, lambda folder: list(verify(folder))):
                try:
                    act(tmp_path)
                except StillhouseError:
                    refused += 1
    assert refused > 150


def rewritten(folder, change) -> None:
    """A shard with other tensors, and the digest of it in its manifest."""
    path = folder / f"{NAME}.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    manifest = json.loads((folder / f"{NAME}.json").read_text())
    manifest.pop("seal")
    (folder / f"{NAME}.json").write_bytes(sealed({**manifest, "sha256": digest(path)}))


@every_form
def test_tensors_that_are_not_what_the_manifest_says_are_refused(form, tmp_path):
    store(tmp_path / "whole", form)
    used(tmp_path / "whole")
    names = list(load_file(tmp_path / "whole" / f"{NAME}.safetensors"))
    for number, name in enumerate(names):
        changes = {
            "gone": lambda tensors, name=name: tensors.pop(name),
            "shorter": lambda tensors, name=name: tensors.update({name: tensors[name][:-1].clone()}),
            "of another type": lambda tensors, name=name: tensors.update({name: tensors[name].double()}),
        }
        for what, change in changes.items():
            if name.startswith("feature.") and what == "of another type":
                continue
            folder = tmp_path / f"{number} {what}"
            shutil.copytree(tmp_path / "whole", folder)
            rewritten(folder, change)
            with pytest.raises(DamagedFile, match=rf"shard {NAME}\.safetensors of .* \(samples 8 to 15\)"):
                used(folder)
            assert any(problem for _, problem in verify(folder)) or form.packed


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("name", ["topk", "sampled", "packed"])
def test_a_class_that_the_model_has_not_is_refused(name, ragged, tmp_path):
    """The losses trust the numbers, and read what stands behind the model's outputs."""
    form = FORMS[name]
    few = Form(form.kind, form.dtype, V - 1, form.k, packed=form.packed)
    store(tmp_path, form, split=tokens(ragged=ragged))
    for path in tmp_path.glob("*.json"):
        content = json.loads(path.read_text())
        content.pop("seal")
        path.write_bytes(sealed({**content, "form": few.about()}))
    with pytest.raises(DamagedFile, match=f"holds class {V - 1}, and there are {V - 1}"):
        used(tmp_path)


@pytest.mark.parametrize(
    "file", ["../../secret.safetensors", "/etc/passwd", "shard-000000000000.safetensors"]
)
def test_a_manifest_names_the_file_beside_it_and_no_other(file, tmp_path):
    store(tmp_path, FORMS["topk"])
    content = json.loads((tmp_path / f"{NAME}.json").read_text())
    content.pop("seal")
    (tmp_path / f"{NAME}.json").write_bytes(sealed({**content, "file": file}))
    with pytest.raises(DamagedFile, match="file is '"):
        SoftLabels.open(tmp_path)


def test_a_digest_is_no_path(tmp_path):
    """Shards from a URI are kept in the cache by their digest."""
    store(tmp_path, FORMS["topk"])
    content = json.loads((tmp_path / f"{NAME}.json").read_text())
    content.pop("seal")
    (tmp_path / f"{NAME}.json").write_bytes(sealed({**content, "sha256": "../" * 10 + "tmp/x"}))
    with pytest.raises(DamagedFile, match="sha256: string should match"):
        SoftLabels.open(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"\xff" * 40,
        b"\x08\0\0\0\0\0\0\0nonsense",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x02\0\0\0\0\0\0\0{}",
    ],
)
def test_a_file_that_is_no_shard_is_refused(content, tmp_path):
    store(tmp_path, FORMS["topk"])
    path = tmp_path / f"{NAME}.safetensors"
    path.write_bytes(content)
    manifest = json.loads((tmp_path / f"{NAME}.json").read_text())
    manifest.pop("seal")
    (tmp_path / f"{NAME}.json").write_bytes(sealed({**manifest, "sha256": digest(path)}))
    with pytest.raises(DamagedFile, match=NAME):
        used(tmp_path)


def test_what_is_refused_is_made_again_by_labelling(tmp_path):
    store(tmp_path, FORMS["topk"])
    whole = making.files(tmp_path)
    rewritten(tmp_path, lambda tensors: tensors.pop("log_rest"))
    store(tmp_path, FORMS["topk"])
    assert making.files(tmp_path) == whole


NAN, INF = float("nan"), float("inf")


def put(name, at, value):
    """A change of one number of a shard's tensor."""

    def change(tensors):
        tensors[name][at] = value

    return change


WIDE = {"topk": Form.choose(V, "topk", "float32", 9), "half": Form.choose(V, "topk", "float16", 9)}


def twice(tensors):
    tensors["indices"][17, 3] = tensors["indices"][17, 5]


@pytest.mark.parametrize(
    ("form", "change", "said", "read"),
    [
        (WIDE["topk"], put("log_probs", (17, 2), NAN), "NaN or infinity in log_probs", True),
        (WIDE["half"], put("log_probs", (17, 2), NAN), "NaN or infinity in log_probs", True),
        (WIDE["topk"], put("log_rest", 17, NAN), "NaN or infinity in log_rest", True),
        (WIDE["topk"], put("log_rest", 17, INF), "NaN or infinity in log_rest", False),
        (WIDE["topk"], put("log_rest", 17, 0.0), "sum to more than 1.01", False),
        (FORMS["topk"], put("log_rest", 17, 0), "sum to more than 1.1", False),
        (WIDE["topk"], twice, "one class twice", False),
        (FORMS["dense"], put("logits", (17, 4), NAN), "NaN or infinity in its logits", True),
        (FORMS["dense"], put("shift", 17, INF), "NaN or infinity in its shift", False),
        (FORMS["hidden"], put("hidden", (17, 1), NAN), "NaN or infinity in its hidden states", True),
        (FORMS["hidden"], put("hidden", (17, 1), -INF), "NaN or infinity in its hidden states", False),
        (FORMS["sampled"], lambda tensors: tensors["counts"].zero_(), "not sum to the 20 draws", False),
    ],
)
@pytest.mark.parametrize("ragged", [True, False])
def test_values_that_no_answer_has_are_named_with_their_sample(form, change, said, read, ragged, tmp_path):
    split = tokens(ragged=ragged)
    store(tmp_path, form, split=split)
    whole = making.files(tmp_path)
    assert not any(problem for _, problem in verify(tmp_path))
    rewritten(tmp_path, change)
    rows = split.mask[8:16].sum(-1) if ragged else torch.full((8,), 7)
    row = 0 if form.kind == "sampled" else 17
    sample = 8 + int((rows.cumsum(0) <= row).sum())
    found = [problem for _, problem in verify(tmp_path) if problem]
    assert len(found) == 1
    assert f"shard {NAME}.safetensors" in found[0]
    assert f"sample {sample} " in found[0]
    assert said in found[0]
    if read:
        with pytest.raises(DamagedFile, match=f"sample {sample} .*NaN"):
            used(tmp_path)
    store(tmp_path, form, split=split)
    assert making.files(tmp_path) == whole


def test_no_probability_at_all_and_a_class_that_is_drawn_twice(tmp_path):
    store(tmp_path / "a", FORMS["topk"])
    rewritten(
        tmp_path / "a",
        lambda tensors: (tensors["log_probs"].fill_(255), tensors["log_rest"].fill_(255)),
    )
    assert any("no probability above 0" in problem for _, problem in verify(tmp_path / "a"))
    store(tmp_path / "b", FORMS["sampled"])

    def change(tensors):
        wide = int((tensors["distinct"] > 1).nonzero()[0, 0])
        start = int(tensors["distinct"][:wide].long().sum())
        tensors["indices"][start] = tensors["indices"][start + 1]

    rewritten(tmp_path / "b", change)
    assert any("one class twice" in problem for _, problem in verify(tmp_path / "b"))
