"""Models: digests, modes, randomness, arguments."""

from __future__ import annotations

import pytest
import torch
import toys
from torch import nn

from stillhouse.errors import ConfigError
from stillhouse.models.calling import evaluating, forward
from stillhouse.models.integrity import digest, freeze, stochastic_module, versions
from stillhouse.plugin.builders import arguments


def test_a_digest_changes_with_a_single_bit():
    net = toys.net()
    before = digest(net)
    assert before == digest(toys.net())
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nextafter(net[0].weight[0, 0], torch.tensor(9.0))
    assert digest(net) != before


def test_versions_grow_with_every_write():
    net = nn.BatchNorm1d(3)
    before = versions(net)
    net(torch.randn(4, 3))
    assert versions(net) > before, "running statistics are buffers"


def test_evaluating_puts_every_modules_own_mode_back_also_after_an_error():
    net = toys.net(dropout=0.5)
    net[2].eval()

    def fails():
        with evaluating(net):
            assert not net.training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert (net.training, net[0].training, net[2].training) == (True, True, False)


def test_freezing():
    net = freeze(toys.net(dropout=0.5))
    assert not net[2].training
    assert not any(parameter.requires_grad for parameter in net.parameters())


class TestRandomness:
    def test_a_deterministic_model_has_no_culprit_and_the_generators_stay(self):
        state = torch.get_rng_state()
        assert stochastic_module(toys.net(dropout=0.5).train(), toys.rows(4)[0]) is None
        assert torch.equal(state, torch.get_rng_state())

    def test_a_model_that_is_itself_random_is_named(self):
        class Random(nn.Module):
            def forward(self, x):
                return x + torch.rand_like(x)

        assert stochastic_module(Random(), toys.rows(4)[0]) == "Random itself"

    def test_a_model_that_counts_its_calls_is_found(self):
        class Counts(nn.Module):
            calls = 0

            def forward(self, x):
                self.calls += 1
                return x + self.calls

        assert stochastic_module(nn.Sequential(nn.Linear(6, 4), Counts()), toys.rows(4)[0]) == "1 (Counts)"


class TestForward:
    def test_takes_tensors_objects_with_logits_and_tuples(self):
        logits = torch.zeros(2, 3)
        for out in (logits, type("Out", (), {"logits": logits})(), (logits, "more")):
            assert forward(lambda inputs, out=out: out, None) is logits

    def test_passes_a_mapping_as_keyword_arguments(self):
        assert torch.equal(
            forward(lambda a, b: a + b, {"a": torch.ones(1), "b": torch.ones(1)}), torch.full((1,), 2.0)
        )


class TestArguments:
    @staticmethod
    def build(hidden: int = 8, scale: float = 1.0) -> nn.Module:
        return nn.Linear(hidden, hidden)

    def test_are_filled_in(self):
        assert arguments(self.build, {"hidden": 3}, "student") == {"hidden": 3, "scale": 1.0}

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"hiden": 3}, "student.hiden: unknown; did you mean 'hidden'?"),
            ({"hidden": "wide"}, "student.hidden: "),
            ({"scale": [1]}, "student.scale: "),
        ],
    )
    def test_that_a_builder_does_not_take_are_refused(self, given, said):
        with pytest.raises(ConfigError) as caught:
            arguments(self.build, given, "student")
        assert said in str(caught.value)
