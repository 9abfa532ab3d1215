"""Parquet both ways, and DistillKit's published layout."""

from __future__ import annotations

import making
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from making import V, made, tokens
from test_store import FORMS, equal

from stillhouse.errors import CheckpointError, ConfigError, DamagedFile
from stillhouse.softlabels import Form, SoftLabels
from stillhouse.softlabels.distillkit import Compression, decompress, whole_numbers
from stillhouse.softlabels.exchange import read_any, write_parquet
from stillhouse.softlabels.inspection import verify


@pytest.mark.parametrize("name", [name for name in FORMS if "packed" not in name])
def test_parquet_and_back_gives_the_same_shards(name, tmp_path):
    split = tokens()
    labels = made(tmp_path / "a", FORMS[name], split=split)
    rows = write_parquet(labels, tmp_path / "x.parquet")
    assert rows == int(split.mask.sum())
    again = read_any(tmp_path / "x.parquet", tmp_path / "b", {})
    ids = torch.randperm(30)
    assert equal(labels.lookup(ids, split.mask[ids]), again.lookup(ids, split.mask[ids]))
    shards = {
        key: value for key, value in making.files(tmp_path / "a").items() if key.endswith(".safetensors")
    }
    assert shards.items() <= making.files(tmp_path / "b").items()
    again.check(split=split, teacher=labels.fingerprint["teacher"])
    assert not any(problem for _, problem in verify(tmp_path / "b"))


def test_the_table_is_readable_by_anyone(tmp_path):
    labels = made(tmp_path / "a", FORMS["topk float16"], split=tokens(ragged=False))
    write_parquet(labels, tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["id", "indices", "log_probs", "log_rest"]
    found = labels.lookup(torch.tensor([4]))
    row = table.slice(4, 1).to_pylist()[0]
    assert row["id"] == 4
    assert row["indices"] == found.indices[0].tolist()
    torch.testing.assert_close(torch.tensor(row["log_probs"]), found.log_probs[0], rtol=0, atol=2e-3)


def test_hidden_states_are_no_table(tmp_path):
    labels = made(tmp_path / "a", Form.choose(V, "hidden", width=6), head="head")
    with pytest.raises(ConfigError, match="no place in Parquet"):
        write_parquet(labels, tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()


def test_a_table_that_says_nothing_of_soft_labels_is_refused(tmp_path):
    pq.write_table(pa.table({"id": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="says nothing of soft labels"):
        read_any(tmp_path / "x.parquet", tmp_path / "b", {})
    (tmp_path / "y.parquet").write_bytes(b"PAR1 garbage")
    with pytest.raises(DamagedFile, match="can't be read"):
        read_any(tmp_path / "y.parquet", tmp_path / "b", {})
    assert not (tmp_path / "b").exists()


def packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers ``(rows, n)``, most significant bit first, in bytes: written here, apart from what reads it."""
    rows = []
    for row in numbers.tolist():
        text = "".join(format(number, f"0{bits}b") for number in row)
        text += "0" * (-len(text) % 8)
        rows.append([int(text[at : at + 8], 2) for at in range(0, len(text), 8)])
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize("bits", [1, 3, 8, 17, 24])
def test_whole_numbers_of_any_width_are_read(bits):
    numbers = torch.randint(2**bits, (5, 7))
    assert torch.equal(whole_numbers(packed(numbers, bits), bits, 7), numbers)


def as_bytes(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype).contiguous().view(torch.uint8).reshape(len(values), -1)


class TestDistillKit:
    config = Compression(
        d=300, k=8, exact_k=3, exact_dtype="float32", polynomial_terms=[0, 1, "sqrt"], term_dtype="float32",
        residual_bins=[{"scale_dtype": "float32", "element_bits": 8, "num_elements": 3},
                       {"scale_dtype": "float16", "element_bits": 4, "num_elements": 2}],
        delta_encoding=False,
    )  # fmt: skip

    def tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities and classes of the top 8, and their bytes, put together by hand."""
        generator = torch.Generator().manual_seed(count)
        logs = torch.randn(count, 300, generator=generator).mul(3).log_softmax(-1)
        values, classes = logs.topk(8)
        at = torch.arange(5, dtype=torch.float32)
        curve = torch.stack([torch.ones(5), at, at.sqrt()])
        factors = torch.linalg.lstsq(curve.T, values[:, 3:].T).solution.T
        residual = values[:, 3:] - factors @ curve
        parts, start = [as_bytes(values[:, :3], torch.float32), as_bytes(factors, torch.float32)], 0
        for size, bits, dtype in ((3, 8, torch.float32), (2, 4, torch.float16)):
            some = residual[:, start : start + size]
            scale = (some.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)).to(dtype).float()
            numbers = (some / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)
            parts += [as_bytes(scale, dtype), packed(numbers.long(), bits)]
            start += size
        return values, classes, torch.cat(parts, -1), packed(classes, 9)

    def test_bytes_are_read_as_they_were_put_together(self):
        values, classes, logs, indices = self.tokens(6)
        found = decompress(logs, indices, self.config)
        assert torch.equal(found.indices, classes)
        torch.testing.assert_close(found.log_probs, values, rtol=0, atol=0.1)
        torch.testing.assert_close(found.log_probs[:, :3], values[:, :3], rtol=0, atol=1e-5)

    def test_differences_are_added_up(self):
        values = torch.tensor([[-0.5, -1.5, -3.0]])
        config = Compression(d=16, k=3, exact_k=3, exact_dtype="float16", delta_encoding=True)
        deltas = torch.diff(values, prepend=torch.zeros(1, 1))
        found = decompress(as_bytes(deltas, torch.float16), packed(torch.tensor([[5, 0, 15]]), 4), config)
        torch.testing.assert_close(found.log_probs, values, rtol=0, atol=2e-3)
        assert found.indices.tolist() == [[5, 0, 15]]

    def directory(self, folder, config=None) -> list[tuple]:
        folder.mkdir()
        (folder / "compression_config.yaml").write_text(
            yaml.safe_dump((config or self.config).model_dump(mode="json"))
        )
        made, rows = [], []
        for count in (4, 1, 6):
            values, classes, logs, indices = self.tokens(count)
            made.append((values, classes))
            rows.append({"input_ids": list(range(count + 1)), "compressed_logprobs": logs.tolist(),
                         "bytepacked_indices": indices.tolist()})  # fmt: skip
        kinds = pa.schema([
            ("input_ids", pa.list_(pa.uint64())), ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
            ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ])  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows[:2], kinds), folder / "000.parquet")
        pq.write_table(pa.Table.from_pylist(rows[2:], kinds), folder / "001.parquet")
        return made

    def test_a_directory_becomes_a_store(self, tmp_path):
        expected = self.directory(tmp_path / "kit")
        labels = read_any(tmp_path / "kit", tmp_path / "b", {"teacher": "theirs"})
        assert (len(labels), labels.form.k, labels.form.outputs) == (3, 8, 300)
        assert labels.counts(torch.arange(3)).tolist() == [4, 1, 6]
        for sample, (values, classes) in enumerate(expected):
            found = labels.rows(torch.tensor([sample]))
            assert torch.equal(found.indices, classes)
            torch.testing.assert_close(found.log_probs, values, rtol=0, atol=0.1)
        labels.check(teacher="theirs")
        with pytest.raises(CheckpointError, match="tokenizer = None, this run has 'mine'"):
            labels.check(tokenizer="mine")
        with pytest.raises(CheckpointError, match="data = None, this run has"):
            labels.check(split=tokens())

    def test_bytes_of_another_config_are_refused(self, tmp_path):
        self.directory(tmp_path / "kit", self.config.model_copy(update={"exact_k": 2}))
        with pytest.raises((DamagedFile, ConfigError), match=r"does compression_config\.yaml belong"):
            read_any(tmp_path / "kit", tmp_path / "b", {})

    def test_a_config_key_that_is_unknown_is_named(self, tmp_path):
        self.directory(tmp_path / "kit")
        (tmp_path / "kit" / "compression_config.yaml").write_text("d: 10\nk: 2\nexact_k: 2\nexact_kk: 2\n")
        with pytest.raises(ConfigError, match="exact_kk: unknown; did you mean 'exact_k'"):
            read_any(tmp_path / "kit", tmp_path / "b", {})


def test_an_incomplete_store_stays_incomplete(tmp_path):
    made(tmp_path / "a", FORMS["sampled"], seed=3)
    for path in (tmp_path / "a").glob("shard-000000000008*"):
        path.unlink()
    write_parquet(SoftLabels.open(tmp_path / "a"), tmp_path / "x.parquet")
    again = read_any(tmp_path / "x.parquet", tmp_path / "b", {})
    assert {manifest["recipe"]["seed"] for manifest in again.manifests} == {3}
    with pytest.raises(CheckpointError, match="hold 22 of 30 samples"):
        again.check_whole()


@pytest.mark.parametrize("rows", [[0, 1, 1], [0, 29, 0]])
def test_a_sample_that_comes_twice_is_refused_before_anything_is_written(rows, tmp_path):
    write_parquet(made(tmp_path / "a", FORMS["topk"]), tmp_path / "x.parquet")
    pq.write_table(pq.read_table(tmp_path / "x.parquet").take(rows), tmp_path / "y.parquet")
    with pytest.raises(DamagedFile, match=r"holds sample [01] twice"):
        read_any(tmp_path / "y.parquet", tmp_path / "b", {})
    assert not (tmp_path / "b").exists()
