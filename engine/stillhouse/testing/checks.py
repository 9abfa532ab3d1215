"""A check, its outcome, and the list of them for each kind of plugin."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillhouse.api import ConfigError, Method, Observer, PluginError, Task
from stillhouse.errors import nearest
from stillhouse.plugin.validate import check as check_hooks
from stillhouse.testing.rig import Subject

CheckFunction = Callable[[Subject, Path], None]
Status = Literal["passed", "failed", "expected", "unexpected", "skipped"]


class CheckFailure(AssertionError):
    """The plugin does not do what the check asks for."""


class NotApplicable(Exception):
    """The check has no meaning for this plugin; the message says why."""


@dataclass(frozen=True)
class Check:
    """One check of one plugin. Call it: CheckFailure, NotApplicable, or nothing."""

    name: str
    subject: Subject
    function: CheckFunction

    def __call__(self) -> None:
        with tempfile.TemporaryDirectory(prefix="stillhouse-check-") as folder:
            try:
                self.function(self.subject, Path(folder))
            except (CheckFailure, NotApplicable):
                raise
            except Exception as error:
                raise CheckFailure(f"{self.subject}: {type(error).__name__}: {error}") from error

    @property
    def about(self) -> str:
        """What it asks for, in a line."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    @property
    def reason(self) -> str | None:
        """Why the plugin is expected to fail, if it says so."""
        return self.subject.conformance.expected_failures.get(self.name)


@dataclass(frozen=True)
class Outcome:
    """What came of a check. ``expected``: failed as declared; ``unexpected``: declared to fail, and passed."""

    check: Check
    status: Status
    message: str = ""

    @property
    def bad(self) -> bool:
        """Whether the plugin has to be mended."""
        return self.status in ("failed", "unexpected")


def checks_for(subject: Subject) -> list[Check]:
    """Every check for the subject's kind.

    Raises PluginError where it is no plugin or one that the engine refuses to load, ConfigError where it expects a
    check to fail that does not exist.
    """
    found = [Check(function.__name__, subject, function) for function in _functions(subject)]
    names = [check.name for check in found]
    for name in subject.conformance.expected_failures:
        if name not in names:
            raise ConfigError(f"{subject}: expected_failures: no check '{name}'{nearest(name, names)}")
    return found


def _functions(subject: Subject) -> Sequence[CheckFunction]:
    from stillhouse.testing import (
        capability_checks,
        embedding_checks,
        import_checks,
        number_checks,
        observer_checks,
        state_checks,
        task_checks,
        token_checks,
    )

    kind = subject.kind
    if isinstance(kind, type) and issubclass(kind, Method):
        check_hooks(subject, kind)
        own: Sequence[CheckFunction] = (
            *number_checks.CHECKS,
            *token_checks.CHECKS,
            *embedding_checks.CHECKS,
            *capability_checks.CHECKS,
            *state_checks.CHECKS,
        )
    elif isinstance(kind, type) and issubclass(kind, Task):
        own = task_checks.CHECKS
    elif isinstance(kind, type) and issubclass(kind, Observer):
        own = observer_checks.CHECKS
    else:
        raise PluginError(f"{subject}: got {kind!r}; expected a subclass of Method, Task or Observer")
    return (*import_checks.CHECKS, *own)


def outcomes(checks: Iterable[Check]) -> Iterator[Outcome]:
    """Run the checks one after the other."""
    for check in checks:
        try:
            check()
        except NotApplicable as reason:
            yield Outcome(check, "skipped", str(reason))
        except CheckFailure as failure:
            if check.reason is None:
                yield Outcome(check, "failed", str(failure))
            else:
                yield Outcome(check, "expected", check.reason)
        else:
            if check.reason is None:
                yield Outcome(check, "passed")
            else:
                yield Outcome(check, "unexpected", f"passes, though expected_failures says: {check.reason}")


def expect(holds: bool, subject: Subject, message: str) -> None:
    """Raise CheckFailure, naming the plugin, unless ``holds``."""
    if not holds:
        raise CheckFailure(f"{subject}: {message}")
