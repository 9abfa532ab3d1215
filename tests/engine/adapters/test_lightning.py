"""What Lightning logs: sums over an update's micro-batches, and a validation that no batch size changes."""

from __future__ import annotations

import contextlib
import io
import warnings

import five
import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader

import stillhouse
from stillhouse.adapters.lightning import DistilledModule, UpdateLoader
from stillhouse.errors import ConfigError


class Kept(Logger):
    """Keeps what is logged."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, float]] = []

    def log_metrics(self, metrics, step=None):
        self.found.append(dict(metrics))

    def log_hyperparams(self, *args, **named):
        pass


def fitted(accumulate, *, loader=UpdateLoader, validation=None):
    """What was logged, and the trainer, after two updates of eight rows at learning rate 0."""
    distillation = stillhouse.Distillation("kd", teacher=five.gpt2(2), task="causal_lm")
    module = DistilledModule(
        five.gpt2(1), distillation, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0)
    )
    named = {"accumulate_grad_batches": accumulate} if loader is UpdateLoader else {}
    data = loader(five.texts(16), batch_size=8 // accumulate, collate_fn=five.padded, **named)
    kept = Kept()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=kept,
        )
        trainer.fit(module, data, validation)
    return kept.found, trainer


def test_what_is_logged_is_the_whole_update_s():
    names = ("loss", "kd.kl", "kd.ce")
    whole, expected = fitted(1)
    parts, trainer = fitted(4)
    whole, parts = ([line for line in lines if "loss" in line] for lines in (whole, parts))
    assert len(whole) == len(parts) == 2
    for name in names:
        assert [line[name] for line in parts] == pytest.approx([line[name] for line in whole], rel=1e-5)
        last = float(expected.callback_metrics[name])
        assert float(trainer.callback_metrics[name]) == pytest.approx(last, rel=1e-5)


def test_the_validation_loss_is_the_mean_over_rows():
    rows = five.texts(10, seed=3)
    losses = []
    for size in (3, 10):
        _, trainer = fitted(1, validation=DataLoader(rows, batch_size=size, collate_fn=five.padded))
        losses.append(float(trainer.callback_metrics["val_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_loader_that_does_not_read_ahead_is_told_where_the_one_is_that_does():
    with pytest.raises(ConfigError, match=r"from stillhouse\.adapters\.lightning"):
        fitted(4, loader=DataLoader)
