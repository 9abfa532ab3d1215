"""Metrics that read batch by batch give what the whole gives."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stillhouse.api import KINDS, DataError
from stillhouse.contract import metrics as module
from stillhouse.contract.metrics import DEFAULTS, WholeSplit, default_metrics, metrics_named, numbers
from stillhouse.errors import ConfigError

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(50, 4, generator=GENERATOR)
CLASSES = torch.randint(3, (50,), generator=GENERATOR)  # of 4: one has no row
FLAGS = torch.randint(2, (50, 4), generator=GENERATOR).float()
NUMBERS = LOGITS[:, 0] + torch.randn(50, generator=GENERATOR)


def taken(name, kind, outputs, labels, parts=(7, 20, 23)):
    metric = metrics_named([name], KINDS[kind])[name]
    for _ in range(2):  # a second split begins anew
        metric.reset()
        for own, wanted in zip(outputs.split(parts), labels.split(parts), strict=True):
            metric.update(own, wanted)
    return float(metric.compute())


def f1(guess, wanted):
    right = (guess & wanted).sum().item()
    return 2 * right / max(guess.sum().item() + wanted.sum().item(), 1)


def by_hand(name):
    guess = LOGITS.argmax(-1)
    nll = F.cross_entropy(LOGITS.double(), CLASSES).item()
    overlap = [((guess == c) & (c == CLASSES)).sum().item() for c in range(4)]
    union = [((guess == c) | (c == CLASSES)).sum().item() for c in range(4)]
    return {
        "accuracy": (guess == CLASSES).double().mean().item(),
        "nll": nll,
        "perplexity": math.exp(nll),
        "f1": sum(f1(guess == c, c == CLASSES) for c in range(4)) / 4,
        "miou": sum(a / b for a, b in zip(overlap, union, strict=True) if b) / sum(b > 0 for b in union),
    }[name]


@pytest.mark.parametrize("name", ["accuracy", "nll", "perplexity", "f1", "miou"])
def test_of_classes(name):
    assert taken(name, "classification", LOGITS, CLASSES) == pytest.approx(by_hand(name), rel=1e-6)


def test_of_flags():
    guess, wanted = LOGITS > 0, FLAGS > 0
    kind = "multi_label"
    assert taken("accuracy", kind, LOGITS, FLAGS) == pytest.approx((guess == wanted).double().mean().item())
    mean = sum(f1(guess[:, c], wanted[:, c]) for c in range(4)) / 4
    assert taken("f1", kind, LOGITS, FLAGS) == pytest.approx(mean)
    loss = F.binary_cross_entropy_with_logits(LOGITS.double(), FLAGS.double()).item()
    assert taken("nll", kind, LOGITS, FLAGS) == pytest.approx(loss, rel=1e-6)


def test_outputs_between_0_and_1_are_logits_all_the_same():
    small = torch.full((50, 4), 0.3)
    assert taken("accuracy", "multi_label", small, torch.ones(50, 4)) == 1


def test_of_numbers():
    guess, wanted = LOGITS[:, 0].double(), NUMBERS.double()
    mse = (guess - wanted).square().mean().item()
    ranks = torch.stack([guess.argsort().argsort(), wanted.argsort().argsort()]).double()
    kind = "regression"
    assert taken("mse", kind, LOGITS[:, 0], NUMBERS) == pytest.approx(mse)
    assert taken("r2", kind, LOGITS[:, 0], NUMBERS) == pytest.approx(
        1 - mse / wanted.var(correction=0).item()
    )
    assert taken("spearman", kind, LOGITS[:, 0], NUMBERS) == pytest.approx(torch.corrcoef(ranks)[0, 1].item())


def test_numbers_far_from_zero_keep_their_share_of_variance():
    far = NUMBERS.double() + 1e5
    assert taken("r2", "regression", far + 0.5, far) == pytest.approx(
        1 - 0.25 / far.var(correction=0).item(), rel=1e-6
    )


@pytest.mark.parametrize("kind", DEFAULTS)
def test_every_kind_has_some_that_fit_it(kind):
    assert tuple(default_metrics(KINDS[kind])) == DEFAULTS[kind]


@pytest.mark.parametrize(
    ("names", "kind", "said"),
    [
        (["acuracy"], "classification", "did you mean 'accuracy'"),
        (["spearman"], "classification", "spearman has no meaning for classification; expected some of: accuracy, f1"),
        (["f1"], "embedding", "expected some of: none"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit_are_refused(names, kind, said):
    with pytest.raises(ConfigError) as caught:
        metrics_named(names, KINDS[kind])
    assert said in str(caught.value)


class TestNumbers:
    def test_of_any_library_become_pythons(self):
        given = {
            "a": torch.tensor(0.5),
            "b": np.float32(0.25),
            "c": 3,
            "d": [0.1, 0.2],
            "e": {"x": torch.tensor([1.0])},
        }
        found = numbers(given, "mine")
        assert found == {"a": 0.5, "b": 0.25, "c": 3, "d.0": 0.1, "d.1": 0.2, "e.x.0": 1.0}
        assert json.loads(json.dumps(found)) == found

    @pytest.mark.parametrize("given", [0.5, {}, None, {"a": "high"}, {"a": None}])
    def test_of_other_things_are_refused(self, given):
        with pytest.raises(ConfigError, match="score of mine gave"):
            numbers(given, "mine")


def test_a_function_of_the_whole_is_given_it_up_to_a_limit(monkeypatch):
    metric = WholeSplit(lambda outputs, labels: {"rows": len(labels), "sum": outputs.sum()})
    for part in LOGITS.split(20):
        metric.update(part, CLASSES[: len(part)])
    assert numbers(metric.compute(), "it") == {
        "rows": 50,
        "sum": pytest.approx(LOGITS.sum().item(), rel=1e-5),
    }
    monkeypatch.setattr(module, "LIMIT", 300)
    with pytest.raises(DataError, match="at most 300 are joined"):
        metric.update(LOGITS, CLASSES)
