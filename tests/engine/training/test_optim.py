"""Optimizers and schedulers of torch, by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.config import Named, OptimizerConfig, Training
from stillhouse.errors import ConfigError
from stillhouse.training import optim


def refused(optimizer: dict | None = None, scheduler: dict | None = None) -> str:
    settings = Training.model_validate({"optimizer": optimizer or {}, "scheduler": scheduler})
    with pytest.raises(ConfigError) as caught:
        optim.check(settings.optimizer, settings.scheduler)
    return str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ({"name": "AdmaW"}, "optimizer.name: no 'AdmaW' in torch.optim; did you mean 'AdamW'?"),
        ({"name": "Optimizer"}, "optimizer.name: no 'Optimizer'"),
        ({"name": "lr_scheduler"}, "optimizer.name: no 'lr_scheduler'"),
        ({"betsa": [0.9, 0.9]}, "optimizer.betsa: AdamW has no such argument; did you mean 'betas'?"),
        ({"betas": [0.9, 2.0]}, "optimizer: AdamW: Invalid beta parameter"),
        ({"name": "LBFGS"}, "optimizer: LBFGS"),
        ({"name": "SGD", "momentum": "much"}, "optimizer: SGD"),
    ],
)
def test_an_optimizer_that_torch_does_not_have_is_refused(optimizer, said):
    assert said in refused(optimizer)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"name": "CosineLR"}, "scheduler.name: no 'CosineLR' in torch.optim.lr_scheduler; did you mean"),
        ({"name": "StepLR"}, "scheduler: StepLR: "),
        (
            {"name": "StepLR", "step": 3},
            "scheduler.step: StepLR has no such argument; did you mean 'step_size'?",
        ),
        ({"name": "LambdaLR", "lr_lambda": "print"}, "scheduler: LambdaLR"),
        ({"name": "ReduceLROnPlateau"}, "scheduler: ReduceLROnPlateau"),
        ({"name": "SequentialLR"}, "scheduler: SequentialLR"),
    ],
)
def test_a_scheduler_that_torch_does_not_have_or_that_a_config_can_not_name_is_refused(scheduler, said):
    assert said in refused(scheduler=scheduler)


@pytest.mark.parametrize(
    "name", ["AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adafactor"]
)
def test_torchs_optimizers_train(name):
    model = nn.Linear(3, 1)
    config = OptimizerConfig(name=name, lr=0.1)
    optim.check(config, None)
    made = optim.make_optimizer([{"params": list(model.parameters())}], config)
    before = model.weight.detach().clone()
    model(torch.ones(2, 3)).sum().backward()
    made.step()
    assert type(made) is getattr(torch.optim, name)
    assert not torch.equal(before, model.weight)


def test_settings_reach_the_optimizer():
    made = optim.make_optimizer(
        [{"params": [nn.Parameter(torch.zeros(1))]}],
        OptimizerConfig(lr=0.5, weight_decay=0.25, betas=(0.8, 0.9)),
    )
    assert (made.defaults["lr"], made.defaults["weight_decay"], made.defaults["betas"]) == (
        0.5,
        0.25,
        (0.8, 0.9),
    )


@pytest.mark.parametrize(
    ("scheduler", "last"),
    [
        ({"name": "CosineAnnealingLR"}, 0.0),
        ({"name": "LinearLR", "end_factor": 0.5}, 0.5),
        ({"name": "PolynomialLR"}, 0.0),
        ({"name": "OneCycleLR", "max_lr": 1.0}, 1.0 / 25 / 1e4),
        ({"name": "ConstantLR", "factor": 0.5}, 1.0),
        ({"name": "CosineAnnealingLR", "T_max": 20}, 0.5),
    ],
)
def test_a_schedule_spans_the_updates_unless_it_is_told_otherwise(scheduler, last):
    made = optim.make_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], OptimizerConfig(lr=1.0))
    spans = 10 - (scheduler["name"] == "OneCycleLR")
    schedule = optim.make_scheduler(made, Named(**scheduler), 10)
    for _ in range(spans):
        made.step()
        schedule.step()
    assert made.param_groups[0]["lr"] == pytest.approx(last, abs=1e-9)
