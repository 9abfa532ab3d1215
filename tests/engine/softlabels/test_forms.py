"""What each form keeps, and what comes back."""

from __future__ import annotations

import math

import pytest
import torch

from stillhouse.errors import ConfigError, DataError
from stillhouse.kernels import Sampled, TopK, softmax_kl
from stillhouse.softlabels import Form
from stillhouse.softlabels.fidelity import divergences
from stillhouse.softlabels.forms import decode, encode, spread
from stillhouse.softlabels.label import uniform

ROWS, V = 50, 200


def logits(rows: int = ROWS, *, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(0)) * scale


def kept(form: Form, given: torch.Tensor, seed: int = 0):
    draws = uniform(torch.arange(len(given)), torch.ones(len(given), dtype=torch.long), form.k or 1, seed)
    return decode(form, encode(form, given, draws))


@pytest.mark.parametrize(
    ("outputs", "kind"), [(10, "dense"), (1024, "dense"), (1025, "topk"), (128_256, "topk")]
)
def test_the_form_follows_the_number_of_outputs(outputs, kind):
    assert Form.choose(outputs).kind == kind


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "topk", "k": 201}, "k = 201; expected 1 to 200"),
        ({"kind": "topk", "k": 0}, "k = 0; expected 1 to 200"),
        ({"kind": "sampled", "k": 0}, "k = 0 draws"),
        ({"kind": "dense", "k": 3}, "k is for topk and sampled"),
        ({"kind": "dense", "dtype": "uint8"}, "expected one of float16, float32"),
        ({"kind": "sampled", "k": 300, "dtype": "uint8"}, "wide enough"),
        ({"kind": "dense", "packed": True}, "gains nothing"),
        ({"kind": "best"}, "expected one of dense, topk, sampled, hidden"),
    ],
)
def test_settings_without_a_meaning_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        Form.choose(V, **given)


def test_dense_in_float32_is_exact():
    assert torch.equal(kept(Form.choose(V, "dense", "float32"), logits()), logits())


def test_dense_in_float16_keeps_the_level_and_the_divergence():
    given = logits() + 1000.0  # half precision alone is off by 0.25 there
    found = kept(Form.choose(V, "dense", "float16"), given)
    torch.testing.assert_close(found, given, rtol=0, atol=0.02)
    assert float(divergences(given, found)["kl"].max()) < 1e-6


def test_dense_in_float16_keeps_minus_infinity_and_finite_ones_finite():
    given = logits()
    given[:, 3], given[:, 4] = float("-inf"), -1e6
    found = kept(Form.choose(V, "dense", "float16"), given)
    assert (found[:, 3] == float("-inf")).all()
    assert found[:, 4].isfinite().all()


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-9), ("float16", 1e-5), ("uint8", 5e-4)])
def test_a_top_k_keeps_the_entries_and_the_rest(dtype, most):
    given = logits()
    found = kept(Form.choose(V, "topk", dtype, 20), given)
    exact = TopK.from_logits(given, 20)
    assert torch.equal(found.indices, exact.indices)
    assert float(divergences(given, found)["kept_kl"].mean()) < most
    total = torch.cat([found.log_probs, found.log_rest[:, None]], -1).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(ROWS), rtol=0, atol=1e-5)


def test_a_rest_of_a_millionth_is_kept():
    given = logits()
    given[:, 0] += 40
    found = kept(Form.choose(V, "topk", "uint8", 2), given)
    exact = TopK.from_logits(given, 2).log_rest
    assert (exact < math.log(1e-6)).any()
    assert (found.log_rest - exact).abs().where(exact > -20, 0.0).max() < 0.15


def test_a_top_k_of_all_classes_is_the_dense_distribution():
    found = kept(Form.choose(V, "topk", "float32", V), logits())
    assert (found.log_rest == float("-inf")).all()
    student = torch.randn(ROWS, V)
    torch.testing.assert_close(
        softmax_kl(student, found), softmax_kl(student, logits()), rtol=1e-5, atol=1e-6
    )


def test_draws_depend_on_seed_and_sample_alone():
    counts = torch.tensor([2, 3])
    both = uniform(torch.tensor([7, 9]), counts, 5, 1)
    assert torch.equal(both[2:], uniform(torch.tensor([9]), counts[1:], 5, 1))
    assert not torch.equal(both, uniform(torch.tensor([7, 9]), counts, 5, 2))


def test_weights_of_draws_sum_to_one_and_places_beyond_a_row_weigh_nothing():
    found = kept(Form.choose(V, "sampled", None, 30), logits(scale=6.0))
    assert isinstance(found, Sampled)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(ROWS))
    assert (found.weights == 0).any()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["dense", "topk", "sampled"])
def test_what_is_not_finite_is_refused_naming_the_row(kind, wrong):
    given = logits()
    given[7, 3] = wrong
    with pytest.raises(DataError, match="first in row 7"):
        kept(Form.choose(V, kind), given)


def test_a_teacher_that_gives_fewer_than_k_is_refused():
    with pytest.raises(ConfigError, match="gives the top 5, and the top 6"):
        encode(Form.choose(V, "topk", None, 6), TopK.from_logits(logits(), 5))


class TestUnbiased:
    """Mean gradient over many draws against the dense one, in its standard errors."""

    DRAWS = 400

    def gradient(self, target) -> torch.Tensor:
        student = torch.linspace(-1, 1, V).repeat(1, 1).requires_grad_()
        softmax_kl(student, target).backward()
        return student.grad[0].double()

    def z_scores(self, gradients: list[torch.Tensor], exact: torch.Tensor) -> torch.Tensor:
        stacked = torch.stack(gradients)
        error = stacked.std(0) / math.sqrt(len(stacked))
        return (stacked.mean(0) - exact) / error.clamp(min=1e-6)

    def test_draws_are(self):
        given, form = logits(1), Form.choose(V, "sampled", None, 50)
        found = [self.gradient(kept(form, given, seed)) for seed in range(self.DRAWS)]
        z = self.z_scores(found, self.gradient(given))
        frequent = given.softmax(-1)[0] * 50 * self.DRAWS > 20  # where the normal law holds
        assert float(z[frequent].abs().max()) < 4.5
        assert 0.6 < float(z[frequent].square().mean()) < 1.6

    def test_a_top_k_without_the_rest_is_not(self):
        given = logits(1)
        top = TopK.from_logits(given, 8)
        form = Form.choose(V, "sampled", None, 50)
        noise = [self.gradient(kept(form, given, seed)) for seed in range(self.DRAWS)]
        error = torch.stack(noise).std(0) / math.sqrt(self.DRAWS)
        biased = self.gradient(TopK(top.indices, top.log_probs, rest="renormalise"))
        z = (biased - self.gradient(given)) / error.clamp(min=1e-6)
        assert float(z[top.indices[0, 0]].abs()) > 4.5  # what the draws stay below


def test_rows_go_where_the_mask_is_true_and_the_rest_is_harmless():
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, False]])
    for form in (Form.choose(V, "dense"), Form.choose(V, "topk"), Form.choose(V, "sampled")):
        rows = kept(form, logits(3))
        found = spread(rows, mask)
        student = torch.randn(3, 3, V)
        loss = softmax_kl(student, found, mask=mask, reduction="sum")
        torch.testing.assert_close(
            loss, softmax_kl(student[mask], rows, reduction="sum"), rtol=1e-5, atol=1e-6
        )
        assert softmax_kl(student, found).isfinite()
