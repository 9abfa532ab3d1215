"""Docstrings under three questions, and digits with other digits laid over them."""

from __future__ import annotations

import pytest
import torch
import toys

from stillhouse.errors import ConfigError
from stillhouse_tasks import texts
from stillhouse_tasks.digits import Digits, OverlaidConfig, OverlaidDigits


def written(folder, name, content):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)


def test_docstrings_come_with_package_kind_and_what_is_returned(tmp_path):
    written(
        tmp_path,
        "email/parser.py",
        'class P:\n    def parse(self):\n        """Read it."""\n        return 1\n',
    )
    written(tmp_path, "abc.py", 'def f():\n    """Do it."""\n    return\n\ndef g():\n    pass\n')
    written(tmp_path, "test/wrong.py", 'def f():\n    """Not this."""\n')
    written(tmp_path, "wrong.py", "def (")
    assert sorted(texts._documented(tmp_path)) == [
        ("Do it.", -1, 0, 0), ("Read it.", texts.PACKAGES.index("email"), 1, 1)
    ]  # fmt: skip


def test_no_text_is_in_two_splits_and_every_one_of_the_library_is_in_one():
    splits = texts.StdlibTexts().splits()
    words, packages, _, _ = texts.rows()
    parts = {name: split.inputs["inputs"] for name, split in splits.items()}
    assert sum(map(len, parts.values())) == len(words)
    joined = torch.cat(list(parts.values()))
    assert len(joined.unique(dim=0)) == len(words), "texts that begin with the same words are one row"
    assert int((packages >= 0).sum()) > 1000


def test_a_label_is_a_column_of_its_task():
    splits = texts.StdlibTexts(
        texts.TextsConfig(package=30, method=20, returns=10, validation=8, test=9)
    ).splits()
    assert splits.train.extra["task"].bincount().tolist() == [30, 20, 10]
    for number, (low, high) in enumerate([(0, 7), (8, 9), (10, 11)]):
        own = splits.train.labels[splits.train.extra["task"] == number]
        assert ((own >= low) & (own <= high)).all(), "which of them occur is the library's"
    outputs = torch.full((24, 12), -1e4).scatter(1, splits.validation.labels[:, None], 5.0)
    assert toys.scores(texts.StdlibTexts(), outputs, splits.validation.labels)["accuracy.returns"] == 1


def test_more_rows_than_there_are_are_refused():
    with pytest.raises(ConfigError, match="rows of package asked for; expected at most"):
        texts.StdlibTexts(texts.TextsConfig(package=5000)).splits()


@pytest.mark.parametrize("make", [texts.wide, texts.bag])
def test_what_follows_a_text_does_not_move_its_answer(make):
    model, row = make(), torch.randint(1, texts.WORDS, (1, texts.LENGTH))
    row[:, 20:] = 0
    padded = torch.cat([row, torch.zeros(1, 7, dtype=torch.long)], 1)
    torch.testing.assert_close(model(row), model(padded))
    assert torch.isfinite(model(torch.zeros(1, texts.LENGTH, dtype=torch.long))).all(), (
        "a text without a word"
    )


def test_overlaid_digits_are_two_of_one_split():
    config = OverlaidConfig(labelled=20, unlabelled=30, validation=10, strength=0.5)
    plain, made = Digits(config).splits(), OverlaidDigits(config).splits()
    for (name, before), (_, after) in zip(plain.items(), made.items(), strict=True):
        laid = (after.inputs - before.inputs) / 0.5
        nearest = torch.cdist(laid, before.inputs).min(1)
        assert float(nearest.values.max()) < 1e-3, name
        assert len(nearest.indices.unique()) > len(before) * 0.9
        assert (before.labels is None and after.labels is None) or torch.equal(before.labels, after.labels)
