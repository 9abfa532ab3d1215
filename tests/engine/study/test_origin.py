"""What a cell is made from: an edit of what makes figures makes it anew, an edit of what shows them does not."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_study import untuned

import stillhouse
from stillhouse.study import origin
from stillhouse.study.origin import Sources, differences
from stillhouse.study.plan import cells, of_study
from stillhouse.study.schema import validate

METHOD = """
    import sklearn.datasets
    from stillhouse.api import Method, hookimpl, LossTerm

    class Mine(Method):
        api_version = 1

        @hookimpl
        def loss_terms(self, student_out, targets, batch, info):
            return {"own": LossTerm(student_out.logits.square().sum() / info.rows)}
"""


def using(methods: list[dict]) -> dict:
    """As much of a resolved config as names plugins."""
    return {"methods": methods, "task": {"name": "digits"}, "device": "cpu", "threads": 1}


def digests(content: dict) -> dict[str, str]:
    return {one.method: one.digest for one in cells(of_study(validate(content)), {})}


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """Stillhouse's sources where a test may edit them."""
    source = Path(stillhouse.__file__).parent
    shutil.copytree(source, tmp_path / "stillhouse", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(stillhouse, "__file__", str(tmp_path / "stillhouse" / "__init__.py"))
    return tmp_path / "stillhouse"


@pytest.mark.parametrize(
    ("path", "anew"),
    [
        ("training/loop.py", True),
        ("contract/metrics.py", True),
        ("runs/evaluate.py", True),
        ("study/work.py", True),
        ("study/report/text.py", False),
        ("study/analysis.py", False),
        ("study/plan.py", False),
        ("cli/main.py", False),
        ("testing/checks.py", False),
    ],
)
def test_an_edit_of_stillhouse_makes_cells_anew_where_it_makes_figures(copied, path, anew):
    content = untuned(seeds={"fresh": [0]})
    before = digests(content)
    edited = copied / path
    edited.write_text(edited.read_text() + "\n# another line\n")
    assert (digests(content) != before) == anew


def test_an_edit_of_a_plugin_makes_its_own_cells_anew(install):
    site = install("mine", "[stillhouse.methods]\nmine = mine_method:Mine\n", mine_method=METHOD)
    content = untuned(seeds={"fresh": [0]})
    content["methods"]["mine"] = {"config": {"method": "mine"}}
    before = digests(content)
    path = site / "mine_method.py"
    path.write_text(path.read_text().replace("square()", "abs()"))
    after = digests(content)
    assert {name for name in after if after[name] != before[name]} == {"mine"}


def test_versions_are_of_the_libraries_that_the_plugins_import(install):
    install("mine", "[stillhouse.methods]\nmine = mine_method:Mine\n", mine_method=METHOD)
    content = untuned()
    content["methods"]["mine"] = {"config": {"method": "mine"}}
    found = of_study(validate(content)).entry("mine", "digits").origin
    assert set(found.code) == {"stillhouse", "stillhouse_tasks", "mine_method"}
    assert found.versions["scikit-learn"] == version("scikit-learn")
    assert (found.versions["mine"], found.versions["torch"]) == ("1.2", version("torch"))
    assert platform.python_version().startswith(f"{found.versions['python']}.")
    assert not {"json", "typing", "sklearn"} & set(found.versions)


def test_the_threads_in_force_are_part_of_it():
    config = of_study(validate(untuned())).entry("kd", "digits").trials[0].config
    sources, before = Sources(), torch.get_num_threads()
    assert sources.of(config).machine == {"device": "cpu", "threads": 1}
    try:
        torch.set_num_threads(before + 1)
        del config["threads"]
        assert sources.of(config).machine["threads"] == before + 1
    finally:
        torch.set_num_threads(before)


def test_differences_are_told_part_by_part():
    ours = {
        "versions": {"torch": "2"},
        "code": {"a": "1"},
        "machine": {"device": "cpu"},
        "data": {"train": "x"},
        "teacher": None,
    }
    theirs = {
        "versions": {},
        "code": {"a": "2"},
        "machine": {"device": "H200"},
        "data": {"train": "y"},
        "teacher": "t",
    }
    assert differences(ours, theirs) == [
        "torch is None there, 2 here",
        "the code of a is 2 there, 1 here",
        "the machine's device is H200 there, cpu here",
        "train is y there, x here",
        "the teacher is t there, None here",
    ]
    assert differences(ours, ours) == []


def test_a_module_beside_a_plugin_and_a_table_in_its_package_are_its_sources(tmp_path, monkeypatch):
    package = tmp_path / "withtable"
    package.mkdir()
    (package / "__init__.py").write_text("import loosehelp\n")
    (package / "table.json").write_text("1")
    (tmp_path / "loosehelp.py").write_text("SCALE = 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = SimpleNamespace(kind="method", name="tabled", value="withtable:M", distribution="stillhouse")
    monkeypatch.setattr(origin, "entries", lambda: [entry])

    def code():
        return origin.Sources().of(using([{"name": "tabled"}])).code

    before = code()
    assert {"withtable", "loosehelp"} <= set(before)
    (tmp_path / "loosehelp.py").write_text("SCALE = -1.0\n")
    edited = code()
    assert edited["loosehelp"] != before["loosehelp"]
    (package / "table.json").write_text("2")
    assert code()["withtable"] != edited["withtable"]


def test_a_model_that_a_methods_settings_name_is_among_the_sources(tmp_path, monkeypatch):
    (tmp_path / "ownnet.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    entry = SimpleNamespace(kind="model", name="net", value="ownnet:net", distribution="stillhouse")
    monkeypatch.setattr(origin, "entries", lambda: [entry])
    takd = {"name": "takd", "assistants": [{"name": "net"}]}
    assert "ownnet" in origin.Sources().of(using([takd])).code
