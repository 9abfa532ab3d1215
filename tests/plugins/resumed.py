"""Stopped after any number of updates and taken up by a new loop: the same bits as an unbroken run."""

from __future__ import annotations

from collections.abc import Callable

from resuming import taken_up
from toys import same_bits

from stillhouse.training.loop import Loop


def models(loop: Loop) -> dict:
    """Every tensor of every model, by name."""
    return {
        f"{name}.{key}": tensor.clone()
        for name, model in loop.step.run.models.items()
        for key, tensor in model.state_dict().items()
    }


def assert_resumes(make: Callable[[], Loop], stops: range) -> None:
    """Equal bits for each stop."""
    whole = make()
    assert whole.run()
    for stop in stops:
        again = taken_up(make, stop)
        assert same_bits(models(again), models(whole)), f"stopped after {stop}"
        assert again.step.plugins.state_dict() == whole.step.plugins.state_dict(), f"stopped after {stop}"
