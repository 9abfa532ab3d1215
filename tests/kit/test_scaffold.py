"""``stillhouse plugins new``: names, files, refusals; and the whole way to a run in a clean environment."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from stillhouse.errors import ConfigError
from stillhouse.scaffold import KINDS, Names, write
from stillhouse.testing import checks_for, outcomes, subject_of

RUN = {
    "method": ["method=first"],
    "task": ["task=first", "teacher=null", "student=null"],
    "observer": ["observers=[first]"],
}
SHORT = ["steps=20", "validate_every=10", "log_every=10", "name=first"]


@pytest.mark.parametrize(
    ("name", "distribution", "module", "title"),
    [
        ("tsallis", "stillhouse-tsallis", "stillhouse_tsallis", "Tsallis"),
        ("two_words", "stillhouse-two-words", "stillhouse_two_words", "TwoWords"),
        ("stillhouse-my-kd", "stillhouse-my-kd", "stillhouse_my_kd", "MyKd"),
        ("stillhouse_my_kd", "stillhouse-my-kd", "stillhouse_my_kd", "MyKd"),
        ("weight", "stillhouse-weight", "stillhouse_weight", "Weight"),
    ],
)
def test_distribution_module_and_class_follow_from_the_name(name, distribution, module, title):
    names = Names.of(name, "method")
    assert (names.distribution, names.module, names.title) == (distribution, module, title)


@pytest.mark.parametrize("name", ["", "1st", "Upper", "a b", "../up", "a--b", "x-", "stillhouse-"])
def test_a_name_that_no_package_can_have_is_refused(name):
    with pytest.raises(ConfigError, match="lower-case"):
        Names.of(name, "method")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("none", "method", "its class would be called None, which is taken .* as in 'my-none'"),
        ("loss-term", "method", "its class would be called LossTerm"),
        ("splits", "task", "its class would be called Splits"),
        ("mapping", "observer", "its class would be called Mapping"),
        ("on", "method", "a config would read it as True"),
        ("null", "observer", "a config would read it as None; .* as in 'my-null'"),
    ],
)
def test_a_name_that_would_not_work_is_refused(name, kind, message):
    with pytest.raises(ConfigError, match=message):
        Names.of(name, kind)


def test_a_name_whose_module_is_another_packages_is_refused(cli, tmp_path):
    said = cli("plugins", "new", "tasks")  # would be stillhouse_tasks, which Stillhouse brings
    assert said.code == 2
    assert said.err.startswith("error: the module stillhouse_tasks of plugin 'tasks' is installed already")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_is_four_files(cli, tmp_path, kind):
    said = cli("plugins", "new", "first", "--kind", kind, "--json")
    assert said.code == 0
    assert json.loads(said.out)["kind"] == kind
    assert sorted(path.name for path in (tmp_path / "stillhouse-first").iterdir()) == [
        "README.md",
        "pyproject.toml",
        "stillhouse_first.py",
        "test_stillhouse_first.py",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_no_placeholder_is_left(tmp_path, kind):
    for path in write(Names.of("first", kind), tmp_path / "made"):
        assert "$" not in path.read_text()
        assert "MODULE" not in path.name


def test_a_folder_that_holds_something_is_left_alone(cli, tmp_path):
    kept = tmp_path / "stillhouse-first" / "work.py"
    kept.parent.mkdir()
    kept.write_text("precious")
    said = cli("plugins", "new", "first")
    assert said.code == 2
    assert "not empty" in said.err
    assert [path.name for path in kept.parent.iterdir()] == ["work.py"]


def test_a_name_that_is_taken_is_refused(cli, tmp_path):
    said = cli("plugins", "new", "kd")
    assert said.code == 2
    assert "'kd' (stillhouse" in said.err
    assert not (tmp_path / "stillhouse-kd").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_passes_its_own_checks(tmp_path, monkeypatch, kind):
    write(Names.of(f"made-{kind}", kind), tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"stillhouse_made_{kind}"
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    checks = [
        check
        for check in checks_for(subject_of(getattr(module, f"Made{kind.capitalize()}")))
        if check.name != "import_does_no_work"  # a process of its own; the slow test has it
    ]
    assert len(checks) >= 4
    bad = [f"{outcome.check.name}: {outcome.message}" for outcome in outcomes(checks) if outcome.bad]
    assert not bad


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_from_new_to_a_run_and_a_passing_conformance_test(clean, kind, tmp_path, record_property):
    env = clean(f"scaffold-{kind}")
    started = time.perf_counter()
    env("stillhouse", "plugins", "new", "first", "--kind", kind)
    package: Path = env.work / "stillhouse-first"
    env.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "-e", str(package))
    assert "stillhouse-first 0.1.0" in env("stillhouse", "plugins")
    env("stillhouse", "plugins", "check", "first")
    seconds = time.perf_counter() - started
    record_property("seconds from new to checked", round(seconds, 1))
    print(f"{kind}: {seconds:.1f} s from 'plugins new' to a passing conformance run")
    shown = json.loads(env("stillhouse", "plugins", "show", "first", "--json"))
    assert (shown["distribution"], shown["version"], shown["api_version"]) == ("stillhouse-first", "0.1.0", 1)
    assert " passed" in env("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=package)
    train = "{steps: 50}"
    env(
        "stillhouse",
        "run",
        "mnist1d-kd",
        *RUN[kind],
        *SHORT,
        f"teacher={{name: {'wide' if kind == 'task' else 'cnn'}, train: {train}}}",
    )
    summary = json.loads((env.work / "runs" / "first-seed0" / "summary.json").read_text())
    assert summary["steps"] == 20
    if kind == "observer":
        assert "20," in (env.work / "runs" / "first-seed0" / "metrics.csv").read_text()
    assert summary["scores"]["test"]["accuracy"] > 0
    env.pip("uninstall", "-y", "stillhouse-first")
    assert "first" not in env("stillhouse", "plugins")
