"""Hooks: checked when a method is loaded, called in the config's order, blamed when they fail."""

from __future__ import annotations

import functools

import pytest
import torch
import toys
from torch import nn

from stillhouse.api import (
    Auxiliary,
    LossTerm,
    Method,
    RunContext,
    Stage,
    StepInfo,
    StudentOut,
    Targets,
    TensorSplit,
    hookimpl,
)
from stillhouse.contract.batch import Batch
from stillhouse.errors import PluginError
from stillhouse.plugin.dispatch import Plugin, Plugins
from stillhouse.training.step import DistillStep


def plugin(method: type[Method], name: str = "mine") -> Plugin:
    return Plugin(name, "acme-distil 1.2", method())


def method(**attributes: object) -> type[Method]:
    return type("Mine", (Method,), {"api_version": 1, "requires": frozenset(), **attributes})


def terms(plugins: Plugins) -> dict[str, LossTerm]:
    return plugins.loss_terms(
        StudentOut(torch.zeros(2, 3)), None, Targets(), Batch(torch.zeros(2, 1)), StepInfo()
    )


def refused(made: type[Method]) -> str:
    with pytest.raises(PluginError) as caught:
        Plugins([plugin(made)])
    message = str(caught.value)
    assert "'mine'" in message
    assert "acme-distil 1.2" in message, "the distribution is to blame by name"
    return message


class TestWhatPluggyWouldPassOver:
    def test_a_wrong_argument_is_refused_with_the_nearest_name(self):
        @hookimpl
        def loss_terms(self, student_outs, info):
            return {}

        message = refused(method(loss_terms=loss_terms))
        assert "no argument 'student_outs'; did you mean 'student_out'?" in message
        assert "student_out, teacher_out, targets, batch, info" in message

    def test_a_keyword_only_argument_is_refused(self):
        @hookimpl
        def loss_terms(self, student_out, *, info):
            return {}

        assert "argument 'info' is keyword-only" in refused(method(loss_terms=loss_terms))

    @pytest.mark.parametrize("star", ["*args", "**kwargs"])
    def test_a_variadic_argument_is_refused(self, star):
        names: dict = {}
        exec(f"def loss_terms(self, {star}): return {{}}", names)
        assert "variadic" in refused(method(loss_terms=hookimpl(names["loss_terms"])))

    def test_an_argument_with_a_default_is_refused(self):
        @hookimpl
        def loss_terms(self, student_out, info=None):
            return {}

        assert "'info' has a default" in refused(method(loss_terms=loss_terms))

    def test_a_partial_is_refused(self):
        @hookimpl
        def loss_terms(self, student_out, info):
            return {}

        assert "is a partial" in refused(method(loss_terms=functools.partial(loss_terms)))

    def test_a_partialmethod_is_refused(self):
        @hookimpl
        def loss_terms(self, student_out, info):
            return {}

        assert "is a partialmethod" in refused(method(loss_terms=functools.partialmethod(loss_terms)))

    def test_a_cached_method_is_refused(self):
        @functools.lru_cache
        @hookimpl
        def loss_terms(self, student_out, info):
            return {}

        assert "lru_cache" in refused(method(loss_terms=loss_terms))

    def test_a_callable_object_is_refused(self):
        class Terms:
            def __call__(self, student_out, info):
                return {}

        assert "is a Terms" in refused(method(loss_terms=hookimpl(Terms())))

    def test_a_static_method_is_refused(self):
        @hookimpl
        def loss_terms(student_out, info):
            return {}

        assert "is a staticmethod" in refused(method(loss_terms=staticmethod(loss_terms)))

    def test_a_misspelt_hook_is_refused_with_the_nearest_name(self):
        @hookimpl
        def loss_term(self, student_out):
            return {}

        assert "'loss_term' is no hook; did you mean 'loss_terms'?" in refused(method(loss_term=loss_term))

    def test_a_hook_without_its_mark_is_refused(self):
        def loss_terms(self, student_out):
            return {}

        assert "put @hookimpl on it" in refused(method(loss_terms=loss_terms))

    @pytest.mark.parametrize("option", ["tryfirst", "trylast", "wrapper", "hookwrapper"])
    def test_pluggys_own_ordering_is_refused(self, option):
        def loss_terms(self, student_out):
            yield

        marked = hookimpl(**{option: True})(loss_terms)
        assert f"{option} is not used" in refused(method(loss_terms=marked))

    def test_a_hook_inherited_from_a_base_class_is_checked_too(self):
        @hookimpl
        def loss_terms(self, studentout):
            return {}

        base = method(loss_terms=loss_terms)
        assert "did you mean 'student_out'?" in refused(type("Derived", (base,), {}))

    def test_an_unmarked_helper_of_another_name_is_nobodys_business(self):
        Plugins([plugin(method(helper=lambda self, anything: anything))])


class TestContract:
    @pytest.mark.parametrize(
        ("version", "advice"), [(2, "upgrade stillhouse"), (0, "upgrade it"), (None, "upgrade it")]
    )
    def test_another_api_version_is_refused(self, version, advice):
        made = method(api_version=version)
        message = refused(made)
        assert f"api_version is {version}" in message
        assert advice in message

    def test_a_method_that_states_no_version_is_refused(self):
        assert "api_version is None" in refused(type("Mine", (Method,), {"requires": frozenset()}))

    def test_an_unknown_capability_is_refused_with_the_nearest_name(self):
        message = refused(method(requires=frozenset({"logit"})))
        assert "'logit': no such capability; did you mean 'logits'?" in message

    def test_the_same_name_twice_is_refused(self):
        with pytest.raises(PluginError, match=r"named twice"):
            Plugins([plugin(method()), plugin(method())])

    @pytest.mark.parametrize("hook", ["teacher_forward", "student_forward", "student_update"])
    def test_two_plugins_may_not_claim_one_first_result(self, hook):
        arguments = {"student_update": "loss"}.get(hook, "batch")
        names: dict = {}
        exec(f"def {hook}(self, {arguments}): return None", names)
        made = method(**{hook: hookimpl(names[hook])})
        with pytest.raises(PluginError, match=f"hook '{hook}' is claimed by plugin 'a' .* and plugin 'b'"):
            Plugins([plugin(made, "a"), plugin(made, "b")])

    def test_one_of_two_plugins_may_give_the_stages(self):
        def giving(answer):
            return method(stages=hookimpl(lambda self, run: answer))

        run, mine = RunContext({}), [Stage("mine")]
        assert Plugins([plugin(giving(None), "a"), plugin(giving(mine), "b")]).stages(run) == (
            tuple(mine),
            "b",
        )
        with pytest.raises(PluginError, match=r"hook 'stages' is claimed by plugin 'a' .* and plugin 'b'"):
            Plugins([plugin(giving(mine), "a"), plugin(giving(mine), "b")]).stages(run)

    def test_one_of_two_plugins_may_choose_the_rows(self):
        def giving(answer):
            return method(stage_rows=hookimpl(lambda self, run: answer))

        run, stage, split = RunContext({}), Stage("one"), TensorSplit(torch.zeros(4, 1))
        mine = torch.tensor([3, 1])
        left = Plugins([plugin(giving(None), "a"), plugin(giving(mine), "b")])
        assert left.stage_rows(run, stage, split) is mine
        assert Plugins([plugin(giving(None), "a")]).stage_rows(run, stage, split) is None
        with pytest.raises(PluginError, match=r"'stage_rows' is claimed by plugin 'a' .* and plugin 'b'"):
            Plugins([plugin(giving(mine), "a"), plugin(giving(mine), "b")]).stage_rows(run, stage, split)

    @pytest.mark.parametrize(
        "rows", [[0, 1], torch.tensor([[0]]), torch.tensor([0.0]), torch.tensor([4]), torch.tensor([], dtype=torch.long)], ids=str
    )  # fmt: skip
    def test_rows_that_are_none_of_the_splits_are_refused(self, rows):
        made = method(stage_rows=hookimpl(lambda self: rows))
        with pytest.raises(PluginError, match=r"'mine' .*: hook 'stage_rows' gave"):
            Plugins([plugin(made)]).stage_rows(RunContext({}), Stage("one"), TensorSplit(torch.zeros(4, 1)))


def transform(add: float, taken: list) -> type[Method]:
    @hookimpl
    def label_transform(self, targets):
        taken.append(add)
        return Targets(targets.labels * 2 + add)

    return method(label_transform=label_transform)


class TestOrder:
    @pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
    def test_transforms_fold_in_the_configs_order(self, order):
        taken: list = []
        plugins = Plugins([plugin(transform(add, taken), f"p{add}") for add in order])
        got = plugins.label_transform(
            Targets(torch.tensor([1.0])), Batch(torch.zeros(1, 1)), None, StepInfo()
        )
        expected = 1.0
        for add in order:
            expected = expected * 2 + add
        assert taken == list(order)
        assert got.labels.item() == expected

    def test_none_leaves_the_value_unchanged(self):
        @hookimpl
        def label_transform(self, targets):
            return None

        given = Targets(torch.tensor([1]))
        plugins = Plugins([plugin(method(label_transform=label_transform))])
        assert plugins.label_transform(given, Batch(torch.zeros(1, 1)), None, StepInfo()) is given

    def test_terms_of_all_plugins_carry_their_plugins_name(self):
        @hookimpl
        def loss_terms(self, student_out):
            return {"x": LossTerm(torch.tensor(1.0))}

        made = method(loss_terms=loss_terms)
        assert list(terms(Plugins([plugin(made, "b"), plugin(made, "a")]))) == ["b.x", "a.x"]


class TestWhatAHookGives:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (3, "a mapping from name to LossTerm"),
            ({"x": torch.tensor(1.0)}, "a LossTerm under 'x'"),
            ({"x": LossTerm(torch.zeros(2))}, "a scalar tensor as value of 'x'"),
            ({"x": LossTerm(1.0)}, "a scalar tensor as value of 'x'"),
        ],
    )
    def test_a_wrong_answer_is_refused_with_blame(self, given, expected):
        made = method(loss_terms=hookimpl(_returning(given)))
        with pytest.raises(PluginError) as caught:
            terms(Plugins([plugin(made)]))
        assert expected in str(caught.value)
        assert "'mine' (acme-distil 1.2): hook 'loss_terms'" in str(caught.value)

    def test_stages_must_be_stages(self):
        @hookimpl
        def stages(self, run):
            return ["distil"]

        with pytest.raises(PluginError, match=r"expected a list of Stage"):
            DistillStep(method(stages=stages)(), student=toys.net(), probe=toys.rows(2))

    def test_a_stage_on_an_unknown_model_is_refused_before_the_first_step(self):
        @hookimpl
        def stages(self, run):
            return [Stage("one", model="studnet")]

        with pytest.raises(ValueError, match=r"stage 'one' names 'studnet'; known models: student"):
            DistillStep(method(stages=stages)(), student=toys.net(), probe=toys.rows(2))

    def test_auxiliary_modules_must_be_modules(self):
        @hookimpl
        def auxiliary_modules(self, run):
            return {"head": 3}

        with pytest.raises(PluginError, match=r"an nn.Module or Auxiliary under 'head'"):
            DistillStep(method(auxiliary_modules=auxiliary_modules)(), student=toys.net(), probe=toys.rows(2))

    def test_auxiliary_modules_are_named_after_their_plugin(self):
        @hookimpl
        def auxiliary_modules(self, run):
            return {"a": nn.Linear(1, 1), "b": Auxiliary(nn.Linear(1, 1), {"lr": 0.5})}

        step = DistillStep(
            method(auxiliary_modules=auxiliary_modules)(), student=toys.net(), probe=toys.rows(2)
        )
        assert list(step.auxiliary) == ["mine.a", "mine.b"]
        student, a, b = step.parameter_groups()
        assert (a.keys(), b["lr"]) == ({"params"}, 0.5)
        assert [p.shape for p in student["params"]] == [p.shape for p in step.run.student.parameters()]


def _returning(given):
    def loss_terms(self, student_out):
        return given

    return loss_terms


def test_a_failing_hook_is_named_with_its_plugin_and_distribution():
    @hookimpl
    def loss_terms(self, student_out):
        raise KeyError("temperature")

    with pytest.raises(KeyError) as caught:
        terms(Plugins([plugin(method(loss_terms=loss_terms))]))
    assert caught.value.__notes__ == ["in hook 'loss_terms' of plugin 'mine' (acme-distil 1.2)"]


def test_no_loss_term_at_all_is_refused():
    step = DistillStep(method()(), student=toys.net(), probe=toys.rows(2))
    with pytest.raises(ValueError, match=r"no plugin gave a loss term"):
        step(step.run.student, toys.rows(2))
