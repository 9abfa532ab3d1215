"""HLDM's weightings: optima known beforehand, each with the break that its test sees, and the traps."""

from __future__ import annotations

import math

import pytest
import torch
from toys import loop

from stillhouse.api import ConfigError
from stillhouse_hldm import HLDM, HLDMConfig, weighting


def whole(slots, losses, norms=None):
    """An update in one micro-batch whose terms have gradients of these norms."""
    return weighting.Part(slots, losses, 1.0, True, lambda: [[norm] for norm in norms])


def learned(weigh, constants, *, steps=2000, lr=0.05):
    """Train a weighting on constant losses; its slots' weights, by term."""
    names = [f"t{number}" for number in range(len(constants))]
    slots, losses = weigh.slots(names), torch.tensor(constants)
    optimizer = torch.optim.Adam(weigh.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        weigh.prepare()
        loss, _ = weigh.objective(whole(slots, losses, losses))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weigh.prepare()
    return weigh.weights(slots)


# Known answers.


def test_for_constant_losses_the_optimum_is_the_logarithm():
    weigh = weighting.Uncertainty(5.0, {})
    learned(weigh, [0.05, 1.0, 30.0])
    assert weigh.s[:3].tolist() == pytest.approx([math.log(0.05), 0.0, math.log(30.0)], abs=1e-3)


def test_a_missing_regulariser_is_seen(monkeypatch):
    sound = weighting.Uncertainty.objective
    monkeypatch.setattr(
        weighting.Uncertainty,
        "objective",
        lambda self, *given: (sound(self, *given)[0] + self.s[:3].sum(), torch.zeros(())),
    )
    with pytest.raises(AssertionError):
        test_for_constant_losses_the_optimum_is_the_logarithm()


def test_a_term_scaled_by_100_ends_with_the_same_contribution():
    losses = torch.tensor([0.3, 0.9])
    plain = learned(weighting.Uncertainty(6.0, {}), losses.tolist()) * losses
    scaled = losses * torch.tensor([100.0, 1.0])
    made = learned(weighting.Uncertainty(6.0, {}), scaled.tolist()) * scaled
    assert made.tolist() == pytest.approx(plain.tolist(), rel=1e-2)


def test_a_bound_that_is_too_tight_is_seen(monkeypatch):
    monkeypatch.setattr(weighting.Uncertainty, "prepare", lambda self: self.s.data.clamp_(-1, 1))
    with pytest.raises(AssertionError):
        test_a_term_scaled_by_100_ends_with_the_same_contribution()


def test_under_gradnorm_with_alpha_0_the_weighted_gradient_norms_become_equal():
    weigh = weighting.GradNorm(0.0)
    made = learned(weigh, [0.2, 1.0, 5.0])
    norms = made * torch.tensor([0.2, 1.0, 5.0])
    assert norms.tolist() == pytest.approx([float(norms.mean())] * 3, rel=0.02)
    assert float(made.sum()) == pytest.approx(3)


def test_unweighted_norms_under_gradnorm_are_seen(monkeypatch):
    def blind(self, part):
        theta = self.theta[part.slots]
        own = ((theta - theta.detach()).exp() * part.losses - part.losses.mean()).abs().sum()
        return own, own.detach() * 0

    monkeypatch.setattr(weighting.GradNorm, "objective", blind)
    with pytest.raises(AssertionError):
        test_under_gradnorm_with_alpha_0_the_weighted_gradient_norms_become_equal()


def test_with_alpha_1_a_gradnorm_follows_rates():
    weigh = weighting.GradNorm(1.0)
    slots = weigh.slots(["t0", "t1", "t2"])
    weigh.initial[slots] = torch.tensor([1.0, 1.0, 1.0])
    norms = learned(weigh, [0.2, 1.0, 5.0]) * torch.tensor([0.2, 1.0, 5.0])
    assert norms[0] < norms[1] < norms[2], "the slower a term falls, the greater its part"


def test_equal_ratios_give_dwa_weights_of_1():
    weigh = weighting.DWA(2, 2.0)
    slots = weigh.slots(["a", "b"])
    for value in (8.0, 8.0, 4.0, 4.0):
        weigh.observe({"a": torch.tensor(value), "b": torch.tensor(10 * value)})
    assert weigh.ratio[:2].tolist() == [0.5, 0.5]
    assert weigh.weights(slots).tolist() == pytest.approx([1.0, 1.0])


def test_dwa_favours_the_term_that_falls_slower_by_the_papers_softmax():
    weigh = weighting.DWA(1, 2.0)
    slots = weigh.slots(["a", "b"])
    for a, b in ((1.0, 1.0), (0.5, 1.0)):
        weigh.observe({"a": torch.tensor(a), "b": torch.tensor(b)})
    expected = 2 * torch.softmax(torch.tensor([0.25, 0.5]), 0)
    assert torch.allclose(weigh.weights(slots), expected)


def test_a_dwa_of_values_in_place_of_ratios_is_seen(monkeypatch):
    monkeypatch.setattr(
        weighting.DWA, "weights", lambda self, slots: len(slots) * self.means[slots].softmax(0)
    )
    with pytest.raises(AssertionError):
        test_equal_ratios_give_dwa_weights_of_1()


@pytest.mark.parametrize("entropy", [0.3, 2.0])
def test_the_optimum_on_the_simplex_with_entropy_is_a_softmax(entropy):
    losses = torch.tensor([0.4, 0.9, 1.5])
    made = learned(weighting.Simplex(entropy), losses.tolist())
    assert torch.allclose(made, (-losses / entropy).softmax(0), atol=2e-3)


@pytest.mark.parametrize("factor", [0.5, -1.0], ids=["half the entropy", "its sign"])
def test_another_entropy_on_the_simplex_is_seen(factor, monkeypatch):
    sound = weighting.Simplex.objective

    def broken(self, *given):
        whole, own = sound(self, *given)
        terms = whole - own
        logs = self.theta[given[0].slots].log_softmax(0)
        return terms + factor * self.entropy * (logs.exp() * logs).sum(), own

    monkeypatch.setattr(weighting.Simplex, "objective", broken)
    with pytest.raises(AssertionError):
        test_the_optimum_on_the_simplex_with_entropy_is_a_softmax(0.3)


def test_a_plain_simplex_collapses_and_is_refused(monkeypatch):
    assert float(learned(weighting.Simplex(1e-6), [0.4, 0.9, 1.5]).max()) > 0.99
    with pytest.raises(ValueError, match=r"puts all weight on the smallest loss.*expected entropy above 0"):
        HLDMConfig(weighting="simplex")
    with pytest.raises(ConfigError, match=r"method: .*simplex without entropy"):
        loop({"name": "hldm", "weighting": "simplex"})


# Traps.


def test_t_squared_does_not_turn_the_distillation_term_down():
    """kd is balanced un-scaled: T^2 moves its loss and not its s, so its contribution keeps the factor T^2."""
    kd, temperature = 0.08, 4.0
    name = "hldm.kd"
    weigh = weighting.Uncertainty(6.0, {name: temperature**2})
    slots = weigh.slots([name])
    optimizer = torch.optim.Adam(weigh.parameters(), lr=0.02)
    for _ in range(1500):
        loss, _ = weigh.objective(whole(slots, torch.tensor([kd * temperature**2])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert weigh.s[0].item() == pytest.approx(math.log(kd), abs=0.02)
    for settings, scale in (({}, 9.0), ({"scales": {"hldm.kd": 1.0}}, 1.0)):
        made = HLDM(HLDMConfig(temperature=3.0, **settings))
        loop(made)
        assert made.weighting.scales == {"hldm.kd": scale}
        assert made.config.scales == settings.get("scales", {}), "what was set stays as it was set"


def test_a_loss_that_goes_to_0_stops_at_the_bound_and_can_come_back():
    weigh = weighting.Uncertainty(3.0, {})
    assert float(learned(weigh, [0.0])) == pytest.approx(math.exp(3.0))
    assert float(learned(weigh, [2.0])) == pytest.approx(0.5, rel=1e-2)
