"""What a step holds beside the student: taken for a checkpoint, and given back to go on from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stillhouse.contract.context import STUDENT
from stillhouse.errors import CheckpointError

if TYPE_CHECKING:
    from stillhouse.training.step import DistillStep


def state_of(step: DistillStep) -> dict[str, Any]:
    """See DistillStep.state_dict."""
    stand = step.answers.stand_in
    return {
        "made_for": _made_for(step),
        "started": step.progress.started,
        "position": step.schedule.state_dict(),
        "models": {name: model.state_dict() for name, model in step.run.models.items() if name != STUDENT},
        "plugins": step.plugins.state_dict(),
        "teacher_calls": step.teacher_calls,
        # A model that was copied when the stage began: it can't be made again from the model trained since.
        "stand_in": None if stand is None else stand.state_dict(),
    }


def restore(step: DistillStep, state: Mapping[str, Any]) -> None:
    """See DistillStep.load_state_dict."""
    made_for, own = state["made_for"], _made_for(step)
    for what, value in own.items():
        if made_for.get(what) != value:
            raise CheckpointError(
                f"the state was made with {what} {made_for.get(what)}, this step has {value}; expected the same: attach "
                "with the methods and steps of the run that goes on"
            )
    step.update.abandon()
    for name, content in state["models"].items():
        step.run.models[name].load_state_dict(content)
    step.plugins.load_state_dict(state["plugins"])
    step.schedule.load_state_dict(state["position"])
    step.teacher_calls = state["teacher_calls"]
    if not state["started"]:  # the first update begins the stage, and tells the plugins
        step.progress.hold(step.schedule.stage)
        return
    step.progress.set_up(step.schedule.stage)
    if state["stand_in"] is not None and step.answers.stand_in is not None:
        step.answers.stand_in.load_state_dict(state["stand_in"])


def _made_for(step: DistillStep) -> dict[str, Any]:
    return {"methods": list(step.run.method_names), "stages": list(step.schedule.lengths)}
