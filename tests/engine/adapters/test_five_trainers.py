"""One distillation object in five trainers gives the same losses and the same weights."""

from __future__ import annotations

import five
import pytest
import torch

METHODS = {
    "kd": {"name": "kd", "temperature": 2.0},
    "sld": "sld",
    "fitnets": [
        "kd",
        {"name": "fitnets", "teacher_layer": "transformer.h.1.mlp", "student_layer": "transformer.h.0.mlp"},
    ],
    "ibmd": {
        "name": "ibmd",
        "deterministic": True,
        "dim": 8,
    },  # its noise would depend on the micro-batches' shape
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Losses and weights of a method in a trainer, trained once."""
    found = {}

    def run(trainer: str, method: str, accumulate: int, steps: int):
        key = (trainer, method, accumulate, steps)
        if key not in found:
            case = five.Case(METHODS[method], steps, accumulate, tmp_path_factory.mktemp("run"))
            five.TRAINERS[trainer](case)
            weights = torch.cat([p.detach().flatten() for p in case.student.parameters()])
            found[key] = torch.tensor(case.losses.found, dtype=torch.float64), weights
        return found[key]

    return run


def same(trained, trainer, method, accumulate, steps):
    losses, weights = trained("plain", method, 1, steps)
    own_losses, own_weights = trained(trainer, method, accumulate, steps)
    start = torch.cat([p.detach().flatten() for p in five.gpt2(1).parameters()])
    assert (weights - start).abs().max() > 0.01, "it was trained"
    assert len(own_losses) == steps
    assert (own_losses - losses).abs().max() <= 1e-6 * losses.abs().max().clamp(min=1)
    assert (own_weights - weights).abs().max() <= 1e-5


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("trainer", five.TRAINERS)
@pytest.mark.parametrize("method", ["kd", "fitnets"])
def test_ten_updates(trained, trainer, method, accumulate):
    same(trained, trainer, method, accumulate, 10)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("trainer", five.TRAINERS)
@pytest.mark.parametrize("method", METHODS)
def test_fifty_updates(trained, trainer, method, accumulate):
    same(trained, trainer, method, accumulate, 50)
