"""The policy of docs/plugins/policy.md: versions, additions, deprecations, removals, allow-list, processes."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pluggy
import pytest

from stillhouse.api import LossTerm, Method, Observer, Task, hookimpl
from stillhouse.contract import hooks
from stillhouse.errors import PluginError
from stillhouse.plugin import dispatch, validate
from stillhouse.plugin.dispatch import Plugin, Plugins

SOURCE = """
from stillhouse.api import {base}


class Mine({base}):
    api_version = {version}
"""
POINT = "[stillhouse.{kind}s]\nmine = policy_mine:Mine\n"


class Old(Method):
    api_version = 1
    requires = frozenset()

    @hookimpl
    def loss_terms(self, student_out, targets, batch):
        return {"mine": LossTerm(student_out.logits.sum())}


def plugins(kind: type[Method]) -> Plugins:
    return Plugins([Plugin("old", "acme 1.2", kind())])


@pytest.fixture
def specify(monkeypatch):
    """Put another specification in the place of the step's hooks."""

    def do(specs: type) -> None:
        for module in (dispatch, validate):
            monkeypatch.setattr(module, "StepHooks", specs)
        validate.hook_arguments.cache_clear()

    yield do
    monkeypatch.undo()
    validate.hook_arguments.cache_clear()


@pytest.mark.parametrize(
    ("version", "runs"), [(1, False), (2, True), (3, True), (4, False), ("3", False), (None, False)]
)
def test_the_engine_runs_n_and_n_minus_1(monkeypatch, version, runs):
    monkeypatch.setattr(validate, "API_VERSION", 3)
    kind = type("Mine", (Old,), {"api_version": version})
    if runs:
        plugins(kind)
        return
    with pytest.raises(
        PluginError, match=rf"plugin 'old' \(acme 1\.2\): api_version is {version}, expected 2 or 3"
    ):
        plugins(kind)


@pytest.mark.parametrize(("base", "kind"), [(Method, "method"), (Task, "task"), (Observer, "observer")])
def test_every_kind_of_plugin_is_held_to_its_version(install, cli, base, kind):
    install("acme", POINT.format(kind=kind), policy_mine=SOURCE.format(base=base.__name__, version=7))
    said = cli("plugins", "show", "mine")
    assert said.code == 2
    assert f"{kind} plugin 'mine' (acme 1.2): api_version is 7, expected 1; upgrade stillhouse" in said.err


def test_a_new_argument_leaves_old_plugins_as_they_are(specify):
    class Wider(hooks.StepHooks):
        @hooks.hookspec
        def loss_terms(self, student_out, teacher_out, targets, batch, info, weather):
            """One more argument."""

    specify(Wider)
    assert plugins(Old).implements("loss_terms")


def test_a_new_hook_leaves_an_older_plugins_own_method_of_that_name_alone(specify, monkeypatch):
    class More(hooks.StepHooks):
        @hooks.hookspec
        def on_weather(self, info):
            """A hook of version 2."""

    specify(More)
    monkeypatch.setattr(validate, "API_VERSION", 2)
    monkeypatch.setitem(hooks.SINCE, "on_weather", 2)
    helper = {"on_weather": lambda self: "rain"}
    plugins(type("Mine", (Old,), helper))
    with pytest.raises(PluginError, match="'on_weather' is a hook's name without its mark"):
        plugins(type("Mine", (Old,), {**helper, "api_version": 2}))


def warned(kind: type[Method]) -> warnings.WarningMessage:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugins(kind)
    (only,) = caught
    return only


def line_of(text: str) -> int:
    """The line of this file that holds ``text``."""
    with open(__file__) as file:
        return next(number for number, line in enumerate(file, 1) if line.strip() == text)


def test_a_deprecated_argument_warns_at_the_authors_own_file_and_line(specify):
    class Deprecating(hooks.StepHooks):
        @hooks.hookspec(warn_on_impl_args={"targets": DeprecationWarning("targets: removed in 4; use goal")})
        def loss_terms(self, student_out, teacher_out, targets, goal, batch, info):
            """``targets`` goes."""

    specify(Deprecating)
    told = warned(Old)
    assert told.category is DeprecationWarning
    assert "targets: removed in 4; use goal" in str(told.message)
    assert told.filename == __file__
    # The hook begins with its decorator.
    assert told.lineno == line_of("def loss_terms(self, student_out, targets, batch):") - 1


def test_a_plugin_that_does_not_take_the_deprecated_argument_is_left_in_peace(specify):
    class Deprecating(hooks.StepHooks):
        @hooks.hookspec(warn_on_impl_args={"teacher_out": DeprecationWarning("gone")})
        def loss_terms(self, student_out, teacher_out, targets, batch, info):
            """``teacher_out`` goes."""

    specify(Deprecating)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugins(Old)


def test_a_deprecated_hook_warns_at_the_authors_own_file_and_line(specify):
    class Deprecating(hooks.StepHooks):
        @hooks.hookspec(warn_on_impl=DeprecationWarning("loss_terms: removed in 4"))
        def loss_terms(self, student_out, teacher_out, targets, batch, info):
            """All of it goes."""

    specify(Deprecating)
    told = warned(Old)
    assert (told.category, told.filename) == (DeprecationWarning, __file__)
    assert told.lineno == line_of("def loss_terms(self, student_out, targets, batch):") - 1


def test_a_removed_argument_is_refused_with_those_that_there_are(specify):
    class Narrower(hooks.StepHooks):
        @hooks.hookspec
        def loss_terms(self, student_out, goal, batch, info):
            """``targets`` is gone."""

    specify(Narrower)
    with pytest.raises(
        PluginError, match=r"no argument 'targets'.*it takes a subset of: student_out, goal, batch, info"
    ):
        plugins(Old)


def test_pluggy_is_new_enough_to_warn_for_one_argument():
    assert tuple(map(int, pluggy.__version__.split(".")[:2])) >= (1, 7)


@pytest.mark.parametrize(
    ("allowed", "there"),
    [(None, True), ("", False), ("mine", True), ("ACME", True), ("other", False), ("x, mine", True)],
)
def test_the_allow_list_names_plugins_or_distributions(install, cli, monkeypatch, allowed, there):
    install("acme", POINT.format(kind="method"), policy_mine=SOURCE.format(base="Method", version=1))
    if allowed is not None:
        monkeypatch.setenv("STILLHOUSE_PLUGINS", allowed)
    listed = cli("plugins").out
    assert ("mine" in listed) == there
    assert " kd " in listed
    if not there:
        assert f"STILLHOUSE_PLUGINS={allowed!r} may hide it" in cli("plugins", "show", "mine").err


WORKER = """
import multiprocessing, sys
def work(names):
    from stillhouse.plugin.load import as_plugins
    from stillhouse.errors import PluginError
    try:
        return [plugin.distribution for plugin in as_plugins(names)]
    except PluginError as error:
        return str(error)
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(work, (["kd", "mine"],)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [None, ""])
def test_a_worker_process_finds_plugins_by_name_under_the_inherited_allow_list(install, tmp_path, allowed):
    site = install("acme", POINT.format(kind="method"), policy_mine=SOURCE.format(base="Method", version=1))
    program = tmp_path / "program.py"
    program.write_text(WORKER)
    import os

    environment = {**os.environ, "PYTHONPATH": str(site)}
    if allowed is not None:
        environment["STILLHOUSE_PLUGINS"] = allowed
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment, check=True
    )
    expected = "['stillhouse 0.1.0', 'acme 1.2']" if allowed is None else "no method is called 'mine'"
    assert expected in done.stdout
