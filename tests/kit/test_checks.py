"""Each check of a method catches one that breaks what it asks for, and passes one that does not."""

from __future__ import annotations

import re

import pytest
from breaking import BREAKS, DrawsNoise, Good, in_process, outcome

from stillhouse.testing import checks_for, outcomes, subject_of


def test_every_check_has_a_plugin_that_breaks_it():
    of_their_own = {"listing_imports_nothing", "import_does_no_work"}  # see test_import_checks.py
    assert {check.name for check in checks_for(subject_of(Good))} == {c for _, c, _ in BREAKS} | of_their_own


@pytest.mark.parametrize(
    ("kind", "check", "message"), BREAKS, ids=[f"{k.__name__}-{c}" for k, c, _ in BREAKS]
)
def test_the_check_catches_a_plugin_that_breaks_it(kind, check, message):
    found = outcome(kind, check)
    assert found.status == "failed"
    assert found.message.startswith("plugin 'broken' (acme 1.2): ")
    assert re.search(message, found.message), found.message


def test_a_good_plugin_passes_them_all():
    found = list(outcomes(in_process(Good)))
    assert [(one.check.name, one.message) for one in found if one.status != "passed"] == [
        ("listing_imports_nothing", "no installed entry point names it")
    ]


def test_a_plugin_that_draws_for_each_row_passes_them_too():
    assert [(one.check.name, one.message) for one in outcomes(in_process(DrawsNoise)) if one.bad] == []
