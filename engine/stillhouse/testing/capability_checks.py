"""Checks that what a method says it requires is enough for it, and needed by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from torch import nn

from stillhouse.api import Method
from stillhouse.testing.checks import CheckFailure, CheckFunction, NotApplicable, expect
from stillhouse.testing.rig import Conditions, Rig, Subject, conditions_for, everything

UNTESTABLE = frozenset({"deterministic_teacher", "generate"})
"""What a run does without as well as with, and a result does not show."""


def declared_capabilities_suffice(subject: Subject, folder: Path) -> None:
    """The method runs where nothing is offered but what it requires."""
    needs = subject.kind.requires
    expect(
        "student_update" in needs or not hasattr(subject.kind, "student_update"),
        subject,
        "implements the hook student_update and does not require 'student_update'; add it to requires",
    )
    try:
        rig = Rig(subject, conditions_for(subject, needs, folder=folder))
        asked = [role for role in ("teacher", *rig.step.run.models) if rig.step.captures.asked(role)]
        rig.loop.run()
    except Exception as error:
        missing = ", ".join(sorted({"labels", "unlabelled", "logits", "deterministic_teacher"} - needs))
        raise CheckFailure(
            f"{subject}: requires {_listed(needs)}, and without {missing} it fails with {type(error).__name__}: "
            f"{error}; expected it to run: require what it needs"
        ) from error
    expect(
        not asked or "hidden_states" in needs,
        subject,
        f"asks for features of {', '.join(asked)} and does not require 'hidden_states'; add it to requires",
    )
    expect(not rig.unfinished(), subject, f"with only {_listed(needs)}: {rig.unfinished()}")


def declared_capabilities_are_needed(subject: Subject, folder: Path) -> None:
    """The method fails where one of the things that it requires is missing."""
    needs = subject.kind.requires
    if not needs - UNTESTABLE:
        raise NotApplicable("requires nothing that can be withheld")
    for capability in sorted(needs - UNTESTABLE):
        expect(
            not _runs_without(subject, capability, folder / capability),
            subject,
            f"requires '{capability}' and runs the same without; take it out of requires, so that more tasks and "
            "trainers can use the method",
        )


def _runs_without(subject: Subject, capability: str, folder: Path) -> bool:
    if capability == "student_update":
        return not hasattr(subject.kind, "student_update")
    rest = subject.kind.requires - {capability}
    if capability == "hidden_states":
        return not _asks_for_features(subject, folder)
    conditions = conditions_for(subject, rest, folder=folder)
    if capability == "logits" and "hidden_states" in rest:
        conditions = conditions_for(subject, rest, folder=folder, teacher=_mute(subject))
    return _runs(subject, conditions, rest)


def _asks_for_features(subject: Subject, folder: Path) -> bool:
    captures = Rig(subject, everything(subject, folder=folder)).step.captures
    return captures.asked("teacher") or captures.asked("student")


def _mute(subject: Subject) -> nn.Module:
    """A teacher with features whose logits say nothing."""
    teacher = subject.toys.teacher()
    teacher.register_forward_hook(lambda module, given, output: output * math.nan)
    return teacher


def _runs(subject: Subject, conditions: Conditions, requires: frozenset[str]) -> bool:
    """Whether the method, relieved of a requirement, runs and stays finite."""
    relieved: type[Method] = type(subject.kind.__name__, (subject.kind,), {"requires": requires})
    try:
        rig = Rig(subject, conditions, relieved)
        rig.loop.run()
    except Exception:  # noqa: BLE001 - whatever a plugin raises for want of something
        return False
    return not rig.unfinished()


def works_without_labels(subject: Subject, folder: Path) -> None:
    """Where no labels are required, rows without one are as good as others."""
    if "labels" in subject.kind.requires:
        raise NotApplicable("requires labels")
    cases: dict[str, Callable[[], Conditions]] = {
        "no row": lambda: everything(subject, data=subject.toys.splits(labels=False), folder=folder / "none"),
        "half of the rows": lambda: everything(
            subject, data=subject.toys.splits(known=0.5), folder=folder / "half"
        ),
    }
    for what, conditions in cases.items():
        try:
            rig = Rig(subject, conditions())
            rig.loop.run()
        except Exception as error:
            raise CheckFailure(
                f"{subject}: does not require labels, and where {what} has one it fails with "
                f"{type(error).__name__}: {error}; look at targets.labels, or require 'labels'"
            ) from error
        expect(not rig.unfinished(), subject, f"where {what} has a label: {rig.unfinished()}")


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


CHECKS: tuple[CheckFunction, ...] = (
    declared_capabilities_suffice,
    declared_capabilities_are_needed,
    works_without_labels,
)
