"""A comparison: the smallest study. Configs as they are, one pair, no tuning."""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.config import RunConfig, dump
from stillhouse.errors import ConfigError
from stillhouse.runs.directory import differences
from stillhouse.runs.resolve import resolve
from stillhouse.study.origin import Sources
from stillhouse.study.plan import Plan, Trial, check_metric, entry_of
from stillhouse.study.schema import BUDGET_KEYS, OWN_KEYS

OWN = ("method", "methods", "teacher", "teachers", "soft_labels", "observers", *OWN_KEYS)
"""What compared runs may differ in."""


def of_configs(configs: Sequence[RunConfig], seeds: Sequence[int]) -> Plan:
    """The plan of every config with every seed; the first is the baseline.

    Raises ConfigError for two configs of one name, seeds that stand twice, or budgets that differ.
    """
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise ConfigError("two configs have the same name; give each its own 'name'")
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ConfigError(f"seeds {list(seeds)}: expected one or more, each once")
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise ConfigError(f"seeds {list(seeds)}: expected numbers from 0 to {2**32 - 1}")
    parts = [resolve(config) for config in configs]
    for one in parts:
        check_metric(None, one.task)
    resolved = [one.config for one in parts]
    first, pair = resolved[0], resolved[0].task.name
    _check_budgets(resolved)
    entries, sources = [], Sources()
    for config, full in zip(configs, resolved, strict=True):
        given = config.model_dump(mode="json", exclude_unset=True, exclude=set(OWN_KEYS))
        entries.append(entry_of(config.name, pair, given, [Trial(settings={}, config=dump(full))], sources))
    others = f" compare with {names[0]}" if len(names) > 1 else " score"
    return Plan(
        name="compare",
        question=f"How do{'' if len(names) > 1 else 'es'} {_listed(names[1:] or names)}{others}?",
        baseline=names[0],
        metric=None,
        updates=first.steps,
        tuned=False,
        defaults=False,
        tuning_seeds=[],
        fresh_seeds=list(seeds),
        titles={name: name for name in names},
        spaces={name: {} for name in names},
        pairs=[pair],
        entries=entries,
        remarks=[f"not the same for every row: {line}" for line in unfair(resolved)],
    )


def _check_budgets(resolved: Sequence[RunConfig]) -> None:
    for key in BUDGET_KEYS:
        values = {config.name: getattr(config, key) for config in resolved}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{value} in {name}" for name, value in values.items())
            raise ConfigError(
                f"the budgets differ: {key} is {told}; expected the same for all: a word such as {key}={max(values.values())} "
                "behind the configs sets it for every one"
            )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def unfair(resolved: Sequence[RunConfig]) -> list[str]:
    """What the configs differ in besides the method: each line a reason to doubt the comparison."""
    first = resolved[0]
    found = []
    for other in resolved[1:]:
        for path, mine, its in differences(dump(first), dump(other)):
            if path.partition(".")[0] not in OWN:
                found.append(f"{path} is {mine!r} in {first.name}, {its!r} in {other.name}")
    return found
