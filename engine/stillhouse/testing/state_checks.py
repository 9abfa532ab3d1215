"""Checks of what a method keeps: settings, auxiliary modules, and its state over a resume."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.config import dump, parse, to_yaml
from stillhouse.errors import ConfigError
from stillhouse.plugin.load import settings_of
from stillhouse.testing.checks import CheckFailure, CheckFunction, NotApplicable, expect
from stillhouse.testing.rig import Rig, Subject, everything

STEPS = 8


def config_round_trips(subject: Subject, folder: Path) -> None:
    """Settings survive the way into a run directory and back; an unknown one is refused."""
    kind = subject.kind.Config
    if not subject.conformance.settings:
        try:
            kind()
        except ValueError as error:
            raise CheckFailure(
                f"{subject}: the defaults make no valid config ({error}); expected a default for every field, or "
                "conformance = Conformance(settings=...)"
            ) from None
    made = subject.settings()
    try:
        again = settings_of(kind, parse(to_yaml(dump(made)), "settings"), "")
    except (ConfigError, ValueError, TypeError) as error:
        raise CheckFailure(
            f"{subject}: its settings can't be written as YAML and read back: {error}"
        ) from None
    expect(again == made, subject, f"settings written as YAML came back as {again!r}; expected {made!r}")
    try:
        settings_of(kind, {**dump(made), "no_such_setting": 1}, "")
    except ConfigError:
        return
    raise CheckFailure(f"{subject}: took the unknown setting 'no_such_setting'; expected extra='forbid'")


def resumes_bit_exact(subject: Subject, folder: Path) -> None:
    """A run that is stopped, saved and taken up again ends with the weights of an unbroken one."""
    whole = Rig(subject, everything(subject, folder=folder / "whole", steps=STEPS))
    whole.loop.run()
    expected, made = whole.weights(), whole.loop.at.step
    for stop in sorted({1, made // 2, made - 1} - {0}):
        conditions = everything(subject, folder=folder / f"stop-{stop}", steps=STEPS)
        first = Rig(subject, conditions)
        first.loop.run(stop)
        second = Rig(subject, conditions)
        second.loop.load_state_dict(saved(subject, first.loop.state_dict()))
        second.loop.run()
        for name, tensor in second.weights().items():
            expect(
                torch.equal(tensor, expected[name]),
                subject,
                f"stopped after update {stop} and resumed, the run ends with other weights in {name}; expected the "
                "same bits: give what lasts from one update to the next in state_dict and take it in load_state_dict",
            )


def saved(subject: Subject, state: Mapping[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    buffer.seek(0)
    try:
        content: dict[str, Any] = torch.load(buffer, weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever torch raises for a foreign object
        raise CheckFailure(
            f"{subject}: its state can't be read from a checkpoint ({str(error).splitlines()[0]}); expected tensors, "
            "numbers, strings, lists and dicts from state_dict"
        ) from None
    return content


def auxiliary_modules_are_found_trained_and_saved(subject: Subject, folder: Path) -> None:
    """Modules with weights of their own are given in auxiliary_modules, trained, and travel in checkpoints."""
    rig = Rig(subject, everything(subject, folder=folder))
    _none_hidden(rig)
    trainable = [name for name in rig.step.auxiliary if rig.step.modules.parameters(name)]
    if not rig.step.auxiliary:
        raise NotApplicable("has no auxiliary modules")
    before = rig.weights()
    rig.loop.run()
    after = rig.weights()
    _none_hidden(rig)
    for name in trainable:
        own = [entry for entry in before if entry.startswith(f"{name}.")]
        expect(
            any(not torch.equal(before[entry], after[entry]) for entry in own),
            subject,
            f"the auxiliary module '{name}' did not change in a run; expected a stage to train it",
        )
    fresh = Rig(subject, everything(subject, folder=folder))
    fresh.loop.load_state_dict(saved(subject, rig.loop.state_dict()))
    for name, tensor in fresh.weights().items():
        expect(torch.equal(tensor, after[name]), subject, f"{name} did not come back from a checkpoint")


def _none_hidden(rig: Rig) -> None:
    known = {id(module) for model in rig.step.run.models.values() for module in model.modules()}
    known |= set() if rig.teacher is None else {id(module) for module in rig.teacher.modules()}
    for name, module in _modules(vars(rig.method), "self"):
        hidden = id(module) not in known and any(p.requires_grad for p in module.parameters())
        expect(
            not hidden,
            rig.subject,
            f"{name} is a {type(module).__name__} with weights that nobody trains or saves; expected it among "
            "auxiliary_modules, or without gradient",
        )


def _modules(value: Any, where: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield where, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _modules(item, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _modules(item, f"{where}[{number}]")


CHECKS: tuple[CheckFunction, ...] = (
    config_round_trips,
    resumes_bit_exact,
    auxiliary_modules_are_found_trained_and_saved,
)
