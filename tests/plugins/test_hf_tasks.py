"""Tasks over a user's own files: what is read of them, which models fit, and what is refused."""

from __future__ import annotations

import json

import checkpoints
import pytest
import torch

from stillhouse.api import IGNORE, ConfigError, DataError

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from stillhouse_hf.tasks import CausalLM, SentenceEmbeddings, TextClassification, TokenClassification


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints.gpt2(folder / "gpt2", layers=3)
    checkpoints.bert(folder / "bert")
    checkpoints.bert(folder / "classifier", "BertForSequenceClassification", num_labels=2)
    return folder


def task(kind, tokenizer, train, **settings):
    settings = {"length": 64, **settings}
    return kind(kind.Config(tokenizer=str(tokenizer), train=str(train), **settings))


def every(split) -> list[dict]:
    """The rows as tensors without padding."""
    return [split.dataset[number] for number in range(len(split))]


class TestFiles:
    """The rows of files of every format."""

    @pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet"])
    def test_every_format_gives_the_same_rows(self, made, tmp_path, name):
        rows = checkpoints.labelled()
        file = checkpoints.written(rows, tmp_path / name)
        found = every(task(TextClassification, made / "bert", file, validation=str(file)).splits().train)
        tokenizer = checkpoints.word_tokenizer()
        assert [row["input_ids"] for row in found] == [tokenizer(row["text"]).input_ids for row in rows]
        assert [row["labels"] for row in found] == [row["label"] for row in rows]

    def test_a_folder_gives_the_rows_of_all_of_its_files(self, made, tmp_path):
        rows = checkpoints.labelled(12)
        (tmp_path / "in").mkdir()
        checkpoints.written(rows[:5], tmp_path / "a.json")
        checkpoints.written(rows[5:], tmp_path / "in" / "b.csv")
        (tmp_path / "notes.doc").write_text("no rows")
        assert len(task(TextClassification, made / "bert", tmp_path).splits().train) == 11
        assert len(task(TextClassification, made / "bert", tmp_path).splits().validation) == 1

    def test_columns_may_have_other_names(self, made, tmp_path):
        rows = [{"sentence": row["text"], "kind": row["label"], "more": 1} for row in checkpoints.labelled()]
        file = checkpoints.written(rows, tmp_path / "rows.csv")
        found = task(TextClassification, made / "bert", file, text_column="sentence", label_column="kind")
        assert found.splits().train.probe(2).inputs.keys() == {"input_ids", "attention_mask"}

    def test_a_missing_column_is_refused_with_those_that_are_there_and_the_setting(self, made, tmp_path):
        file = checkpoints.written([{"sentence": "a cat", "kind": 1}], tmp_path / "rows.json")
        with pytest.raises(
            DataError, match=r"no column 'text'; it has sentence, kind: .*\{text_column: NAME\}"
        ):
            task(TextClassification, made / "bert", file).splits()
        with pytest.raises(DataError, match=r"no column 'class'.*\{label_column: NAME\}"):
            task(
                TextClassification, made / "bert", file, text_column="sentence", label_column="class"
            ).splits()

    def test_a_missing_value_is_refused_with_its_row(self, made, tmp_path):
        file = checkpoints.written(
            [*checkpoints.labelled(3), {"text": "a", "label": None}], tmp_path / "a.jsonl"
        )
        with pytest.raises(DataError, match="row 3 has no 'label'"):
            task(TextClassification, made / "bert", file).splits()

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("a.json", b"", "is empty"),
            ("a.csv", b"text,label\n", "has no rows"),
            ("a.txt", b"\n \n", "has no rows"),
            ("a.json", b"[]", "has no rows"),
            ("a.csv", "text,label\ncaf\xe9,1\n".encode("latin-1"), "is no UTF-8: byte 14 is 0xe9"),
            ("a.txt", b"a" * (1 << 20) + b"\xc3", "is no UTF-8: byte 1048576 is 0xc3"),
            ("a.txt", b"a" * ((1 << 20) - 1) + b"\xc3(", "is no UTF-8: byte 1048575 is 0xc3"),
            ("a.json", b'{"text": 1,', "can't be read as json"),
            ("a.parquet", b"PAR1 and no more", "can't be read as parquet"),
            ("a.doc", b"text", r"expected one of \.json"),
        ],
    )  # fmt: skip
    def test_a_file_that_cant_be_read_is_refused(self, made, tmp_path, name, content, said):
        (tmp_path / name).write_bytes(content)
        kind = CausalLM if name.endswith("txt") else TextClassification
        with pytest.raises(DataError, match=said):
            task(kind, made / "bert", tmp_path / name).splits()

    def test_a_letter_that_two_blocks_share_is_utf8(self, made, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"a " * ((1 << 19) - 1) + b"a\xc3\xa9 b")
        from stillhouse_hf import files

        assert len(files.rows(str(tmp_path / "a.txt"), {"text": "text"})) == 1

    def test_a_path_that_is_not_there_does_not_go_to_the_network(self, made):
        with pytest.raises(DataError, match="no such file or folder"):
            task(TextClassification, made / "bert", "nowhere.json").splits()
        with pytest.raises(ConfigError, match=r"task\.train is not set"):
            task(TextClassification, made / "bert", "").splits()


class TestTextClassification:
    """A class for each text."""

    def test_names_of_classes_are_numbered_and_go_into_the_model(self, made, tmp_path):
        rows = [{**row, "label": ["no", "yes"][row["label"]]} for row in checkpoints.labelled()]
        built = task(TextClassification, made / "bert", checkpoints.written(rows, tmp_path / "a.csv"))
        model = built.students["pretrained"](path=str(made / "bert"))
        assert built.classes == ["no", "yes"]
        assert model.config.id2label == {0: "no", 1: "yes"}
        assert model.config.num_labels == 2

    def test_a_teacher_with_the_classes_in_another_order_is_refused(self, made, tmp_path):
        names = {0: "yes", 1: "no"}
        teacher = checkpoints.bert(tmp_path / "teacher", "BertForSequenceClassification", id2label=names)
        rows = [{**row, "label": ["no", "yes"][row["label"]]} for row in checkpoints.labelled()]
        file = checkpoints.written(rows, tmp_path / "a.csv")
        with pytest.raises(ConfigError, match=r"has the classes yes, no.*classes: \[yes, no\]"):
            task(TextClassification, made / "bert", file).teachers["pretrained"](path=str(teacher))
        told = task(TextClassification, made / "bert", file, classes=["yes", "no"])
        assert told.teachers["pretrained"](path=str(teacher)).config.id2label == names
        assert [row["labels"] for row in every(told.splits().train)].count(0) < 20, "yes is class 0 now"

    def test_labels_beyond_the_heads_width_are_refused(self, made, tmp_path):
        rows = [{**row, "label": number % 3} for number, row in enumerate(checkpoints.labelled())]
        built = task(TextClassification, made / "bert", checkpoints.written(rows, tmp_path / "a.json"))
        with pytest.raises(ConfigError, match=r"classifier\.bias is \(2,\) .* the rows have 3 classes"):
            built.teachers["pretrained"](path=str(made / "classifier"))

    def test_a_teacher_without_a_trained_head_is_refused(self, made, tmp_path):
        file = checkpoints.written(checkpoints.labelled(), tmp_path / "a.json")
        with pytest.raises(ConfigError, match=r"lack classifier\.bias"):
            task(TextClassification, made / "bert", file).teachers["pretrained"](path=str(made / "bert"))

    @pytest.mark.parametrize(
        ("labels", "said"),
        [([0.5, 1.5], "0.5"), ([-1, 0], "-1"), ([0, 10**9], "great gaps"), ([[0], [1]], "list")],
    )
    def test_labels_that_are_no_classes_are_refused(self, made, tmp_path, labels, said):
        rows = [{"text": "a cat", "label": label} for label in labels]
        with pytest.raises(DataError, match=said):
            task(TextClassification, made / "bert", checkpoints.written(rows, tmp_path / "a.json")).splits()

    def test_a_label_that_training_never_saw_is_refused(self, made, tmp_path):
        train = checkpoints.written(checkpoints.labelled(), tmp_path / "a.json")
        other = checkpoints.written([{"text": "a", "label": 7}], tmp_path / "b.json")
        with pytest.raises(DataError, match="label 7 is none of the classes"):
            task(TextClassification, made / "bert", train, validation=str(other)).splits()

    def test_a_text_of_no_token_is_refused(self, made, tmp_path):
        rows = [*checkpoints.labelled(4), {"text": "", "label": 0}]
        file = checkpoints.written(rows, tmp_path / "a.json")
        with pytest.raises(DataError, match="row 4 has no token"):
            task(TextClassification, made / "gpt2", file).splits()

    def test_a_number_as_text_is_refused(self, made, tmp_path):
        file = checkpoints.written([{"text": 3, "label": 0}, {"text": 4, "label": 1}], tmp_path / "a.csv")
        with pytest.raises(DataError, match="row 0 has int"):
            task(TextClassification, made / "bert", file).splits()

    def test_a_causal_model_classifies_rows_of_several_lengths(self, made, tmp_path):
        built = task(
            TextClassification, made / "gpt2", checkpoints.written(checkpoints.labelled(), tmp_path / "a.csv")
        )
        model = built.students["pretrained"](path=str(made / "gpt2")).eval()
        batch = built.splits().train.probe(4)
        together = model(**batch.inputs).logits
        for number in range(4):
            length = int(batch.inputs["attention_mask"][number].sum())
            alone = {name: value[number : number + 1, :length] for name, value in batch.inputs.items()}
            assert torch.allclose(model(**alone).logits[0], together[number], atol=1e-5)


class TestTokenClassification:
    """A class for each word."""

    def test_the_first_token_of_a_word_has_its_label(self, made, tmp_path):
        rows = [{"text": ["the", "cats", "sat"], "label": ["x", "y", "x"]}, {"text": ["cat"], "label": ["y"]}]
        tokenizer = checkpoints.word_tokenizer([*checkpoints.WORDS, "##s"])  # cats are two tokens
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        file = checkpoints.written(rows, tmp_path / "a.json")
        found = task(TokenClassification, tmp_path / "tokenizer", file, validation=str(file)).splits().train
        assert every(found)[0]["labels"] == [IGNORE, 0, 1, IGNORE, 0, IGNORE]
        batch = found.probe(2)
        assert batch.labels[1].tolist() == [IGNORE, 1, IGNORE, IGNORE, IGNORE, IGNORE]
        assert batch.mask.tolist() == (batch.labels != IGNORE).tolist()

    def test_words_and_labels_of_unlike_number_are_refused(self, made, tmp_path):
        file = checkpoints.written([{"text": ["a", "cat"], "label": ["x"]}], tmp_path / "a.json")
        with pytest.raises(DataError, match="row 0 has 2 items and 1 items"):
            task(TokenClassification, made / "bert", file).splits()
        file = checkpoints.written(checkpoints.labelled(), tmp_path / "b.json")
        with pytest.raises(DataError, match="a list of words"):
            task(TokenClassification, made / "bert", file).splits()


class TestCausalLM:
    """Running text in rows of one length."""

    def test_a_text_file_is_read_as_it_is_and_ends_with_the_end_token(self, made, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.txt").write_text(checkpoints.PROGRAM)
        (tmp_path / "in" / "b.py").write_text("x = 1\n")
        built = task(
            CausalLM, made / "gpt2", tmp_path / "in", length=8, validation=str(tmp_path / "in" / "a.txt")
        )
        rows = every(built.splits().train)
        stream = [token for row in rows for token in row["input_ids"]]
        tokenizer = checkpoints.byte_tokenizer()
        assert tokenizer.decode(stream) == checkpoints.PROGRAM + checkpoints.END + "x = 1\n" + checkpoints.END
        assert all(row["labels"] == row["input_ids"] for row in rows)
        assert {len(row["input_ids"]) for row in rows[:-1]} == {8}

    def test_rows_of_a_table_are_texts_with_the_end_token_between(self, made, tmp_path):
        rows = [{"text": "a\ncat"}, {"text": ""}, {"text": "sat"}]
        file = checkpoints.written(rows, tmp_path / "a.jsonl")
        built = task(CausalLM, made / "gpt2", file, length=64, validation=str(file))
        tokenizer = checkpoints.byte_tokenizer()
        end = checkpoints.END
        assert tokenizer.decode(every(built.splits().train)[0]["input_ids"]) == f"a\ncat{end}sat{end}"

    def test_texts_that_make_one_row_can_not_be_divided(self, made, tmp_path):
        (tmp_path / "a.txt").write_text("a cat")
        with pytest.raises(DataError, match="1 rows and no validation"):
            task(CausalLM, made / "gpt2", tmp_path / "a.txt").splits()

    def test_a_model_that_sees_what_it_predicts_is_refused(self, made, tmp_path):
        (tmp_path / "a.txt").write_text("a cat " * 200)
        built = task(CausalLM, made / "bert", tmp_path / "a.txt", length=16)
        for builder in (built.teachers["pretrained"], built.students["pretrained"], built.students["fresh"]):
            with pytest.raises(ConfigError, match=r"sees the tokens that it is to predict|lack cls"):
                builder(path=str(made / "bert"))
        causal = checkpoints.bert(tmp_path / "causal", "BertLMHeadModel", is_decoder=True)
        assert built.teachers["pretrained"](path=str(causal)).config.is_decoder


class TestSentenceEmbeddings:
    """A vector for each text."""

    def test_a_line_is_a_text_and_blank_ones_are_none(self, made, tmp_path):
        (tmp_path / "a.txt").write_text("a cat\n\n \na dog ran\n")
        splits = task(SentenceEmbeddings, made / "bert", tmp_path / "a.txt").splits()
        assert len(splits.train) == 2
        assert splits.validation is None
        assert splits.train.probe(2).labels is None

    def test_rows_to_score_by_are_refused(self, made, tmp_path):
        (tmp_path / "a.txt").write_text("a cat\n")
        with pytest.raises(ConfigError, match="no labels"):
            task(SentenceEmbeddings, made / "bert", tmp_path / "a.txt", test="a.txt").splits()

    def test_a_teacher_may_lack_a_pooler_and_nothing_else(self, made, tmp_path):
        (tmp_path / "a.txt").write_text("a cat\na dog\n")
        built = task(SentenceEmbeddings, made / "bert", tmp_path / "a.txt")
        headed = checkpoints.bert(tmp_path / "mlm", "BertForMaskedLM")
        assert built.teachers["pretrained"](path=str(headed)).config.hidden_size == 16
        config = json.loads((made / "bert" / "config.json").read_text())
        (headed / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
        with pytest.raises(ConfigError, match=r"lack encoder\.layer\.2"):
            built.teachers["pretrained"](path=str(headed))


class TestModels:
    """What fits a task."""

    @pytest.fixture
    def causal(self, made, tmp_path):
        (tmp_path / "a.txt").write_text("a cat sat on the mat " * 100)
        return lambda **settings: task(
            CausalLM, made / "gpt2", tmp_path / "a.txt", **{"length": 16, **settings}
        )

    def test_another_tokenizer_is_refused_with_the_first_token_that_differs(self, causal, made):
        with pytest.raises(
            ConfigError, match=r"bert's tokenizer .* token 0 is '\[PAD\]' there and '<\|end\|>' here"
        ):
            causal().teachers["pretrained"](path=str(made / "bert"))

    def test_a_longer_vocabulary_of_the_same_beginning_is_taken(self, causal, tmp_path):
        tokenizer = checkpoints.byte_tokenizer()
        tokenizer.add_tokens(["<more>"])
        more = checkpoints.gpt2(tmp_path / "more", tokenizer=tokenizer)
        assert causal().teachers["pretrained"](path=str(more)).config.vocab_size == len(tokenizer)

    def test_a_tokenizer_that_divides_texts_otherwise_is_refused_with_the_part(self, causal, tmp_path):
        from tokenizers import Tokenizer, normalizers

        backend = checkpoints.byte_tokenizer().backend_tokenizer
        said = json.loads(backend.to_str())
        said["model"]["merges"] = said["model"]["merges"][:-1]
        fewer = checkpoints.byte_tokenizer()
        fewer._tokenizer = Tokenizer.from_str(json.dumps(said))
        lower = checkpoints.byte_tokenizer()
        lower.backend_tokenizer.normalizer = normalizers.Lowercase()
        path = checkpoints.gpt2(tmp_path / "lower", tokenizer=lower)
        with pytest.raises(ConfigError, match=r"normalizer is \{'type': 'Lowercase'\} there and None here"):
            causal().teachers["pretrained"](path=str(path))
        path = checkpoints.gpt2(tmp_path / "fewer", tokenizer=fewer)
        with pytest.raises(
            ConfigError, match=r"model\.merges is a list of \d+ there and a list of \d+, number"
        ):
            causal().teachers["pretrained"](path=str(path))

    def test_rows_longer_than_the_models_positions_are_refused(self, causal, made, tmp_path):
        with pytest.raises(ConfigError, match=r"reads 64 tokens at most, and task\.length is 65"):
            causal(length=65).students["pretrained"](path=str(made / "gpt2"))
        roberta = checkpoints.bert(
            tmp_path / "roberta", "RobertaModel", family="Roberta", pad_token_id=0, max_position_embeddings=64
        )
        (tmp_path / "b.txt").write_text("a cat\na dog\n")
        built = task(SentenceEmbeddings, made / "bert", tmp_path / "b.txt", length=64)
        with pytest.raises(ConfigError, match="reads 63 tokens at most"):
            built.students["pretrained"](path=str(roberta))

    @pytest.mark.parametrize("count", [0, 4])
    def test_layers_out_of_range_are_refused(self, causal, made, count):
        with pytest.raises(ConfigError, match=f"layers is {count}.*expected 1"):
            causal().students["pretrained"](path=str(made / "gpt2"), layers=count)
        if not count:
            with pytest.raises(ConfigError, match="layers is 0"):
                causal().students["fresh"](path=str(made / "gpt2"), layers=count)

    def test_layers_that_stay_are_spread_evenly_with_the_last(self, causal, made):
        whole = causal().students["pretrained"](path=str(made / "gpt2"))
        kept = causal().students["pretrained"](path=str(made / "gpt2"), layers=1)
        assert kept.config.n_layer == len(kept.transformer.h) == 1
        assert torch.equal(kept.transformer.h[0].mlp.c_fc.weight, whole.transformer.h[2].mlp.c_fc.weight)

    def test_a_fresh_model_has_the_shape_and_other_weights(self, causal, made):
        fresh = causal().students["fresh"](path=str(made / "gpt2"), layers=1, width=8)
        assert (fresh.config.n_layer, fresh.config.n_embd) == (1, 8)
        with pytest.raises(ConfigError, match="width is 9"):
            causal().students["fresh"](path=str(made / "gpt2"), width=9)

    def test_a_folder_without_a_model_is_refused(self, causal, tmp_path):
        with pytest.raises(ConfigError, match="nowhere: no such folder"):
            causal().students["pretrained"](path="nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match="holds no model"):
            causal().students["pretrained"](path=str(tmp_path / "empty"))
        with pytest.raises(ConfigError, match="gives no tokenizer"):
            task(CausalLM, tmp_path / "empty", tmp_path / "a.txt").splits()
