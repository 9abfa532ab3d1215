"""Scores of a split: over the rows that count, batch by batch, tried before anything is trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import stillhouse
from stillhouse.api import IGNORE, KINDS, Task, TensorSplit
from stillhouse.config import validate
from stillhouse.contract.datasets import DatasetSplit
from stillhouse.contract.metrics import WholeSplit
from stillhouse.errors import StillhouseError
from stillhouse.runs import evaluate
from stillhouse.runs.data import as_split
from stillhouse.runs.evaluate import score

CPU = torch.device("cpu")
X, Y = toys.rows(30, 1)


def task_of(kind="classification", **metrics):
    made = Task()
    made.kind = kind
    if metrics:
        made.metrics = lambda: metrics
    return made


def config(**given):
    return validate({"task": "digits", "method": "kd", **given})


class Seen(nn.Module):
    """Keeps the sizes of its batches."""

    def __init__(self, net):
        super().__init__()
        self.net, self.sizes = net, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.net(x)


def test_no_row_without_label_counts():
    labels = torch.where(torch.arange(30) % 3 == 0, IGNORE, Y)
    logits = toys.net()(X)
    known = labels != IGNORE
    found = score(task_of(), toys.net(), TensorSplit(X, labels), CPU)
    assert found["accuracy"] == float((logits.argmax(-1) == labels)[known].float().mean())
    assert found["nll"] == pytest.approx(float(F.cross_entropy(logits[known], labels[known])), rel=1e-6)


def test_models_are_scored_in_eval_mode_and_left_in_their_own():
    net = toys.net(dropout=0.9).train()
    first, second = (score(task_of(), net, TensorSplit(X, Y), CPU) for _ in range(2))
    assert first == second
    assert net.training


def test_a_teacher_reads_its_own_view():
    split = TensorSplit(X, Y, teacher_inputs=X.flip(1))
    found = score(task_of(), toys.net(), split, CPU, teacher=True)
    assert found == score(task_of(), toys.net(), TensorSplit(X.flip(1), Y), CPU)
    assert found != score(task_of(), toys.net(), split, CPU)


def test_batches_have_the_size_that_is_stated_else_the_loaders_else_what_fits(monkeypatch):
    def sizes(split, **given):
        net = Seen(toys.net())
        score(task_of(), net, split, CPU, config=config(**given) if given else None)
        return net.sizes

    loaded = as_split(DataLoader(torch.utils.data.TensorDataset(X, Y), 12), "validation")
    assert sizes(loaded) == [12, 12, 6]
    assert sizes(loaded, evaluate_batch_size=20) == [20, 10]
    assert sizes(TensorSplit(X, Y)) == [1, 30], "one row, to see what it takes, then all"
    monkeypatch.setattr(evaluate, "ROOM", 400)
    assert sizes(TensorSplit(X, Y)) == [1, 10, 10, 10], "40 bytes a row"


class Ragged:
    """Rows of tokens with a length of their own, classes -100 at every third place."""

    def __len__(self):
        return 11

    def __getitem__(self, row):
        tokens = torch.arange(row % 4 + 2) + 1
        return tokens, torch.where(torch.arange(len(tokens)) % 3 == 2, IGNORE, tokens % 3)


def padded(items):
    inputs, labels = zip(*items, strict=True)
    ids = pad_sequence(inputs, batch_first=True)
    return {
        "input": ids,
        "attention_mask": (ids > 0).long(),
        "labels": pad_sequence(
            labels, batch_first=True, padding_value=0
        ),  # a class: the attention mask alone says pad
    }


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 3))

    def forward(self, input, attention_mask=None):
        return self.net(input)


def test_batches_padded_to_their_own_length_score_real_positions_alone():
    net = Tokens()
    split = DatasetSplit(Ragged(), collate=padded, kind=KINDS["token_classification"])
    outputs, labels = [], []
    for row in range(11):
        tokens, wanted = Ragged()[row]
        outputs.append(net(tokens[None])[0][wanted != IGNORE])
        labels.append(wanted[wanted != IGNORE])
    logits, wanted = torch.cat(outputs), torch.cat(labels)
    for size in (3, 11):
        found = score(
            task_of("token_classification"), net, split, CPU, config=config(evaluate_batch_size=size)
        )
        assert found["accuracy"] == float((logits.argmax(-1) == wanted).float().mean())
        assert found["nll"] == pytest.approx(float(F.cross_entropy(logits, wanted)), rel=1e-6)


def test_pixels_are_scored_with_classes_on_their_own_axis():
    labels = torch.randint(3, (4, 5, 5), generator=torch.Generator().manual_seed(0))
    right = 9.0 * F.one_hot(labels, 3).movedim(-1, 1)
    found = score(task_of("segmentation"), nn.Identity(), TensorSplit(right, labels), CPU)
    assert (found["miou"], found["accuracy"]) == (1, 1)


def test_a_vocabularys_outputs_are_handed_over_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 4 * 4 * 7)
    seen = []

    class Rows:
        def update(self, outputs, labels):
            seen.append(len(outputs))

        def compute(self):
            return {"rows": sum(seen)}

    task = task_of(**{"": Rows()})
    task.metric = "rows"
    assert score(task, toys.net(), TensorSplit(X, Y), CPU) == {"rows": 30}
    assert seen == [7, 7, 7, 7, 2]


class TestBeforeTraining:
    def refused(self, data=None, **given):
        student = toys.net(seed=1)
        before = toys.weights(student)
        data = data or {"train": (X, Y), "validation": (X, Y)}
        with pytest.raises(StillhouseError) as caught:
            stillhouse.distill(
                student, toys.net(16), data, method="kd", steps=3, batch_size=8, device="cpu", **given
            )
        assert toys.same_bits(before, student)
        return str(caught.value)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (lambda outputs, labels: 0.5, "gave float (0.5); expected metrics by name"),
            (lambda outputs, labels: {"a": "high"}, "gave 'a' = 'high'"),
            ("acuracy", "did you mean 'accuracy'"),
            (["accuracy", "r2"], "r2 has no meaning for classification"),
            ({"mine": 3}, "'mine' is int; expected an object with update and compute"),
            (7, "score is 7; expected names (accuracy"),
        ],
    )
    def test_a_score_that_gives_no_numbers_is_refused(self, given, said):
        assert said in self.refused(score=given)

    def test_a_metric_that_can_not_read_the_outputs_is_refused(self):
        class Picky:
            def update(self, outputs, labels):
                raise ValueError("expected 7 classes")

            def compute(self):
                return 0.0

        assert "the metric 'picky' can't read outputs (30, 4)" in self.refused(score={"picky": Picky()})

    def test_outputs_too_large_for_a_function_are_refused(self, monkeypatch):
        monkeypatch.setattr(evaluate, "LIMIT", 30 * 4 * 4 - 1)
        assert "take 480 bytes or more" in self.refused(score=lambda outputs, labels: {"a": 1})

    def test_a_function_that_needs_more_rows_is_tried_on_all_of_them(self):
        def all_of_them(outputs, labels):
            if len(labels) < 100:
                raise ValueError("too few")
            return {"a": 1.0}

        x, y = toys.rows(100, 3)
        made = stillhouse.distill(
            toys.net(seed=1), toys.net(16), {"train": (X, Y), "validation": (x, y)}, method="kd", steps=3,
            batch_size=8, device="cpu", score=all_of_them,
        )  # fmt: skip
        assert made.scores["validation"] == {"a": 1}


@pytest.mark.parametrize(
    ("given", "names", "metric"),
    [
        ("f1", ["f1"], "f1"),
        (["nll", "accuracy"], ["nll", "accuracy"], "accuracy"),
        (lambda outputs, labels: {"a": torch.tensor(0.5), "b": np.float32(1)}, ["a", "b"], "a"),
        (lambda outputs, labels: {"each": [0.1, 0.2]}, ["each.0", "each.1"], "each.0"),
        ({"mine": WholeSplit(lambda outputs, labels: 0.5)}, ["mine"], "mine"),
    ],
)
def test_what_a_run_is_scored_by_may_be_named_or_given(given, names, metric):
    data = {"train": (X, Y), "validation": (X, Y)}
    made = stillhouse.distill(
        toys.net(seed=1), toys.net(16), data, method="kd", steps=3, batch_size=8, device="cpu", score=given
    )
    assert list(made.scores["validation"]) == names
    assert made.summary["metric"] == metric


def test_torchmetrics_objects_are_taken_as_they_are():
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

    given = MetricCollection({"f1": MulticlassF1Score(4), "acc": MulticlassAccuracy(4, average="micro")})
    data = {"train": (X, Y), "validation": (X, Y)}
    made = stillhouse.distill(
        toys.net(seed=1), toys.net(16), data, method="kd", steps=3, batch_size=8, device="cpu", score=given
    )
    right = float((made.student.eval()(X).argmax(-1) == Y).float().mean())
    assert set(made.scores["validation"]) == {"f1", "acc"}
    assert made.scores["validation"]["acc"] == pytest.approx(right)
