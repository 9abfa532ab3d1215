"""``parametrize_with_checks``: the conformance checks as tests of pytest."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from typing import Any

from stillhouse.api import Conformance
from stillhouse.plugin import catalog
from stillhouse.testing.checks import Check, NotApplicable, checks_for
from stillhouse.testing.rig import Subject


def parametrize_with_checks(kind: type[Any], conformance: Conformance | None = None) -> Any:
    """A pytest decorator that hands every check of ``kind`` to the test, as its argument ``check``.

    kind
        A subclass of Method, Task or Observer.
    conformance
        In place of the class's own.

    A failure that ``conformance.expected_failures`` names is a strict xfail with its reason. A check that has no
    meaning for the plugin is skipped. Raises PluginError or ConfigError while tests are collected where ``kind``
    is no plugin, or names a check that does not exist.
    """
    import pytest

    parameters = []
    for check in checks_for(subject_of(kind, conformance)):
        strict = [] if check.reason is None else [pytest.mark.xfail(strict=True, reason=check.reason)]
        parameters.append(pytest.param(_skipping(check), id=check.name, marks=strict))
    return pytest.mark.parametrize("check", parameters)


def _skipping(check: Check) -> Callable[[], None]:
    def run() -> None:
        import pytest

        try:
            check()
        except NotApplicable as reason:
            pytest.skip(str(reason))

    return run


def subject_of(
    kind: type[Any], conformance: Conformance | None = None, entry: catalog.Entry | None = None
) -> Subject:
    """The class with the name and distribution of its entry point, which is looked up where it is not given."""
    declared = conformance or (kind.conformance if hasattr(kind, "conformance") else Conformance())
    module, name = getattr(kind, "__module__", ""), getattr(kind, "__qualname__", repr(kind))
    package = module.partition(".")[0]
    for known in catalog.entries() if entry is None else [entry]:
        path, _, attribute = known.value.partition(":")
        if known is entry or (attribute == name and path.partition(".")[0] == package):
            return Subject(kind, known.name, f"{known.distribution} {known.version}", declared, known)
    owners = packages_distributions().get(package)
    where = f"{owners[0]} {version(owners[0])}" if owners else f"module {module}"
    return Subject(kind, name.lower(), where, declared)
