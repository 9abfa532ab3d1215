"""What a second call to label does with a store that was made otherwise, or that lost a file."""

from __future__ import annotations

import os

import making
import pytest
import torch
from making import Tokens, V, made, tokens

from stillhouse.errors import CheckpointError, ConfigError
from stillhouse.files.lock import InUse
from stillhouse.softlabels import Form, SoftLabels
from stillhouse.softlabels.holding import held
from stillhouse.softlabels.inspection import verify
from stillhouse.softlabels.places import place, sealed, unsealed
from stillhouse.softlabels.rewrite import compact

TOP = Form.choose(V, "topk", None, 9)
DRAWS = Form.choose(V, "sampled", None, 20)
HIDDEN = Form.choose(V, "hidden", width=6)


def problems(where) -> list[str]:
    return [problem for _, problem in verify(where) if problem]


@pytest.mark.parametrize("lost", ["", "store.json", "shard-000000000008.json"])
@pytest.mark.parametrize("before", [(), ("body",)], ids=["without", "with"])
def test_other_features_are_refused_before_anything_is_written(before, lost, tmp_path):
    made(tmp_path, TOP, features=before)
    if lost:
        (tmp_path / lost).unlink()
    kept = making.files(tmp_path)
    with pytest.raises(CheckpointError, match=r"made with features = .*'body'"):
        made(tmp_path, TOP, features=() if before else ("body",))
    assert making.files(tmp_path) == kept


@pytest.mark.parametrize("lost", ["", "store.json"])
def test_other_row_shapes_are_refused_before_anything_is_written(lost, tmp_path):
    made(tmp_path, TOP, split=tokens(ragged=False))
    if lost:
        (tmp_path / lost).unlink()
    kept = making.files(tmp_path)
    with pytest.raises(CheckpointError, match="made with row_shape = "):
        made(tmp_path, TOP, split=tokens(31))
    assert making.files(tmp_path) == kept


@pytest.mark.parametrize("content", [None, b"garbage"])
@pytest.mark.parametrize("other", [{"seed": 7}, {"batch_size": 3}])
def test_a_lost_description_mixes_no_draws(other, content, tmp_path):
    made(tmp_path, DRAWS)
    whole = making.files(tmp_path)
    (tmp_path / "shard-000000000008.safetensors").unlink()
    (tmp_path / "store.json").unlink() if content is None else (tmp_path / "store.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"made with {next(iter(other))} = "):
        made(tmp_path, DRAWS, **other)
    made(tmp_path, DRAWS)
    assert making.files(tmp_path) == whole


def test_draws_of_a_seed_that_nobody_knows_are_not_filled_up(tmp_path):
    made(tmp_path, DRAWS)
    where = place(tmp_path)
    for path in tmp_path.glob("shard-*.json"):
        manifest = unsealed(path.read_bytes(), path.name)
        del manifest["recipe"]
        where.write(path.name, sealed(manifest))
    assert len(made(tmp_path, DRAWS)) == 30  # store.json says it
    (tmp_path / "store.json").unlink()
    with pytest.raises(ConfigError, match="nothing says of which seed"):
        made(tmp_path, DRAWS)


def test_compacted_draws_keep_their_recipe(tmp_path):
    labels = compact(made(tmp_path / "a", DRAWS, seed=3), place(tmp_path / "b"))
    assert labels.manifests[0]["recipe"] == {"batch_size": 4, "seed": 3, "feature_dtype": "float16"}


@pytest.mark.parametrize("content", [None, b"garbage"])
def test_a_lost_head_is_named_and_written_again(content, tmp_path):
    made(tmp_path, HIDDEN, head="head")
    whole, path = making.files(tmp_path), tmp_path / "head.safetensors"
    assert "head.safetensors" in dict(verify(tmp_path))
    path.unlink() if content is None else path.write_bytes(content)
    found = dict(verify(tmp_path))
    assert found.pop("head.safetensors")
    assert not any(problem for name, problem in found.items() if name != "the whole")
    made(tmp_path, HIDDEN, head="head")
    assert making.files(tmp_path) == whole
    assert not problems(tmp_path)
    SoftLabels.open(tmp_path).lookup(torch.arange(3))


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (Form.choose(V - 1, "topk", None, 5), f"gives {V} outputs, and the form is for {V - 1}"),
        (Form.choose(V + 9, "dense"), f"gives {V} outputs, and the form is for {V + 9}"),
        (Form.choose(V, "hidden", width=5), "width 6, and the form has 5"),
        (Form("topk", "uint8", V, V + 1), f"expected 1 to {V}"),
    ],
)
def test_a_form_that_does_not_fit_the_teacher_is_refused_before_anything_is_written(form, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        made(tmp_path / "new", form, teacher=Tokens(), head="head" if form.kind == "hidden" else "")
    assert not (tmp_path / "new").exists()


def test_one_writer_at_a_time_from_python_too(tmp_path):
    half = tmp_path / ".shard-000000000008.json.0123456789ab.part"
    with held(place(tmp_path)):
        half.write_bytes(b"another writer's")
        with pytest.raises(InUse, match=rf"process {os.getpid()} on .* runs there"):
            made(tmp_path, TOP)
        assert half.exists()
    assert len(made(tmp_path, TOP)) == 30
