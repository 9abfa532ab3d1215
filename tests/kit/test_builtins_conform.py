"""Every method, task and observer that Stillhouse brings passes the checks that it hands to others."""

from __future__ import annotations

import pytest

from stillhouse.plugin import catalog
from stillhouse.plugin.load import loaded
from stillhouse.testing import checks_for, outcomes, subject_of

OWN = [entry for entry in catalog.entries() if entry.distribution == catalog.OWN and entry.kind != "model"]
QUICK = ("kd", "sld", "label_smoothing", "mixup")


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(e, marks=[] if e.name in QUICK else [pytest.mark.slow], id=f"{e.kind}-{e.name}")
        for e in OWN
    ],
)
def test_it_passes(entry):
    checks = checks_for(subject_of(loaded(entry), entry=entry))
    bad = [
        f"{one.check.name}: {one.message}"
        for one in outcomes(check for check in checks if check.name != "import_does_no_work")
        if one.bad
    ]
    assert not bad
