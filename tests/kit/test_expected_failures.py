"""Expected failures: declared with a reason, strict, under pytest and on the command line."""

from __future__ import annotations

import pytest
from breaking import Broken, MeansOverTheMicroBatch, outcome

from stillhouse.api import Conformance, hookimpl
from stillhouse.errors import ConfigError, PluginError
from stillhouse.testing import checks_for, subject_of

pytest_plugins = ["pytester"]


def declared(kind: type, **failures: str) -> type:
    return type(kind.__name__, (kind,), {"conformance": Conformance(expected_failures=failures)})


def test_an_expected_failure_is_no_failure_and_gives_its_reason():
    kind = declared(MeansOverTheMicroBatch, micro_batches_do_not_matter="relates the rows of a batch")
    found = outcome(kind, "micro_batches_do_not_matter")
    assert (found.status, found.message, found.bad) == ("expected", "relates the rows of a batch", False)


def test_an_expected_failure_that_passes_is_one():
    found = outcome(declared(Broken, batch_is_untouched="not yet"), "batch_is_untouched")
    assert (found.status, found.bad) == ("unexpected", True)
    assert "not yet" in found.message


def test_an_expected_failure_of_no_check_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="no check 'batch_untouched'; did you mean 'batch_is_untouched'"):
        checks_for(subject_of(declared(Broken, batch_untouched="typo")))


def test_what_is_no_plugin_is_refused():
    with pytest.raises(PluginError, match="expected a subclass of Method, Task or Observer"):
        checks_for(subject_of(dict))


def test_a_method_that_the_engine_would_refuse_is_refused_at_once():
    with pytest.raises(PluginError, match="'loss_term' is no hook; did you mean 'loss_terms'"):
        checks_for(subject_of(type("Mine", (Broken,), {"loss_term": hookimpl(lambda self: None)})))


TESTS = """
from stillhouse.api import Conformance, LossTerm, Method, hookimpl
from stillhouse.testing import parametrize_with_checks

class Mine(Method):
    api_version = 1
    requires = frozenset()
    conformance = Conformance(expected_failures={failures})

    @hookimpl
    def loss_terms(self, student_out, batch, info):
        return {{"mine": LossTerm(student_out.logits.square().mean())}}

@parametrize_with_checks(Mine)
def test_conformance(check):
    check()
"""


@pytest.mark.parametrize(
    ("failures", "counts"),
    [
        ({}, {"failed": 2}),
        ({"masked_rows_are_ignored": "a", "micro_batches_do_not_matter": "b"}, {"xfailed": 2}),
        (
            {"masked_rows_are_ignored": "a", "micro_batches_do_not_matter": "b", "same_seed_same_bits": "c"},
            {"xfailed": 2, "failed": 1},
        ),
    ],
)
def test_under_pytest_expected_failures_are_strict_xfails(pytester, failures, counts):
    pytester.makepyfile(TESTS.format(failures=repr(failures)))
    result = pytester.runpytest_inprocess(
        "-p",
        "no:cacheprovider",
        "--deselect",
        "none",
        "-k",
        "masked or (micro and not ragged) or same_seed or batch_is",
    )
    found = result.parseoutcomes()
    assert {name: found.get(name, 0) for name in ("failed", "xfailed")} == {
        "failed": 0,
        "xfailed": 0,
        **counts,
    }
    assert found["passed"] == 4 - sum(counts.values())


@pytest.mark.slow
def test_the_command_ends_with_1_where_a_plugin_has_to_be_mended(install, cli):
    source = TESTS.format(failures="{}").split("@parametrize")[0]
    install("acme", "[stillhouse.methods]\nmine = checked_mine:Mine\n", checked_mine=source)
    said = cli("plugins", "check", "mine")
    assert said.code == 1
    assert "failed     masked_rows_are_ignored: plugin 'mine' (acme 1.2)" in said.out
    assert said.out.splitlines()[-1].startswith("method plugin 'mine' (acme 1.2): ")
