"""Several teachers: by name, each checked, their mean as soft label, their features under their names."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import toys
from torch import nn

from stillhouse import Distillation
from stillhouse.api import Batch, ConfigError, LossTerm, Method, Stage, hookimpl


def net(width: int, seed: int, classes: int = toys.CLASSES) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(body=nn.Linear(toys.FEATURES, width), act=nn.Tanh(), head=nn.Linear(width, classes))
    )


def attached(method, student: nn.Module, teachers, batch, **given):
    if isinstance(method, list):
        return Distillation(method, teacher=teachers).attach(student, probe=batch, **given)
    return Distillation(**method, teacher=teachers).attach(student, probe=batch, **given)


def test_the_soft_label_is_the_mean_of_their_log_probabilities():
    teachers, student, (x, y) = {"a": net(8, 1), "b": net(12, 2)}, net(4, 3), toys.rows(6)
    with attached({"method": "kd", "temperature": 2.0, "alpha": 1.0}, student, teachers, (x, y)) as step:
        loss = step(student, (x, y)).loss
    wide = [model.double() for model in (*teachers.values(), student)]
    first, second, own = (model(x.double()) for model in wide)
    mean = (first.log_softmax(-1) + second.log_softmax(-1)) / 2
    target = (mean / 2).log_softmax(-1)
    expected = 4 * (target.exp() * (target - (own / 2).log_softmax(-1))).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_students_layer_is_guided_by_the_teacher_that_is_named():
    teachers, student, (x, y) = {"a": net(8, 1), "b": net(12, 2)}, net(4, 3), toys.rows(6)
    hints = [{"name": "fitnets", "layers": {"body": "b.body"}}, "kd"]
    with attached(hints, student, teachers, (x, y)) as step:
        metrics = step(student, (x, y)).metrics
        (regressor,) = step.run.models["fitnets.regressor"]
    expected = nn.functional.mse_loss(regressor.map(student.body(x)), teachers["b"].body(x))
    assert metrics["fitnets.hint"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_two_of_one_method_may_each_take_a_teacher():
    teachers, student, batch = {"a": net(8, 1), "b": net(12, 2)}, net(4, 3), toys.rows(6)
    both = [
        {"name": "fitnets", "layers": {"body": f"{name}.body"}, "as": f"from_{name}"} for name in teachers
    ]
    with attached([*both, "kd"], student, teachers, batch) as step:
        metrics = step(student, batch).metrics
        widths = [step.run.models[f"from_{name}.regressor"][0].map.out_features for name in teachers]
    assert widths == [8, 12]
    assert metrics["from_a.hint"] != metrics["from_b.hint"]


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (
            "middle",
            r"there are several teachers \(a, b\); expected the student's layers with a teacher's by name",
        ),
        ({"body": "body"}, r"'body' says no teacher, and there are several; expected a\.body or b\.body"),
        ({"body": "b.nobody"}, r"b\.nobody: no such module in Sequential.*body"),
    ],
)
def test_layers_that_say_no_teacher_are_refused(layers, says):
    hint = {"method": "fitnets", "layers": layers}
    with pytest.raises(ConfigError, match=says):
        attached(hint, net(4, 3), {"a": net(8, 1), "b": net(12, 2)}, toys.rows(6))


class ByTurns(Method):
    """A stage against each teacher, with hints from the same layer of ``b``."""

    api_version = 1
    requires = frozenset({"logits"})

    @hookimpl
    def on_run_start(self, run):
        from stillhouse.api import feature_pairs

        (self.pair,) = feature_pairs(run, {"body": "b.body"})

    @hookimpl
    def stages(self, run):
        return [Stage("first", teacher="a"), Stage("second", teacher="b")]

    @hookimpl
    def loss_terms(self, student_out, teacher_out, batch: Batch, info):
        self.seen = teacher_out
        return {"own": LossTerm(student_out.logits.square().mean() * info.share)}


def test_features_of_one_teacher_are_never_taken_for_anothers():
    teachers, student, batch = {"a": net(8, 1), "b": net(12, 2)}, net(4, 3), toys.rows(6)
    method = ByTurns()
    with Distillation(method, teacher=teachers).attach(student, probe=batch, steps=2) as step:
        step(student, batch)
        with pytest.raises(ConfigError, match=r"no feature b\.body came"):
            method.pair.teacher.of(method.seen)
        step(student, batch)
        assert torch.equal(method.pair.teacher.of(method.seen), teachers["b"].body(batch[0]))


def test_every_teacher_is_compared_with_the_student_before_the_first_step():
    with pytest.raises(
        ConfigError, match=r"the teacher gives outputs of shape \(6, 3\), the student \(6, 4\)"
    ):
        attached({"method": "dkd"}, net(4, 3, 4), {"a": net(8, 1, 4), "b": net(8, 2, 3)}, toys.rows(6))


def test_every_teacher_is_asked_whether_it_is_deterministic():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(8, 1)

        def forward(self, x):
            return self.net(x) + torch.randn(())

    with pytest.raises(ConfigError, match=r"is for deterministic teachers"):
        attached({"method": "sld"}, net(4, 3), {"a": net(8, 1), "b": Noisy()}, toys.rows(6))


def test_what_a_plugin_asks_the_teacher_is_answered_by_all_of_them():
    class Asks(ByTurns):
        @hookimpl
        def on_run_start(self, run):
            super().on_run_start(run)
            self.given = run.outputs("teacher").logits
            with pytest.raises(ConfigError, match=r"there are several teachers; expected one of a, b"):
                run.capture("teacher", "body")

    teachers, (x, y), method = {"a": net(8, 1), "b": net(12, 2)}, toys.rows(6), Asks()
    Distillation(method, teacher=teachers).attach(net(4, 3), probe=(x, y), steps=2).close()
    each = [model(x).log_softmax(-1) for model in teachers.values()]
    torch.testing.assert_close(method.given, (each[0] + each[1]) / 2)


def test_a_stage_against_the_teacher_is_against_all_of_them():
    """SLD names its stages: none of them may hear the first teacher alone."""
    teachers, batch = {"a": net(8, 1), "b": net(12, 2)}, toys.rows(6)
    with attached({"method": "sld"}, net(4, 3), teachers, batch, steps=4) as step:
        taught = [stage.teacher for stage in step.stages if stage.teacher is not None]
    assert taught
    assert all(teacher == ("a", "b") or teacher in ("student", "target") for teacher in taught)


@pytest.mark.parametrize("name", ["student", "a.b"])
def test_names_that_mean_something_else_are_refused(name):
    with pytest.raises(ConfigError, match=rf"a teacher is called '{name}'; expected a name"):
        attached({"method": "kd"}, net(4, 3), {name: net(8, 1), "b": net(12, 2)}, toys.rows(6))
