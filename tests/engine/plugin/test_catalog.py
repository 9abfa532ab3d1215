"""Plugins are listed from metadata, and only what a config names is imported."""

from __future__ import annotations

import json
import sys

import pytest

from stillhouse.errors import PluginError
from stillhouse.plugin import catalog
from stillhouse.plugin.load import as_plugins

GOOD = """
    from stillhouse.api import Method

    class Mine(Method):
        api_version = 1
"""


def point(name: str, value: str, group: str = "methods") -> str:
    return f"[stillhouse.{group}]\n{name} = {value}\n"


def listed() -> dict[tuple[str, str], str]:
    return {(entry.kind, entry.name): entry.distribution for entry in catalog.entries()}


def test_the_built_ins_come_by_entry_point_like_anyone_elses():
    assert {
        ("method", "hard_labels"),
        ("method", "kd"),
        ("method", "sld"),
        ("observer", "tensorboard"),
        ("task", "digits"),
        ("task", "mnist1d"),
        ("task", "mnist1d-views"),
    } <= set(listed())


def test_listing_imports_nothing(install):
    install("acme", point("mine", "acme_mine:Mine"), acme_mine="raise RuntimeError('imported')")
    assert listed()["method", "mine"] == "acme"
    assert "acme_mine" not in sys.modules


@pytest.mark.parametrize(
    "raising", ["raise RuntimeError('no licence')", "import no_such_module", "raise SystemExit(3)", "def f(:"]
)
def test_a_plugin_that_raises_on_import_is_blamed_with_its_distribution_and_line(install, raising):
    install("acme", point("mine", "acme_mine:Mine"), acme_mine=f"x = 1\n{raising}")
    with pytest.raises(PluginError) as caught:
        as_plugins("mine")
    said = str(caught.value)
    assert "method plugin 'mine' (acme 1.2) can't be loaded" in said
    assert "mend or uninstall acme" in said
    if "def" not in raising:
        assert "acme_mine.py:2" in said


def test_a_broken_plugin_that_nobody_names_is_in_nobodys_way(install):
    install("acme", point("mine", "acme_mine:Mine"), acme_mine="raise RuntimeError")
    assert [plugin.name for plugin in as_plugins("kd")] == ["kd"]


@pytest.mark.parametrize("broken", ["[stillhouse.methods]\nmine\n", "[other]\nnothing\n"])
def test_a_distribution_with_broken_metadata_is_told_and_in_nobodys_way(install, cli, broken):
    install("acme", broken)
    said = cli("plugins", "--json")
    assert said.code == 0
    assert {"kd", "sld"} <= {entry["name"] for entry in json.loads(said.out)}
    assert said.err.startswith("note: distribution acme 1.2: its entry points can't be read (")
    assert said.err.endswith("install it again, or uninstall it\n")
    assert said.err.count("\n") == 1


def test_what_an_interrupted_uninstall_left_is_not_listed(install):
    site = install("acme", point("mine", "acme_mine:Mine"), acme_mine=GOOD)
    (site / "acme-1.2.dist-info" / "METADATA").unlink()
    with pytest.raises(PluginError, match="no method is called 'mine'"):
        catalog.find("method", "mine")


@pytest.mark.parametrize("value", ["", "a b c"])
def test_an_entry_point_that_names_no_module_is_refused(install, value):
    install("acme", point("mine", value))
    with pytest.raises(PluginError, match=rf"'mine' \(acme 1\.2\): .* '{value}'; expected 'module:Class'"):
        catalog.load(catalog.find("method", "mine"))


def test_an_entry_point_to_nothing_is_refused(install):
    install("acme", point("mine", "acme_mine:Missing"), acme_mine=GOOD)
    with pytest.raises(PluginError, match=r"Missing"):
        as_plugins("mine")


@pytest.mark.parametrize("value", ["os:system", "acme_mine:Mine.Config", "acme_mine:function"])
def test_an_entry_point_to_something_else_is_refused_and_not_called(install, value, tmp_path):
    mark = tmp_path / "called"
    source = GOOD + f"\n    def function(*args):\n        open({str(mark)!r}, 'w')\n"
    install("acme", point("mine", value), acme_mine=source)
    with pytest.raises(PluginError, match=r"expected a subclass of Method"):
        as_plugins("mine")
    assert not mark.exists()


def test_two_plugins_with_one_name_are_refused_naming_both(install):
    install("acme", point("mine", "acme_mine:Mine"), acme_mine=GOOD)
    install("bmce", point("mine", "bmce_mine:Mine"), bmce_mine=GOOD)
    with pytest.raises(PluginError) as caught:
        as_plugins("mine")
    assert "two plugins are called 'mine': acme 1.2 (acme_mine:Mine) and bmce 1.2 (bmce_mine:Mine)" in str(
        caught.value
    )
    assert list(catalog.duplicates(catalog.entries())) == [("method", "mine")]


def test_a_built_ins_name_can_not_be_taken_in_silence(install):
    install("acme", point("kd", "acme_mine:Mine"), acme_mine=GOOD)
    with pytest.raises(PluginError, match=r"two plugins are called 'kd'"):
        as_plugins("kd")


def test_a_misspelt_plugin_is_refused_with_the_nearest_name():
    with pytest.raises(PluginError, match=r"no method is called 'sdl'; did you mean 'sld'"):
        as_plugins("sdl")


class TestAllowList:
    @pytest.fixture(autouse=True)
    def _two(self, install):
        install("acme-distil", point("mine", "acme_mine:Mine"), acme_mine=GOOD)
        install("bmce", point("other", "bmce_mine:Mine"), bmce_mine=GOOD)

    @pytest.mark.parametrize(
        ("allow", "seen"),
        [("", set()), ("mine", {"mine"}), ("Acme_Distil", {"mine"}), ("mine, bmce", {"mine", "other"})],
    )
    def test_names_plugins_or_distributions(self, monkeypatch, allow, seen):
        monkeypatch.setenv("STILLHOUSE_PLUGINS", allow)
        names = {name for _, name in listed()}
        assert names & {"mine", "other"} == seen
        assert "sld" in names, "Stillhouse's own are always there"

    def test_a_hidden_plugin_is_missed_with_the_reason(self, monkeypatch):
        monkeypatch.setenv("STILLHOUSE_PLUGINS", "")
        with pytest.raises(PluginError, match=r"STILLHOUSE_PLUGINS='' may hide it"):
            as_plugins("mine")

    def test_settles_a_double_claim(self, monkeypatch, install):
        install("cmce", point("mine", "cmce_mine:Mine"), cmce_mine=GOOD)
        monkeypatch.setenv("STILLHOUSE_PLUGINS", "cmce")
        assert as_plugins("mine")[0].distribution == "cmce 1.2"


def test_settings_in_python_are_checked_like_a_configs():
    with pytest.raises(ValueError, match=r"method.temprature: unknown; did you mean 'temperature'"):
        as_plugins({"name": "kd", "temprature": 2})
    with pytest.raises(ValueError, match=r"methods\.1\.temperature: "):
        as_plugins(["kd", {"name": "sld", "temperature": 0}])


@pytest.mark.parametrize("given", [{"nmae": "kd"}, 3, [3], []])
def test_a_method_in_python_that_is_none_is_refused_by_us(given):
    from stillhouse.errors import StillhouseError

    with pytest.raises(StillhouseError):
        as_plugins(given)
