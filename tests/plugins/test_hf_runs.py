"""``init``, ``run`` and ``export`` over a newcomer's files and checkpoints, and what is refused on the way."""

from __future__ import annotations

import json

import checkpoints
import pytest
import torch

from stillhouse.config import parse

pytest.importorskip("transformers")
pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints for each task, and files of rows."""
    byte, word = checkpoints.byte_tokenizer(), checkpoints.word_tokenizer()
    for role, layers, width in (("teacher", 3, 24), ("student", 2, 16)):
        checkpoints.gpt2(tmp_path / "causal-lm" / role, layers, width, byte)
        checkpoints.bert(tmp_path / "sentence-embeddings" / role, "BertModel", layers, width, word)
    checkpoints.bert(
        tmp_path / "text-classification" / "teacher", "BertForSequenceClassification", 3, 24, word
    )
    checkpoints.bert(tmp_path / "text-classification" / "student", "BertModel", 2, 16, word)
    tags = {0: "long", 1: "short"}
    checkpoints.bert(
        tmp_path / "token-classification" / "teacher",
        "BertForTokenClassification",
        3,
        24,
        word,
        id2label=tags,
    )
    checkpoints.bert(tmp_path / "token-classification" / "student", "BertModel", 2, 16, word)
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text(checkpoints.PROGRAM * 3)
    checkpoints.written(checkpoints.labelled(), tmp_path / "labelled.csv")
    checkpoints.written(checkpoints.tagged(), tmp_path / "tagged.jsonl")
    (tmp_path / "lines.txt").write_text("\n".join(checkpoints.sentences()))
    return tmp_path


DATA = {
    "causal-lm": "texts",
    "text-classification": "labelled.csv",
    "token-classification": "tagged.jsonl",
    "sentence-embeddings": "lines.txt",
}
LOADS = {
    "causal-lm": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "sentence-embeddings": "AutoModel",
}
SHORT = ("steps=6", "batch_size=4", "task.length=32", "threads=1")


def begun(cli, task):
    said = cli(
        "init", task, "--train", DATA[task], "--teacher", f"{task}/teacher", "--student", f"{task}/student"
    )  # fmt: skip
    assert said.code == 0, said.err
    return f"{task}.yaml"


@pytest.fixture
def run(cli, folder):
    """``init`` and ``run`` of a task; what ``run`` said."""

    def make(task, *more):
        return cli("run", begun(cli, task), *SHORT, *more)

    return make


@pytest.mark.parametrize("task", DATA)
def test_three_commands_make_a_checkpoint_of_a_folder_and_two_checkpoints(cli, run, folder, task):
    import transformers

    assert (said := run(task)).code == 0, said.err
    assert (said := cli("export", f"runs/{task}", "--to", "transformers", "--out", "out")).code == 0, said.err
    out = folder / "out"
    start = getattr(transformers, LOADS[task]).from_pretrained(folder / task / "student", num_labels=2)
    model, info = getattr(transformers, LOADS[task]).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.state_dict().keys() == start.state_dict().keys()
    moved = [
        name for name, value in start.state_dict().items() if not torch.equal(value, model.state_dict()[name])
    ]
    assert len(moved) > len(start.state_dict()) / 2, "it was trained"
    from safetensors.torch import load_file

    kept = load_file(folder / "runs" / task / "student.safetensors")
    assert all(torch.equal(kept[name], model.state_dict()[name]) for name in kept)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert (
        tokenizer("a cat").input_ids
        == transformers.AutoTokenizer.from_pretrained(folder / task / "student")("a cat").input_ids
    )
    if task == "token-classification":
        assert model.config.id2label == {0: "long", 1: "short"}


@pytest.mark.parametrize("task", DATA)
def test_init_writes_a_config_whose_every_key_is_known_and_which_overwrites_nothing(cli, folder, task):
    name = begun(cli, task)
    text = (folder / name).read_text()
    assert parse(text, name)["task"]["train"] == DATA[task]
    assert text.count("#") >= 4
    assert (said := cli("init", task)).code == 2
    assert "is there; expected a new file" in said.err
    assert (folder / name).read_text() == text


def test_init_of_an_unknown_task_names_the_near_one(cli, folder):
    said = cli("init", "causal_lm")
    assert said.code == 2
    assert "causal-lm" in said.err


def test_a_classifier_learns_its_teachers_answers(cli, folder):
    """From files to a number: the teacher was trained, the student comes near to it."""
    hard = ("method=hard_labels", "teacher=null")
    name = begun(cli, "text-classification")
    big = ("steps=150", "batch_size=16", "task.length=16", "optimizer.lr=3e-3", "threads=1")
    assert (
        said := cli("run", name, *big, *hard, "student.path=sentence-embeddings/teacher", "out=runs/t")
    ).code == 0, said.err
    assert cli("export", "runs/t", "--out", "trained").code == 0
    assert (said := cli("run", name, *big, "teacher.path=trained")).code == 0, said.err
    summary = json.loads((folder / "runs" / "text-classification" / "summary.json").read_text())
    assert summary["teacher"]["accuracy"] == 1.0
    assert summary["scores"]["validation"]["accuracy"] == 1.0


class TestRefused:
    """Before anything is trained or written."""

    def refused(self, said, folder, *words):
        assert said.code == 2, (said.out, said.err)
        assert "Traceback" not in said.err
        assert not list(folder.glob("runs/*/student.safetensors"))
        for word in words:
            assert word in said.err

    def test_tokenizers_that_differ(self, run, folder):
        said = run("causal-lm", "teacher.path=sentence-embeddings/teacher")
        self.refused(said, folder, "token 0 is '[PAD]' there and '<|end|>' here")

    def test_rows_longer_than_the_positions(self, run, folder):
        self.refused(
            run("causal-lm", "task.length=65"), folder, "reads 64 tokens at most", "task.length is 65"
        )

    @pytest.mark.parametrize(
        ("method", "words"),
        [
            ("{name: fitnets, layers: {hidden_states.1: hidden_states.9}}", ["hidden_states.9"]),
            ("{name: fitnets, layers: {transformer.h.5: transformer.h.1}}", ["transformer.h.5"]),
        ],
    )
    def test_a_layer_map_out_of_range(self, run, folder, method, words):
        self.refused(run("causal-lm", f"method={method}"), folder, *words)

    def test_layers_out_of_range(self, run, folder):
        self.refused(run("causal-lm", "student.layers=3"), folder, "layers is 3", "1 to 2")

    def test_a_missing_column(self, run, folder):
        said = run("text-classification", "task.label_column=class")
        self.refused(said, folder, "no column 'class'; it has text, label", "label_column: NAME")

    def test_an_empty_file(self, run, folder):
        (folder / "labelled.csv").write_text("")
        self.refused(run("text-classification"), folder, "labelled.csv is empty")

    def test_a_file_that_is_no_utf8(self, run, folder):
        (folder / "texts" / "3.txt").write_bytes(b"caf\xe9")
        self.refused(run("causal-lm"), folder, "3.txt is no UTF-8: byte 3 is 0xe9")

    def test_labels_beyond_the_heads_width(self, run, folder):
        checkpoints.written([{"text": "a cat", "label": n} for n in (0, 1, 2)], folder / "labelled.csv")
        self.refused(run("text-classification"), folder, "is (2,) in the checkpoint", "3 classes")

    def test_a_method_without_a_meaning_for_the_task(self, run, folder):
        self.refused(run("sentence-embeddings", "methods=[kd]"), folder, "'kd'", "embedding")


class TestExport:
    """What the student becomes, compared with the run's."""

    def test_outputs_that_differ_are_refused_with_by_how_much(self, cli, run, folder, monkeypatch):
        import transformers

        assert run("causal-lm").code == 0
        save = transformers.GPT2LMHeadModel.save_pretrained

        def half(model, *given, **named):
            save(model, *given, **named)
            from safetensors.torch import load_file, save_file

            file = given[0] / "model.safetensors"
            save_file({name: value / 2 for name, value in load_file(file).items()}, file, {"format": "pt"})

        monkeypatch.setattr(transformers.GPT2LMHeadModel, "save_pretrained", half)
        said = cli("export", "runs/causal-lm", "--out", "out")
        assert said.code == 2
        assert "outputs differ from the run's by 0." in said.err
        assert not (folder / "out").exists()
        assert not list(folder.glob(".out*")), "nothing is left over"

    @pytest.mark.parametrize(
        "task",
        [
            "causal-lm",
            pytest.param("text-classification", marks=pytest.mark.slow),
            pytest.param("sentence-embeddings", marks=pytest.mark.slow),
        ],
    )
    def test_a_program_takes_any_number_of_rows_and_of_tokens(self, cli, run, folder, task):
        import transformers

        assert run(task).code == 0
        said = cli("export", f"runs/{task}", "--to", "torch-export", "--out", "program")
        assert said.code == 0, said.err
        assert "it takes input_ids, attention_mask" in said.out
        program = torch.export.load(folder / "program" / "student.pt2").module()
        assert cli("export", f"runs/{task}", "--out", "plain").code == 0
        model = getattr(transformers, LOADS[task]).from_pretrained(folder / "plain").eval()
        for rows, tokens in ((2, 5), (5, 20)):
            ids = torch.randint(4, 20, (rows, tokens), generator=torch.Generator().manual_seed(rows))
            mask = torch.ones_like(ids)
            mask[0, tokens - 2 :] = 0
            with torch.no_grad():
                own = model(input_ids=ids, attention_mask=mask)
            if task == "sentence-embeddings":
                weights = mask[..., None]
                expected = (own.last_hidden_state * weights).sum(1) / weights.sum(1)
            else:
                expected = own.logits
            assert torch.allclose(program(ids, mask), expected, atol=1e-5)

    def test_onnx_gives_the_same_outputs(self, cli, run, folder):
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra export)")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra export)")
        import transformers

        assert run("causal-lm").code == 0
        said = cli("export", "runs/causal-lm", "--to", "onnx", "--out", "onnx")
        assert said.code == 0, said.err
        assert cli("export", "runs/causal-lm", "--out", "plain").code == 0
        session = onnxruntime.InferenceSession(str(folder / "onnx" / "student.onnx"))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "plain").eval()
        for rows, tokens in ((3, 7), (2, 12)):
            ids = torch.randint(4, 200, (rows, tokens), generator=torch.Generator().manual_seed(rows))
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                expected = model(**given).logits
            found = session.run(["logits"], {name: value.numpy() for name, value in given.items()})[0]
            assert abs(torch.from_numpy(found) - expected).max() < 1e-4 * expected.abs().max()

    def test_the_page_says_what_was_saved_with_the_teacher_beside_the_student(self, cli, run, folder):
        import transformers

        assert run("causal-lm").code == 0
        assert (said := cli("export", "runs/causal-lm", "--out", "out")).code == 0
        page = (folder / "runs" / "causal-lm" / "compression.md").read_text()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
        assert rows[0] == ["", "teacher", "student", "times smaller"]
        counts = [
            sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(path).parameters())
            for path in (folder / "causal-lm" / "teacher", folder / "out")
        ]
        assert rows[2] == ["parameters", *(f"{count:,}" for count in counts), f"{counts[0] / counts[1]:.2f}"]
        assert float(rows[3][2]) == pytest.approx(
            (folder / "out" / "model.safetensors").stat().st_size / 2**20, abs=0.01
        )
        assert [row[0] for row in rows[4:]] == [
            "peak memory, MiB, 32 rows", "latency, ms, 1 row", "latency, ms, 32 rows",
        ]  # fmt: skip
        assert all(float(value.replace(",", "")) > 0 for row in rows[4:] for value in row[1:])
        assert rows[2][2] in said.out
        assert cli("verify", "runs/causal-lm").code == 0
        assert cli("run", "causal-lm.yaml", *SHORT, "--overwrite").code == 0, "the page is ours to remove"

    def test_an_unfinished_run_another_form_and_a_full_folder_are_refused(self, cli, run, folder):
        assert run("causal-lm").code == 0
        for words, said in (
            (
                ("runs/causal-lm", "--to", "tflite", "--out", "o"),
                "expected one of transformers, torch-export, onnx",
            ),
            (("runs/causal-lm", "--out", "texts"), "is there and not empty"),
            (("texts", "--out", "o"), "holds no run"),
        ):
            found = cli("export", *words)
            assert found.code == 2
            assert said in found.err
        (folder / "runs" / "causal-lm" / "summary.json").unlink()
        assert "unfinished" in cli("export", "runs/causal-lm", "--out", "o").err
