"""Checks on batches of tokens: padding on either side, masks, micro-batches that are padded to lengths of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stillhouse.api import IGNORE, Batch
from stillhouse.testing.checks import CheckFunction, NotApplicable, expect
from stillhouse.testing.number_checks import close
from stillhouse.testing.rig import Rig, Subject, everything
from stillhouse.testing.toys import CLASSES, PAD, TOKENS, VOCABULARY

LENGTHS = (6, 3, 5, 2)


def padding_counts_nowhere(subject: Subject, folder: Path) -> None:
    """Tokens: the same sentences have one loss and one gradient, however far and on whichever side they are padded."""
    pads = {"no more": (6, "right"), "3 pads more": (9, "right"), "pads on the left": (6, "left")}
    runs = [_rig(subject, folder).updates(_given(*pad)) for pad in pads.values()]
    for (stage, metrics, gradient), *others in zip(*runs, strict=True):
        for what, (_, terms, other) in zip([*pads][1:], others, strict=True):
            expect(
                close(metrics["loss"], terms["loss"]) and close(gradient, other),
                subject,
                f"in stage '{stage.name}' the loss of one batch of tokens is {float(metrics['loss']):.6g}, and with {what} "
                f"{float(terms['loss']):.6g}; expected the same: use batch.mask, and compare positions where it is True",
            )


def ragged_micro_batches_do_not_matter(subject: Subject, folder: Path) -> None:
    """Tokens: the gradient is the same in one batch and in micro-batches that are padded to their own longest."""
    whole = _rig(subject, folder).updates(_given(6, "right"))
    parts = _rig(subject, folder).updates(
        lambda batch: [
            _padded(batch, slice(0, 1), 6, "right"),
            _padded(batch, slice(1, 4), 5, "left"),
        ]
    )
    for (stage, metrics, gradient), (_, terms, other) in zip(whole, parts, strict=True):
        expect(
            close(metrics["loss"], terms["loss"]) and close(gradient, other),
            subject,
            f"in stage '{stage.name}' the loss of one batch of tokens is {float(metrics['loss']):.6g}, and in two "
            f"micro-batches of 1 and 3 sentences, 6 and 5 tokens long, {float(terms['loss']):.6g}; expected the same: "
            "divide by info.rows, and keep no length of a batch",
        )


def _rig(subject: Subject, folder: Path) -> Rig:
    if TOKENS.task not in subject.kind.supports:
        raise NotApplicable(f"does not support {TOKENS.task}")
    return Rig(subject, everything(subject, toys=TOKENS, folder=folder))


def _given(length: int, side: str):  # noqa: ANN202
    return lambda batch: _padded(batch, slice(0, 4), length, side)


def _padded(like: Batch, rows: slice, length: int, side: str) -> Batch:
    """Sentences of LENGTHS tokens, always the same ones, as a loader would pad them."""
    generator = torch.Generator().manual_seed(11)
    tokens, classes = (
        [torch.randint(least, most, (size,), generator=generator) for size in LENGTHS]
        for least, most in ((1, VOCABULARY), (0, CLASSES))
    )
    inputs = {
        "input_ids": _joined(tokens[rows], length, side, PAD),
        "attention_mask": _joined([torch.ones_like(row) for row in tokens[rows]], length, side, 0),
    }
    labels = _joined(classes[rows], length, side, IGNORE) if like.labels is not None else None
    return Batch(inputs, labels, torch.arange(len(LENGTHS))[rows], mask=inputs["attention_mask"].bool())


def _joined(rows: Sequence[Tensor], length: int, side: str, filler: int) -> Tensor:
    made = torch.full((len(rows), length), filler)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        made[number, place] = row
    return made


CHECKS: tuple[CheckFunction, ...] = (padding_counts_nowhere, ragged_micro_batches_do_not_matter)
