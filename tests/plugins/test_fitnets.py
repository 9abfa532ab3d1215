from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import loop

from stillhouse.api import ConfigError, Feature, FeaturePair
from stillhouse_baselines.fitnets import FitNets, FitNetsConfig, Regressor


def test_the_hint_is_the_mean_squared_error():
    made = loop(["kd", FitNets()])
    batch = made.splits.train.batch(torch.arange(8))
    _, terms = made.step(made.step.run.student, batch)
    (pair,) = made.step.plugins.plugins[1].method.pairs
    student, teacher = made.step.run.student, made.step.teacher
    features = [
        model[: int(side.name) + 1](batch.inputs)
        for model, side in ((student, pair.student), (teacher, pair.teacher))
    ]
    regressor = made.step.run.models["fitnets.regressor"][0]
    expected = nn.functional.mse_loss(regressor.map(features[0]), features[1])
    assert terms["fitnets.hint"].item() == pytest.approx(expected.item(), rel=1e-5)


def pair(student: tuple[int, ...], teacher: tuple[int, ...], *, tokens: bool = False) -> FeaturePair:
    own, other = (
        Feature(role, "layer", shape, tokens, own_rows=True)
        for role, shape in (("student", student), ("teacher", teacher))
    )
    return FeaturePair(own, other)


def test_features_with_places_meet_at_the_smaller_number_of_them():
    regressor = Regressor(pair((2, 3, 10), (2, 5, 4)))
    a, b = regressor(torch.randn(2, 3, 10), torch.randn(2, 5, 4))
    assert a.shape == b.shape == (2, 4, 5)
    flat = Regressor(pair((2, 7), (2, 5, 4)))
    a, b = flat(torch.randn(2, 7), torch.randn(2, 5, 4))
    assert a.shape == b.shape == (2, 20)


def test_a_module_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"teacher.head: no such module"):
        loop(["kd", {"name": "fitnets", "layers": {"0": "head"}}])


def test_one_pair_may_be_named_by_two_settings():
    pair = FitNetsConfig(student_layer="0", teacher_layer="2")
    assert pair == FitNetsConfig(layers={"0": "2"})
    with pytest.raises(ValueError, match="given twice"):
        FitNetsConfig(student_layer="0", teacher_layer="2", layers="last")
