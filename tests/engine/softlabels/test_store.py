"""A store: labelled, found by sample id, appended to, damaged, mended, refused."""

from __future__ import annotations

import json
import pickle
import shutil

import making
import pytest
import torch
import toys
from making import LENGTH, Tokens, V, made, per_sample, tokens

from stillhouse.api import TensorSplit
from stillhouse.errors import CheckpointError, ConfigError, DamagedFile, DataError
from stillhouse.files import digest
from stillhouse.kernels import Sampled, TeacherHead, TopK
from stillhouse.softlabels import Form, SoftLabels
from stillhouse.softlabels.inspection import facts, shown, verify
from stillhouse.softlabels.places import place
from stillhouse.softlabels.rewrite import compact

FORMS = {
    "dense float32": Form.choose(V, "dense", "float32"),
    "dense": Form.choose(V, "dense"),
    "topk": Form.choose(V, "topk", None, 9),
    "topk float16": Form.choose(V, "topk", "float16", 9),
    "packed": Form.choose(V, "topk", None, 9, packed=True),
    "packed float16": Form.choose(V, "topk", "float16", 9, packed=True),
    "sampled": Form.choose(V, "sampled", None, 20),
    "sampled wide": Form.choose(V, "sampled", None, 300),
    "packed draws": Form.choose(V, "sampled", None, 20, packed=True),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def parts(labels) -> list[torch.Tensor]:
    """The tensors of what a lookup gave; of draws the weight of every class, whose order says nothing."""
    if isinstance(labels, torch.Tensor):
        return [labels]
    if isinstance(labels, TopK):
        return [labels.indices, labels.log_probs, labels.log_rest]
    if isinstance(labels, Sampled):
        dense = torch.zeros(*labels.indices.shape[:-1], V)
        return [dense.scatter_add(-1, labels.indices, labels.weights)]
    return [labels.hidden, labels.weight]


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


class TestLookup:
    def test_dense_float32_is_what_the_teacher_says(self, tmp_path):
        teacher, split = per_sample()
        labels = made(tmp_path, Form.choose(4, "dense", "float32"), split=split, teacher=teacher)
        ids = torch.tensor([29, 0, 17, 0])
        with torch.no_grad():
            expected = teacher(split.inputs[ids])
        torch.testing.assert_close(labels.lookup(ids), expected, rtol=1e-5, atol=1e-6)

    @every_form
    def test_is_by_sample_id_whatever_the_order_and_the_shards(self, form, tmp_path):
        split = tokens()
        labels = made(tmp_path, form, split=split)
        ids = torch.randperm(30)[:17]
        found = labels.lookup(ids, split.mask[ids])
        for place_, sample in enumerate(ids):
            alone = labels.lookup(sample[None], split.mask[sample][None])
            rows = split.mask[sample]
            assert all(
                torch.equal(x[place_][rows], y[0][rows])
                for x, y in zip(parts(found), parts(alone), strict=True)
            )

    def test_rows_stand_where_the_mask_is_true_on_either_side(self, tmp_path):
        split = tokens()
        labels = made(tmp_path, FORMS["dense float32"], split=split)
        ids = torch.arange(10)
        right, left = split.mask[ids], split.mask[ids].flip(-1)
        assert torch.equal(labels.lookup(ids, right)[right], labels.lookup(ids, left)[left])
        with torch.no_grad():
            torch.testing.assert_close(labels.lookup(ids, right)[right], Tokens()(split.inputs[ids])[right])

    def test_without_a_mask_samples_are_padded_at_their_end(self, tmp_path):
        split = tokens()
        labels = made(tmp_path, FORMS["dense"], split=split)
        ids = torch.tensor([0, 3])
        assert labels.lookup(ids).shape == (2, LENGTH, V)
        assert labels.counts(ids).tolist() == split.mask[ids].sum(-1).tolist()

    def test_samples_of_one_length_need_no_mask(self, tmp_path):
        split = tokens(ragged=False)
        labels = made(tmp_path, FORMS["dense float32"], split=split)
        ids = torch.tensor([5, 2])
        with torch.no_grad():
            torch.testing.assert_close(labels.lookup(ids), Tokens()(split.inputs[ids]))

    def test_hidden_states_and_the_head_give_the_logits(self, tmp_path):
        split = tokens()
        labels = made(tmp_path, Form.choose(V, "hidden", width=6), split=split, head="head")
        ids = torch.tensor([0, 4])
        found = labels.lookup(ids, split.mask[ids])
        assert isinstance(found, TeacherHead)
        with torch.no_grad():
            expected = Tokens()(split.inputs[ids])
        rows = split.mask[ids]
        torch.testing.assert_close(labels.targets(ids, rows)[rows], expected[rows])

    def test_named_features_come_by_sample_and_by_row(self, tmp_path):
        split = tokens()
        labels = made(tmp_path, FORMS["topk"], split=split, features=("body",), feature_dtype="float32")
        ids = torch.tensor([9, 0, 28])
        rows = split.mask[ids]
        torch.testing.assert_close(
            labels.features(ids, rows)["body"][rows], Tokens().body(split.inputs[ids])[rows].detach()
        )
        teacher, plain = per_sample()
        labels = made(tmp_path / "b", Form.choose(4), split=plain, teacher=teacher, features=("1",))
        torch.testing.assert_close(
            labels.features(ids)["1"].float(),
            teacher[1](teacher[0](plain.inputs[ids])).detach(),
            rtol=1e-2,
            atol=1e-3,
        )

    @pytest.mark.parametrize("sample", [-1, 30, 10**9])
    def test_a_sample_that_is_not_there_is_named(self, sample, tmp_path):
        labels = made(tmp_path, FORMS["topk"])
        with pytest.raises(DataError, match=rf"sample {sample} is not in .*which hold 30 samples"):
            labels.lookup(torch.tensor([0, sample]))

    def test_a_mask_with_other_rows_is_refused_naming_the_sample(self, tmp_path):
        split = tokens()
        labels = made(tmp_path, FORMS["topk"], split=split)
        mask = split.mask[:4].clone()
        mask[0, 6] = False
        with pytest.raises(DataError, match=r"sample 0 has 7 rows in .* and 6 in this batch's mask"):
            labels.lookup(torch.arange(4), mask)

    def test_a_copy_for_another_process_reads_the_same(self, tmp_path):
        labels = made(tmp_path, FORMS["topk"])
        ids = torch.arange(5)
        assert equal(pickle.loads(pickle.dumps(labels)).lookup(ids), labels.lookup(ids))


class TestLabelling:
    @every_form
    def test_again_makes_nothing_and_in_parts_the_same_bytes(self, form, tmp_path):
        made(tmp_path / "a", form)
        before = making.files(tmp_path / "a")
        made(tmp_path / "a", form)
        assert making.files(tmp_path / "a") == before
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        (tmp_path / "b" / "shard-000000000008.json").unlink()
        (tmp_path / "b" / "shard-000000000016.safetensors").unlink()
        made(tmp_path / "b", form)
        assert making.files(tmp_path / "b") == before

    def test_samples_may_be_appended(self, tmp_path):
        whole = tokens(30)
        fewer = TensorSplit(whole.inputs[:13], mask=whole.mask[:13])
        made(tmp_path, FORMS["topk"], split=fewer)
        before = making.files(tmp_path)
        labels = made(tmp_path, FORMS["topk"], split=whole)
        labels.check_whole()
        labels.check(split=whole)
        after = making.files(tmp_path)
        assert {name: after[name] for name in before if name != "store.json"} == {
            name: content for name, content in before.items() if name != "store.json"
        }
        assert equal(
            labels.lookup(torch.arange(30)),
            made(tmp_path / "b", FORMS["topk"], split=whole).lookup(torch.arange(30)),
        )

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"teacher": Tokens(seed=1)}, "made with teacher = "),
            ({"split": tokens(seed=2)}, "samples 0 to 7.*made with data = "),
            ({"form": FORMS["topk float16"]}, "made with dtype = 'uint8', this run has 'float16'"),
            ({"seed": 5}, "made with seed = 0, this run has 5"),
            ({"batch_size": 3}, "made with batch_size = 4"),
            ({"split": tokens(7)}, "made with data = '30 samples', this run has '7 samples'"),
        ],
    )
    def test_into_a_store_of_another_origin_is_refused_and_changes_nothing(self, change, said, tmp_path):
        made(tmp_path, FORMS["topk"])
        before = making.files(tmp_path)
        given = {"form": FORMS["topk"], **change}
        with pytest.raises(CheckpointError, match=said):
            made(tmp_path, given.pop("form"), **given)
        assert making.files(tmp_path) == before

    def test_data_that_change_at_every_reading_are_refused(self, tmp_path):
        split = tokens()
        split.fixed = False
        with pytest.raises(ConfigError, match="random input transform"):
            made(tmp_path, FORMS["topk"], split=split)
        assert not list(tmp_path.iterdir())

    def test_no_data_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="no sample to label"):
            made(tmp_path / "new", FORMS["topk"], split=TensorSplit(torch.zeros(0, LENGTH).long()))
        assert not (tmp_path / "new").exists()

    def test_a_teacher_that_gives_nan_is_refused_naming_the_samples(self, tmp_path):
        teacher = Tokens()
        with torch.no_grad():
            teacher.body.weight[tokens().inputs[12, 0]] = float("nan")
        with pytest.raises(DataError, match=r"samples \d+ to \d+: .*NaN"):
            made(tmp_path, FORMS["topk"], teacher=teacher)

    def test_a_module_that_does_not_make_the_logits_is_no_head(self, tmp_path):
        teacher, split = per_sample()
        with pytest.raises(ConfigError, match="not what the module '0' makes"):
            made(tmp_path, Form.choose(4, "hidden", width=6), split=split, teacher=teacher, head="0")

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(ConfigError, match=r"holds thesis\.tex and no soft labels"):
            made(tmp_path, FORMS["topk"])
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_disk_that_will_not_hold_it_is_said_before(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
        with pytest.raises(ConfigError, match=r"needs about .* for 4 shards, and 100 B are free"):
            made(tmp_path / "new", FORMS["topk"])
        assert not (tmp_path / "new").exists()

    def test_a_full_disk_leaves_what_is_published_and_says_how_much_is_needed(self, tmp_path, monkeypatch):
        import errno
        import os

        calls = []

        def full(handle: int) -> None:
            calls.append(handle)
            if len(calls) == 6:  # store.json, two shards with their manifests, and then
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match=r"No space left.*2 of 4 shards are still to be written, at about \d"
        ):
            made(tmp_path, FORMS["topk"])
        monkeypatch.undo()
        assert len(SoftLabels.open(tmp_path)) == 16
        assert len(made(tmp_path, FORMS["topk"])) == 30

    def test_so_does_a_limit_of_the_system_itself(self, tmp_path):
        import resource

        made(tmp_path, FORMS["dense float32"])
        for path in tmp_path.glob("shard-000000000008*"):
            path.unlink()
        before = making.files(tmp_path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # a manifest fits, a shard does not
        try:
            with pytest.raises(
                OSError, match=r"1 of 1 shards are still to be written, at about \d.*run the same command"
            ):
                made(tmp_path, FORMS["dense float32"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert making.files(tmp_path) == before
        assert len(SoftLabels.open(tmp_path)) == 22
        assert len(made(tmp_path, FORMS["dense float32"])) == 30


class TestChecking:
    def test_the_same_origin_passes(self, tmp_path):
        split = tokens()
        labels = made(tmp_path, FORMS["topk"], split=split)
        labels.check(teacher=labels.fingerprint["teacher"], tokenizer="none", split=split)

    def test_rows_that_are_no_split_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="split is a list; expected a split"):
            made(tmp_path, FORMS["topk"]).check(split=[{"input_ids": [1]}])

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ({"teacher": "abc"}, "teacher = '.*', this run has 'abc'"),
            ({"tokenizer": "abc"}, "tokenizer = 'none', this run has 'abc'"),
            ({"transform": "mixup"}, "transform = 'none', this run has 'mixup'"),
            ({"temperature": "2"}, "temperature = '1', this run has '2'"),
        ],
    )
    def test_another_is_refused_naming_field_stored_and_asked(self, asked, said, tmp_path):
        with pytest.raises(CheckpointError, match=said):
            made(tmp_path, FORMS["topk"]).check(**asked)

    @pytest.mark.parametrize("row", [0, 11, 29])
    def test_one_changed_row_of_the_data_is_found(self, row, tmp_path):
        split = tokens()
        labels = made(tmp_path, FORMS["topk"], split=split)
        split.inputs[row, 2] = (split.inputs[row, 2] + 1) % V
        first = row - row % 8
        with pytest.raises(CheckpointError, match=rf"samples {first} to .*made with data = "):
            labels.check(split=split)

    def test_labels_that_were_mended_change_nothing(self, tmp_path):
        split = tokens()
        labels = made(tmp_path, FORMS["topk"], split=split)
        split.labels = torch.zeros(30, LENGTH, dtype=torch.long)
        labels.check(split=split)

    def test_an_unfinished_store_is_not_whole(self, tmp_path):
        made(tmp_path, FORMS["topk"])
        (tmp_path / "shard-000000000008.json").unlink()
        labels = SoftLabels.open(tmp_path)
        with pytest.raises(CheckpointError, match="hold 22 of 30 samples"):
            labels.check_whole()
        with pytest.raises(DataError, match="sample 8 is not in"):
            labels.lookup(torch.tensor([8]))

    @pytest.mark.parametrize("content", [None, b"", b"{}", b"garbage"])
    def test_no_store_is_refused(self, content, tmp_path):
        if content is not None:
            (tmp_path / "store.json").write_bytes(content)
        with pytest.raises(DamagedFile, match="can't be read"):
            SoftLabels.open(tmp_path)

    def test_two_shards_with_one_sample_are_refused(self, tmp_path):
        made(tmp_path / "a", FORMS["topk"])
        made(tmp_path / "b", FORMS["topk"], shard_samples=12)
        for path in (tmp_path / "b").glob("shard-000000000012*"):
            shutil.copy(path, tmp_path / "a")
        with pytest.raises(DamagedFile, match="hold sample 12 in two shards"):
            SoftLabels.open(tmp_path / "a")

    def test_a_shard_of_another_teacher_is_refused(self, tmp_path):
        made(tmp_path / "a", FORMS["topk"])
        made(tmp_path / "b", FORMS["topk"], teacher=Tokens(seed=1))
        for path in (tmp_path / "b").glob("shard-000000000008*"):
            shutil.copy(path, tmp_path / "a")
        with pytest.raises(CheckpointError, match=r"shard-000000000008.*made with teacher = "):
            SoftLabels.open(tmp_path / "a")


@pytest.mark.parametrize("which", ["shard-000000000008.safetensors", "shard-000000000008.json", "store.json"])
@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_bit_is_found_by_verify_and_by_reading_and_mended_alone(which, where, tmp_path):
    made(tmp_path, FORMS["topk"])
    before = making.files(tmp_path)
    content = bytearray(before[which])
    content[int(where * (len(content) - 1))] ^= 1
    (tmp_path / which).write_bytes(content)
    problems = {name: problem for name, problem in verify(tmp_path) if problem}
    assert len(problems) == 1
    assert next(iter(problems)).startswith(which.split(".")[0])
    with pytest.raises(
        DamagedFile, match=which.split(".")[0] + (".*samples 8 to 15" if "safetensors" in which else "")
    ):
        SoftLabels.open(tmp_path).lookup(torch.tensor([9]))
    mtimes = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    labels = made(tmp_path, FORMS["topk"])
    assert not any(problem for _, problem in verify(tmp_path))
    changed = {path.name for path in tmp_path.iterdir() if path.stat().st_mtime_ns != mtimes[path.name]}
    assert changed <= {which, "shard-000000000008.json", "shard-000000000008.safetensors", "store.json"}
    after = making.files(tmp_path)
    assert {name: after[name] for name in after if name != "store.json"} == {
        name: before[name] for name in before if name != "store.json"
    }
    assert len(labels) == 30


def test_a_missing_shard_is_named(tmp_path):
    labels = made(tmp_path, FORMS["topk"])
    (tmp_path / "shard-000000000016.safetensors").unlink()
    labels.lookup(torch.tensor([0]))
    with pytest.raises(DamagedFile, match=r"shard-000000000016\.safetensors.*samples 16 to 23.*is missing"):
        labels.lookup(torch.tensor([20]))
    assert "missing" in dict(verify(tmp_path))["shard-000000000016 (samples 16 to 23)"]


@every_form
def test_compacted_labels_say_the_same(form, tmp_path):
    split = tokens()
    labels = made(tmp_path / "a", form, split=split)
    less = compact(labels, place(tmp_path / "b"), packed=form.packed)
    assert (len(labels.manifests), len(less.manifests)) == (4, 1)
    ids = torch.randperm(30)
    assert equal(labels.lookup(ids, split.mask[ids]), less.lookup(ids, split.mask[ids]))
    less.check(split=split, teacher=labels.fingerprint["teacher"])
    assert not any(problem for _, problem in verify(tmp_path / "b"))
    with pytest.raises(ConfigError, match="holds soft labels already"):
        compact(labels, place(tmp_path / "b"))


def test_packing_changes_no_number(tmp_path):
    labels = made(tmp_path / "a", FORMS["topk"])
    packed = compact(labels, place(tmp_path / "b"), packed=True)
    assert packed.form.packed
    assert equal(labels.lookup(torch.arange(30)), packed.lookup(torch.arange(30)))


@every_form
def test_a_look_at_a_store(form, tmp_path):
    labels = made(tmp_path, form)
    found = facts(labels)
    assert (found["samples"], found["shards"]) == (30, 4)
    assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert 0 < found["entropy"]["mean"] < 4
    lines = list(shown(labels, 2, {3: "three"}))
    assert lines[0].startswith("sample 0, row 0: ")
    assert ("coverage" in found) == (form.kind == "topk")
    json.dumps(found)


def test_mapped_pages_are_given_back(tmp_path, monkeypatch):
    from stillhouse.softlabels import pages

    labels = made(tmp_path, FORMS["dense"])
    labels.lookup(torch.arange(10))  # the first read of a shard gives back what its check mapped
    monkeypatch.setattr(pages, "RESIDENT", 1)
    monkeypatch.setattr(pages, "_mapped_bytes", lambda: 2**40)
    told = []
    monkeypatch.setattr("stillhouse.softlabels.shard.give_back", told.append)
    once = labels.lookup(torch.arange(10))
    assert len({id(pages) for pages in told}) == len(labels._opened) == 2
    assert equal(labels.lookup(torch.arange(10)), once)


def test_more_shards_than_files_may_be_open_are_read(tmp_path, monkeypatch):
    from stillhouse.softlabels import store

    labels = made(tmp_path, FORMS["topk"])  # four shards
    whole = labels.lookup(torch.arange(30))
    monkeypatch.setattr(store, "most_files", lambda: 1)
    again, checked = SoftLabels.open(tmp_path), []
    monkeypatch.setattr(
        "stillhouse.softlabels.shard.digest", lambda path: checked.append(path) or digest(path)
    )
    for _ in range(2):
        assert equal(again.lookup(torch.arange(30)), whole)
    assert len(again._opened) == 1
    assert len(checked) == 4, "each digest is checked once"


def test_memory_of_the_toys_is_the_same_as_on_disk(tmp_path):
    teacher, split = per_sample()
    labels = made(tmp_path, Form.choose(4, "dense", "float32"), split=split, teacher=teacher)
    from stillhouse.softlabels import write_soft_labels

    held, _ = write_soft_labels(teacher, split, {}, device=torch.device("cpu"), batch_size=4)
    ids = torch.randperm(30)
    assert torch.equal(held.lookup(ids), labels.lookup(ids))
    assert labels.form.outputs == toys.CLASSES
