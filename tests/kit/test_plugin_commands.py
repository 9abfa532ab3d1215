"""``stillhouse plugins`` and ``plugins show``: what they print, what they import, whom they refuse."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from stillhouse.plugin import catalog
from stillhouse.plugin.describe import describe

OWN = [entry for entry in catalog.entries() if entry.distribution == "stillhouse"]


@pytest.mark.parametrize(
    "words", [["plugins"], ["plugins", "--json"], ["plugins", "new", "mine"], ["--help"]]
)
def test_listing_and_new_import_neither_torch_nor_pydantic_nor_any_plugin(words, tmp_path):
    program = (
        "import sys\nfrom stillhouse.cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "print('IMPORTED', [name for name in sys.modules if name in ('torch', 'pydantic', 'numpy') "
        "or (name.startswith('stillhouse_'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines()[-1] == "IMPORTED []"


@pytest.mark.parametrize("entry", OWN, ids=lambda entry: f"{entry.kind}-{entry.name}")
def test_every_plugin_of_ours_is_described_in_full(entry):
    facts = json.loads(json.dumps(describe(entry)))
    assert facts["summary"]
    assert (facts["distribution"], facts.get("api_version", 1)) == ("stillhouse", 1)
    assert set(facts["schema"]["properties"] if facts["config"] else {}) == {
        f["name"] for f in facts["config"]
    }
    if entry.kind != "model":
        assert facts["hooks"]


def test_show_gives_hooks_order_settings_and_origin(cli):
    facts = json.loads(cli("plugins", "show", "sld", "--json").out)
    assert [hook["name"] for hook in facts["hooks"]] == ["loss_terms", "on_run_start", "stages", "stage_rows"]
    assert facts["hooks"][0]["arguments"] == ["student_out", "targets", "batch", "info"]
    assert facts["hooks"][0]["order"] == "config order"
    assert facts["hooks"][2]["order"].startswith("first result")
    (labels,) = [field for field in facts["config"] if field["name"] == "labels"]
    assert labels["default"] == "soft"
    assert labels["description"].startswith("Stage 3")
    assert "deterministic_teacher" in facts["requires"]
    text = cli("plugins", "show", "sld").out
    for part in (
        "stages(run): first result",
        "labels: Literal['soft', 'hard', 'actual'], default 'soft'",
        "api version   1",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        (
            "tensorboard",
            ["on_run_start(record)", "on_metrics(row)", "on_run_end(summary)", "on_run_failed(error)"],
        ),
        ("digits", ["splits()"]),
    ],
)
def test_show_gives_what_an_observer_or_a_task_implements(cli, name, calls):
    facts = json.loads(cli("plugins", "show", name, "--json").out)
    assert [f"{hook['name']}({', '.join(hook['arguments'])})" for hook in facts["hooks"]] == calls
    text = cli("plugins", "show", name).out
    assert all(f"{call}: {facts['hooks'][0]['order']}" in text for call in calls)


def test_a_name_of_nobody_is_refused_with_the_nearest(cli):
    said = cli("plugins", "show", "slt")
    assert said.code == 2
    assert said.err == "error: no plugin is called 'slt'; did you mean 'sld'?\n"


def test_a_name_of_two_kinds_asks_which(cli, install):
    source = """
        from stillhouse.api import Observer
        class Mine(Observer):
            '''Watches.'''
            api_version = 1
        """
    install("acme", "[stillhouse.observers]\nkd = kinds_mine:Mine\n", kinds_mine=source)
    assert (
        "several plugins are called 'kd': method and observer; say which with --kind"
        in cli("plugins", "show", "kd").err
    )
    assert (
        json.loads(cli("plugins", "show", "kd", "--kind", "observer", "--json").out)["distribution"] == "acme"
    )


def test_check_as_json_says_what_each_check_asks(cli, monkeypatch):
    from stillhouse.testing import import_checks, number_checks

    monkeypatch.setattr(import_checks, "CHECKS", import_checks.CHECKS[:1])
    said = cli("plugins", "check", "kd", "--json")
    report = json.loads(said.out)
    assert (said.code, report["passed"], report["name"]) == (0, True, "kd")
    names = [row["check"] for row in report["checks"]]
    assert set(names) >= {function.__name__ for function in number_checks.CHECKS}
    assert all(row["about"].endswith(".") for row in report["checks"])
