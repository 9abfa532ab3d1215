"""The pages for authors: the hook reference against hooks.py, the gallery against the plugins, the tutorial run."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from clean_env import ROOT

from stillhouse.contract.hooks import FIRST_RESULT, SINCE
from stillhouse.plugin.validate import hook_arguments
from stillhouse.testing import checks_for, outcomes, subject_of

DOCS = ROOT / "docs" / "plugins"


def reference() -> dict[str, tuple[tuple[str, ...], tuple[str, ...], str]]:
    """Hooks of the page: arguments in the heading, arguments in the list, and the text."""
    found = {}
    for section in (DOCS / "hooks.md").read_text().split("\n### ")[1:]:
        heading, _, text = section.partition("\n")
        text = text.split("\n## ")[0]
        name, given = re.fullmatch(r"`(\w+)\((.*)\)`", heading).groups()
        listed = tuple(re.findall(r"^- `(\w+)`: ", text, re.MULTILINE))
        found[name] = (tuple(filter(None, given.split(", "))), listed, text)
    return found


def test_the_reference_has_every_hook_and_no_other():
    assert reference().keys() == hook_arguments().keys()


@pytest.mark.parametrize("hook", sorted(hook_arguments()))
def test_the_reference_has_every_argument_in_order_and_explains_each(hook):
    heading, listed, text = reference()[hook]
    assert heading == hook_arguments()[hook]
    assert listed == hook_arguments()[hook]
    assert ("*First result*" in text or "*First result.*" in text) == (hook in FIRST_RESULT)
    assert f"Since {SINCE.get(hook, 1)}." in text


def gallery() -> object:
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gallery_is_what_the_plugins_are():
    made = gallery()
    assert made.page() == made.PAGE.read_text(), "run: python docs/plugins/gallery.py"


def test_the_gallery_notices_a_change(monkeypatch):
    made = gallery()
    monkeypatch.setattr(made, "describe", lambda entry: {"hooks": [], "requires": [], "summary": "new"})
    assert made.page() != made.PAGE.read_text()


BLOCK = re.compile(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str, str]]:
    """Language, title and content of every block of the tutorial, in order."""
    return [match.groups(default="") for match in BLOCK.finditer((DOCS / "first-plugin.md").read_text())]


def test_every_block_of_the_tutorial_is_a_file_or_commands_or_plain_text():
    assert all((title != "") == (language in ("python", "yaml")) for language, title, _ in blocks())
    assert [language for language, _, _ in blocks()].count("sh") >= 4


def test_the_tutorials_method_passes_its_checks(tmp_path, monkeypatch):
    (source,) = [text for _, title, text in blocks() if title.endswith("/stillhouse_confident.py")]
    (tmp_path / "stillhouse_confident.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("stillhouse_confident")
    monkeypatch.delitem(sys.modules, "stillhouse_confident")
    checks = [
        check for check in checks_for(subject_of(module.Confident)) if check.name != "import_does_no_work"
    ]
    assert [(one.check.name, one.message) for one in outcomes(checks) if one.bad] == []


@pytest.mark.slow
def test_the_tutorial_works_word_for_word_in_a_clean_environment(clean):
    env = clean("tutorial")
    pip = Path(env.folder / "bin" / "pip")
    flags = "--no-deps --no-index --no-build-isolation"
    pip.write_text(
        f'#!/bin/sh\nverb=$1; shift\n[ "$verb" = install ] && set -- {flags} "$@"\n'
        f'exec {sys.executable} -m pip --python {env.python} "$verb" "$@"\n'
    )
    pip.chmod(0o755)
    printed = []
    for language, title, text in blocks():
        if title:
            (env.work / title).write_text(text)
        elif language == "sh":
            printed += [env.sh(line, cwd=env.work) for line in text.splitlines()]
    assert any(re.search(r"method +confident +stillhouse-confident 0\.1\.0", text) for text in printed)
    assert any("sharpness: float, default 1.0. Power of the confidence" in text for text in printed)
    assert any(re.search(r"^\d+ passed", text, re.MULTILINE) for text in printed)
    assert {path.name for path in (env.work / "runs").iterdir()} == {
        "first-seed0",
        "confident-seed0",
        "smoothed-seed0",
    }
