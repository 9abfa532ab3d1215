"""Features of named modules: what is taken, when, and what a copy or a pickle of the model takes along."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from types import SimpleNamespace

import pytest
import torch
import toys
from torch import nn
from torch.utils.checkpoint import checkpoint

from stillhouse.errors import ConfigError
from stillhouse.models.calling import Output
from stillhouse.models.captures import Captures

X = toys.rows(4)[0]


def taken(captures: Captures, model: nn.Module, inputs: object = X, role: str = "student") -> dict:
    with captures.collecting(role):
        model(inputs)
    return captures.take(role)


def made(model: nn.Module, *names: str) -> Captures:
    captures = Captures({"student": model})
    for name in names:
        captures.add("student", name)
    return captures


class TestWhatIsTaken:
    def test_a_modules_output_and_what_it_reads(self):
        model = toys.net()
        found = taken(made(model, "1", "3:input", "0"), model)
        assert found.keys() == {"1", "3:input", "0"}
        assert torch.equal(found["1"], model[:2](X))
        assert torch.equal(found["3:input"], model[:3](X))
        assert found["0"].requires_grad

    @pytest.mark.parametrize(
        "wrapped", [lambda x: (x, "more"), lambda x: [x], lambda x: {"hidden": x}, lambda x: ((x, 1), 2)]
    )
    def test_the_first_tensor_of_what_a_module_gives(self, wrapped):
        class Gives(nn.Module):
            def forward(self, inputs):
                return wrapped(inputs)

        model = nn.Sequential(Gives())
        assert taken(made(model, "0"), model)["0"] is X

    def test_asking_twice_is_the_same_as_once(self):
        model = toys.net()
        made(model, "1", "1")
        assert len(model[1]._forward_hooks) == 1

    def test_the_module_inside_of_a_wrapper_is_found(self):
        class Compiled(nn.Module):
            def __init__(self, model):
                super().__init__()
                self._orig_mod = model

            def forward(self, inputs):
                return self._orig_mod(inputs)

        model = Compiled(toys.net())
        assert torch.equal(taken(made(model, "1"), model)["1"], model._orig_mod[:2](X))

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("33", r"student\.33: no such module in Sequential"),
            ("1:output", r"student\.1:output: no such module"),
            ("", r"student\.: no such module"),
        ],
    )
    def test_another_name_is_refused(self, name, said):
        with pytest.raises(ConfigError, match=said):
            made(toys.net(), name)

    def test_a_model_of_another_role_is_refused_until_it_is_offered(self):
        captures = made(toys.net())
        with pytest.raises(ConfigError, match=r"features of 'kd\.head': no such model"):
            captures.add("kd.head", "0")
        captures.offer("kd.head", toys.net())
        captures.add("kd.head", "0")
        assert (captures.asked("kd.head"), captures.asked("student")) == (True, False)


class TestOutputObjects:
    STATES = tuple(torch.full((1,), float(n)) for n in range(3))

    def test_are_read_by_number_from_either_end(self):
        captures = made(toys.net(), "hidden_states.1", "hidden_states.-1", "attentions.0", "1")
        assert captures.asks("student") == {"hidden_states", "attentions"}
        found = captures.take(
            "student", Output(X, {"hidden_states": self.STATES, "attentions": self.STATES[2:]})
        )
        assert {name: float(value) for name, value in found.items()} == {
            "hidden_states.1": 1.0,
            "hidden_states.-1": 2.0,
            "attentions.0": 2.0,
        }

    @pytest.mark.parametrize("number", [3, -4])
    def test_a_number_beyond_them_is_refused(self, number):
        captures = made(toys.net(), f"hidden_states.{number}")
        with pytest.raises(
            ConfigError, match=r"the model gave 3 hidden_states; expected a number below that"
        ):
            captures.take("student", Output(X, {"hidden_states": self.STATES}))

    def test_a_module_of_that_name_is_the_module(self):
        model = nn.Module()
        model.hidden_states = nn.ModuleList([nn.Identity()])
        model.forward = lambda inputs: model.hidden_states[0](inputs)
        captures = made(model, "hidden_states.0")
        assert captures.asks("student") == frozenset()
        assert taken(captures, model)["hidden_states.0"] is X


class TestWhen:
    def test_only_while_the_step_calls(self):
        model = toys.net()
        captures = made(model, "1")
        model(X)
        assert captures.take("student") == {}
        assert taken(captures, model, X)["1"].shape == (4, 8)
        model(X * 2)
        assert captures.take("student") == {}

    def test_only_of_the_model_that_is_called(self):
        student, teacher = toys.net(), toys.net(16)
        captures = Captures({"student": student, "teacher": teacher})
        captures.add("student", "1"), captures.add("teacher", "1")
        with captures.collecting("teacher"):
            student(X), teacher(X)
        assert captures.take("student") == {}
        assert captures.take("teacher")["1"].shape == (4, 16)

    def test_also_after_an_error_no_more(self):
        model = toys.net()
        captures = made(model, "0")
        with pytest.raises(RuntimeError), captures.collecting("student"):
            raise RuntimeError
        model(X)
        assert captures.take("student") == {}

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_a_layer_that_is_run_again_in_the_backward_pass_adds_nothing(self, reentrant):
        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.runs = nn.Linear(6, 6), 0

            def forward(self, inputs):
                return checkpoint(self._run, inputs, use_reentrant=reentrant)

            def _run(self, inputs):
                self.runs += 1
                return 2 * self.inner(inputs)

        model, inputs = Checkpointed(), X.clone().requires_grad_()
        captures = made(model, "inner")
        with captures.collecting("student"):
            out = model(inputs)
        found = captures.take("student")["inner"]
        assert found.requires_grad is not reentrant, "re-entrant checkpointing runs it without a graph"
        out.sum().backward()
        assert model.runs == 2
        assert captures.take("student") == {}

    def test_what_was_taken_is_not_held(self):
        model = toys.net()
        captures = made(model, "1")
        feature = weakref.ref(taken(captures, model)["1"])
        gc.collect()
        assert feature() is None

    def test_closed_it_leaves_nothing_behind(self):
        model = toys.net()
        captures = made(model, "1", "3:input")
        with captures.collecting("student"):
            model(X)
        captures.close()
        assert not any(module._forward_hooks for module in model.modules())
        assert captures.take("student") == {}
        assert not captures.asked("student")


class TestCopies:
    """A copy or a pickle of the student takes along hooks that do nothing."""

    @staticmethod
    def pickled(model: nn.Module) -> nn.Module:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    @pytest.mark.parametrize("way", ["pickled", "copied"])
    def test_keep_nothing(self, way):
        model, teacher = toys.net(), toys.net()
        teacher.answer = lambda: None  # it can't be pickled, and need not: the student alone is
        captures = Captures({"student": model, "teacher": teacher})
        captures.add("student", "1")
        with captures.collecting("student"):
            other = self.pickled(model) if way == "pickled" else copy.deepcopy(model)
            other(X)
            assert captures.take("student") == {}
            model(X)
        assert torch.equal(captures.take("student")["1"], other[:2](X))


def test_objects_of_other_models_are_not_looked_into():
    class Gives(nn.Module):
        def forward(self, inputs):
            return SimpleNamespace(inputs=inputs)

    model = nn.Sequential(Gives())
    assert taken(made(model, "0"), model)["0"].inputs is X


class TestCompiled:
    """torch.compile's code for a class of models holds no hook that came later."""

    def test_a_hook_on_a_model_whose_class_was_compiled_before_takes_its_feature(self):
        def net():
            return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

        torch.compile(net(), backend="eager")(torch.ones(1, 3))
        model = net()
        compiled = torch.compile(model, backend="eager")
        for given in (model, compiled):
            captures = Captures({"student": given})
            captures.add("student", "1")
            with captures.collecting("student"):
                compiled(torch.ones(1, 3))
            assert torch.equal(captures.take("student")["1"], model[:2](torch.ones(1, 3)))
            captures.close()
