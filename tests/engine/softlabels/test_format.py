"""docs/soft-labels.md says enough to read a store without Stillhouse: ``reader.py`` was written from it."""

from __future__ import annotations

import ast
from pathlib import Path

import making
import numpy as np
import pytest
import reader
import torch
from making import V, made, tokens

from stillhouse.kernels import Sampled, TopK
from stillhouse.softlabels import Form
from stillhouse.softlabels.forms import multiplied
from stillhouse.softlabels.places import place
from stillhouse.softlabels.rewrite import compact

FORMS = {
    "dense float32": Form.choose(V, "dense", "float32"),
    "dense float16": Form.choose(V, "dense"),
    "top k": Form.choose(V, "topk", None, 9),
    "top k, float16": Form.choose(V, "topk", "float16", 9),
    "top k, float32": Form.choose(V, "topk", "float32", 9),
    "packed top k": Form.choose(V, "topk", None, 9, packed=True),
    "packed top k, float16": Form.choose(V, "topk", "float16", 9, packed=True),
    "draws": Form.choose(V, "sampled", None, 20),
    "wide draws": Form.choose(V, "sampled", None, 300),
    "packed draws": Form.choose(V, "sampled", None, 20, packed=True),
    "packed wide draws": Form.choose(V, "sampled", None, 300, packed=True),
    "hidden": Form.choose(V, "hidden", width=6),
    "hidden bfloat16": Form.choose(V, "hidden", "bfloat16", width=6),
}


def ours(labels, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """What ``SoftLabels`` gives, in the reader's terms."""
    rows = labels.rows(torch.tensor([sample]))
    if isinstance(rows, TopK):
        out = torch.zeros(len(rows.indices), V, dtype=torch.float64)
        return out.scatter(
            -1, rows.indices, rows.log_probs.double().exp()
        ).numpy(), rows.log_rest.double().exp().numpy()
    if isinstance(rows, Sampled):
        out = torch.zeros(len(rows.indices), V, dtype=torch.float64)
        return out.scatter_add(-1, rows.indices, rows.weights.double()).numpy(), np.zeros(len(out))
    logits = rows if isinstance(rows, torch.Tensor) else multiplied(rows)
    return logits.double().softmax(-1).numpy(), np.zeros(len(logits))


@pytest.mark.parametrize("ragged", [True, False], ids=["of their own length", "of one length"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_is_read_by_somebody_elses_reader(form, ragged, tmp_path):
    labels = made(
        tmp_path, form, split=tokens(ragged=ragged), **({"head": "head"} if form.kind == "hidden" else {})
    )
    theirs, seen = reader.Store(tmp_path), 0
    for sample in range(30):
        mine, found = ours(labels, sample), theirs.probabilities(sample)
        for a, b in zip(found, mine, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
        seen += len(mine[0])
    assert seen == sum(manifest["rows"] for manifest in theirs.manifests) > 100


def test_features_and_one_row_a_sample(tmp_path):
    labels = made(tmp_path / "a", FORMS["top k"], features=("body",), feature_dtype="float32")
    kept = labels.features(torch.tensor([9]))["body"][0]
    theirs = reader.Store(tmp_path / "a").feature(9, "body")
    assert np.array_equal(kept[: len(theirs)].numpy(), theirs)
    teacher, split = making.per_sample()
    labels = made(tmp_path / "b", Form.choose(4), split=split, teacher=teacher, features=("1",))
    theirs = reader.Store(tmp_path / "b")
    assert np.array_equal(theirs.feature(3, "1"), labels.features(torch.tensor([3]))["1"][0].numpy())
    np.testing.assert_allclose(theirs.probabilities(3)[0], ours_of(labels, 3), atol=1e-6)


def ours_of(labels, sample: int) -> np.ndarray:
    return labels.rows(torch.tensor([sample])).double().softmax(-1).numpy()


def test_a_shard_whose_ids_are_not_one_after_the_other(tmp_path):
    from stillhouse.softlabels.shard import Rows, publish
    from stillhouse.softlabels.store import describe

    labels = made(tmp_path / "a", FORMS["dense float32"], split=tokens(ragged=False))
    raw = labels.raw(0)
    where, shape = place(tmp_path / "b"), labels.about["row_shape"]
    describe(where, labels.form, labels.about["fingerprint"], samples=8, row_shape=shape)
    odd = Rows(raw.ids * 3 + 1, raw.counts, raw.arrays)
    publish(where, labels.form, odd, shape, labels.about["fingerprint"])
    theirs = reader.Store(tmp_path / "b")
    np.testing.assert_allclose(theirs.probabilities(3 * 5 + 1)[0], ours(labels, 5)[0], atol=1e-6)
    with pytest.raises(KeyError):
        theirs.probabilities(2)


def test_a_compacted_store(tmp_path):
    labels = made(tmp_path / "a", FORMS["top k"])
    compact(labels, place(tmp_path / "b"), packed=True)
    for a, b in zip(reader.Store(tmp_path / "b").probabilities(7), ours(labels, 7), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_the_reader_uses_nothing_of_ours():
    found = set()
    for node in ast.walk(ast.parse(Path(reader.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    assert found <= {"__future__", "hashlib", "json", "struct", "pathlib", "numpy", "zstandard"}
