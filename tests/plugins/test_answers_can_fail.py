"""Each known answer of IBMD and PDDM fails when the piece that it guards is broken.

Those of TCMD and HLDM stand beside their answers. A break is a monkeypatch, and the answer's own test has to see it.
"""

from __future__ import annotations

import dataclasses

import pytest
import test_ibmd as ibmd
import test_pddm as pddm
import test_pddm_pieces as pieces
import test_tcmd as tcmd
import torch

from stillhouse.api import hookimpl
from stillhouse_ibmd import IBMD, Encoder, Gaussian, GaussianDecoder
from stillhouse_ibmd import method as ibmd_method
from stillhouse_pddm import PDDM, PDNet
from stillhouse_pddm.pdnet import LayerMap, Mixing, Offset
from stillhouse_tcmd import TCMD


def with_stages(kind, change):
    """The method's hook ``stages``, each stage changed."""
    sound = kind.stages
    return hookimpl(lambda self, run: [change(stage) for stage in sound(self, run)])


def noisier(code: Gaussian) -> torch.Tensor:
    """A draw that takes the variance for the standard deviation."""
    return code.mean + code.log_variance.exp() * torch.randn_like(code.mean)


def unpaid(self, code, wanted):
    """A distortion in which a large variance costs nothing."""
    return 0.5 * ((wanted - self.mean(code)).square() / self.log_variance.exp()).sum(-1)


def own_rows_alone(self, value, shape, gains):
    """A map without its input side."""
    rows, columns, _ = (*shape, 1, 1, 1)[:3]
    mixed = self.outputs(value.flatten(1), rows).view(shape)
    return mixed + self.offset(rows, columns).view(shape)


SOUND = {"rate": ibmd.rate, "mixing": Mixing.forward, "pdnet": PDNet.forward}

IBMD_BREAKS = {
    "a rate without the log-variance": (
        (ibmd, "rate", lambda code: 0.5 * (code.mean.square() + code.log_variance.exp() - 1).sum(-1)),
        lambda: ibmd.test_the_rate_is_the_closed_form_to_the_standard_normal(),
    ),
    "a divergence the other way round": (
        (ibmd, "divergence", lambda p, q: torch.distributions.kl_divergence(ibmd.as_normal(q), ibmd.as_normal(p)).sum(-1)),
        lambda: ibmd.test_the_divergence_is_the_closed_form_between_two_gaussians(),
    ),
    "a draw with the variance for the deviation": (
        (Gaussian, "sample", noisier),
        lambda: ibmd.test_a_draw_has_the_mean_and_the_variance_of_its_code(),
    ),
    "a variance that costs nothing": (
        (GaussianDecoder, "distortion", unpaid),
        lambda: ibmd.test_the_gaussian_decoders_variance_ends_at_the_mean_squared_error(),
    ),
    "a rate in other units": (
        (ibmd, "rate", lambda code: SOUND["rate"](code) / torch.tensor(2.0).log()),
        lambda: ibmd.test_the_linear_gaussian_bottleneck_keeps_what_theory_says(0.3),
    ),
    "half the rate": (
        (ibmd, "rate", lambda code: 0.5 * SOUND["rate"](code)),
        lambda: ibmd.test_the_linear_gaussian_bottleneck_collapses_once_beta_exceeds_the_squared_correlation(),
    ),
    "a rate that is shown and not learned from": (
        (ibmd_method, "rate", lambda code: SOUND["rate"](code).detach()),
        lambda: ibmd.test_a_large_beta_drives_the_rates_to_zero(),
    ),
    "noise in a deterministic code": (
        (Encoder, "code", lambda self, given: given.mean + 0.1 * torch.randn_like(given.mean)),
        lambda: ibmd.test_without_noise_and_without_beta_it_is_feature_distillation(),
    ),
    "a stage target that trains the shared module": (
        (IBMD, "stages", with_stages(IBMD, lambda stage: dataclasses.replace(stage, train=None))),
        lambda: ibmd.test_each_stage_trains_what_it_says_and_leaves_the_rest_bit_for_bit(True),
    ),
}  # fmt: skip

PDDM_BREAKS = {
    "no offset: the fixed point": (
        (Offset, "forward", lambda self, rows, columns: torch.zeros(rows, columns, 1, dtype=torch.float64)),
        lambda: pieces.test_gradient_descent_on_least_squares_is_found_as_the_path_it_is(),
    ),
    "no input side": (
        (LayerMap, "forward", own_rows_alone),
        lambda: pieces.test_a_known_linear_map_is_recovered(),
    ),
    "units that do not mix": (
        (Mixing, "forward", lambda self, values, wanted: values + 0 * sum(p.sum() for p in self.parameters())),
        lambda: pieces.test_a_known_map_of_low_rank_is_recovered_by_factors(),
    ),
    "no identity to start from": (
        (Mixing, "forward", lambda self, values, wanted: SOUND["mixing"](self, values, wanted) - values[:wanted]),
        lambda: pieces.test_before_training_every_map_is_the_identity(),
    ),
    "a path that is not learned": (
        (pieces, "fit", lambda pdnet, path: None),
        lambda: pieces.test_on_a_constant_path_it_is_the_identity(),
    ),
    "a parameter left out": (
        (PDNet, "forward", lambda self, given, k: dict(list(SOUND["pdnet"](self, given, k).items())[1:])),
        lambda: pieces.test_generated_parameters_go_through_state_dict_and_give_the_same_outputs(),
    ),
    "a target that calls the teacher": (
        (PDDM, "stages", with_stages(PDDM, lambda stage: dataclasses.replace(stage, teacher="teacher"))),
        lambda: pddm.test_after_the_path_the_teacher_is_withdrawn(None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", [*IBMD_BREAKS, *PDDM_BREAKS])
def test_a_broken_piece_is_seen(what, monkeypatch):
    (where, name, broken), answer = (IBMD_BREAKS | PDDM_BREAKS)[what]
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(RuntimeError if what == "a parameter left out" else AssertionError):
        answer()


def test_a_combine_that_calls_the_teacher_is_seen(monkeypatch):
    asked = with_stages(TCMD, lambda stage: dataclasses.replace(stage, teacher="teacher"))
    monkeypatch.setattr(TCMD, "stages", asked)
    with pytest.raises(AssertionError):
        tcmd.test_with_task_ids_combine_learns_from_the_specialists_and_never_calls_the_teacher()
