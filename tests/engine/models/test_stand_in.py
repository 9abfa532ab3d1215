"""A copy that stands still: independent, alike, and refused where it is neither."""

from __future__ import annotations

import types

import pytest
import torch
import toys
from torch import nn

from stillhouse.api import KINDS
from stillhouse.errors import ConfigError
from stillhouse.models.stand_in import AdaptersOff, stand_in

X = toys.rows(4)[0]
KIND = KINDS["classification"]


def copied(model: nn.Module) -> nn.Module:
    return stand_in(model, X, KIND, "student")


def test_answers_as_the_original_did_while_that_trains_on():
    model = toys.net(dropout=0.5)
    before = model.eval()(X).detach()
    model.train()
    still = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(still(X), before)
    assert not torch.allclose(model.eval()(X), before)


def test_is_frozen_and_leaves_the_original_and_the_generators_as_they_are():
    model = toys.net(dropout=0.5).train()
    state = torch.get_rng_state()
    still = copied(model)
    assert not any(p.requires_grad for p in still.parameters())
    assert not any(module.training for module in still.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_a_forward_that_was_replaced_on_the_instance_is_the_classs_own_in_the_copy():
    """As mixed precision does it: the new function holds the original, which a copy would go on calling."""
    model, called = toys.net(), []
    inner = model.forward

    def patched(self, inputs):
        called.append(1)
        return inner(inputs)

    model.forward = types.MethodType(patched, model)
    still = copied(model)
    called.clear()
    still(X)
    assert not called
    assert "forward" in vars(model), "the original keeps it"


def test_one_that_computes_something_else_on_the_instance_is_refused():
    model = toys.net()
    inner = model.forward
    model.forward = lambda inputs: 2 * inner(inputs)
    with pytest.raises(ConfigError, match=r"copy of the student .* answers otherwise"):
        copied(model)


class Holds(nn.Module):
    """Calls, or shares the weights of, what a copy does not copy."""

    def __init__(self, what: str):
        super().__init__()
        self.net = toys.net()
        own, parameter = self.net, self.net[3].bias
        self.ask = (lambda x: own(x)) if what == "module" else (lambda x: self.net(x))
        if what == "parameter":
            self.__deepcopy__ = lambda memo: _sharing(parameter)

    def forward(self, inputs):
        return self.ask(inputs)


def _sharing(parameter: nn.Parameter) -> nn.Module:
    made = toys.net()
    made[3].bias = parameter
    return made


@pytest.mark.parametrize("what", ["module", "parameter"])
def test_a_copy_that_still_depends_on_the_original_is_refused(what):
    with pytest.raises(ConfigError, match=r"calling it calls the student itself .*which trains on"):
        copied(Holds(what))


class Adapted(nn.Module):
    """As PEFT has it: a base, an adapter, and a context in which the adapter is off."""

    def __init__(self):
        super().__init__()
        self.base, self.adapter, self.on = toys.net(), toys.net(seed=3), True
        self.drop = nn.Dropout(0.5)
        self.config = types.SimpleNamespace(use_cache=True)

    def disable_adapter(self):
        outer = self

        class Off:
            def __enter__(self):
                outer.on = False

            def __exit__(self, *given):
                outer.on = True

        return Off()

    def forward(self, inputs):
        return self.drop(self.base(inputs) + (self.adapter(inputs) if self.on else 0))


class TestAdaptersOff:
    def test_is_the_base_in_eval_mode_and_leaves_the_student_as_it_was(self):
        student = Adapted().train()
        student.adapter.eval()
        teacher = AdaptersOff(student)
        assert torch.equal(teacher(X), student.base(X))
        assert student.on
        assert (student.training, student.drop.training, student.adapter.training) == (True, True, False)

    def test_follows_the_base_and_owns_nothing(self):
        student = Adapted()
        teacher = AdaptersOff(student)
        assert list(teacher.parameters()) == []
        assert teacher.config is student.config
        teacher.requires_grad_(False)
        assert all(parameter.requires_grad for parameter in student.parameters())

    def test_a_student_without_adapters_is_refused(self):
        with pytest.raises(
            ConfigError, match=r"Sequential has no disable_adapter\(\); expected a model of PEFT"
        ):
            AdaptersOff(toys.net())
