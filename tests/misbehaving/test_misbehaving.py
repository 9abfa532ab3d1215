"""Plugins that misbehave, each a module in ``plugins/``: one clear message, in time, and no harm to others.

Each is installed as the distribution ``acme 1.2`` with the method ``mine``. ``teller`` says where it must be
caught: when a config that names it is resolved (before any data is made), when the run is set up, in the first
updates, or by the conformance checks where a run can't tell.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import toys

from stillhouse.cli.main import _report
from stillhouse.errors import PluginError, PluginWarning, StillhouseError
from stillhouse.plugin import catalog
from stillhouse.plugin.load import loaded
from stillhouse.runs.from_objects import distill
from stillhouse.testing import checks_for, outcomes, subject_of

PLUGINS = Path(__file__).parent / "plugins"
WHO = r"plugin 'mine' \(acme 1\.2\)"

ON_RESOLVING = {
    "raises_on_import": r"can't be loaded.*no licence found.*misbehaving_mine\.py:1.*uninstall acme",
    "needs_a_missing_package": r"No module named 'surely_not_installed'.*install 'surely_not_installed'",
    "wrong_argument_name": r"no argument 'student_logits'.*takes a subset of: student_out",
    "keyword_only_argument": r"argument 'info' is keyword-only, which would never be filled",
    "partial_implementation": r"hook 'loss_terms' is a partial, which would be ignored.*plain method",
    "cached_implementation": r"hook 'loss_terms' is a _lru_cache_wrapper, which would be ignored",
    "misspelt_hook": r"'loss_term' is no hook; did you mean 'loss_terms'",
    "from_the_future": r"api_version is 99, expected 1; upgrade stillhouse",
    "from_the_past": r"api_version is 0, expected 1; upgrade it",
    "requires_a_word": r"requires is 'logits'; expected a set, as in frozenset\(\{'logits'\}\)",
    "mutable_default": r"'weights' has the mutable default.*Field\(default_factory=list\)",
}
ON_RUNNING = {
    "returns_the_wrong_type": (0, r"hook 'loss_terms' gave a tensor of shape \(\).*expected a mapping"),
    "returns_nan": (1, r"loss is not finite after update 1: mine\.mine = nan of"),
    "trains_the_teacher": (
        1,
        r"the teacher's weights or buffers were written to, by the trainer or one of.*copy it to train it",
    ),
    "moves_tensors_to_another_device": (0, r"on meta; expected 'mine' on the student's device, cpu"),
    "unfreezes_the_teacher": (0, r"unfroze the teacher's '0\.weight'; a teacher stays frozen"),
    "teacher_in_train_mode": (1, r"put the teacher into train mode; a teacher stays frozen and in eval mode"),
    "moves_the_student": (0, r"hook 'on_run_start' moved the student from cpu to meta; expected models left"),
    "moves_the_batch": (
        0,
        r"'batch_transform' gave a tensor .* on meta; expected inputs on the batch's device, cpu",
    ),
    "changes_the_data": (0, r"hook 'on_run_start' wrote to the inputs of the train split in place"),
    "loss_without_a_gradient": (
        0,
        r"the loss of stage 'train' has no gradient, .*compute it from student_out",
    ),
    "stages_that_are_none": (0, r"hook 'stages' gave int 3; expected a list of Stage"),
    "keeps_the_graph": (1, r"keeps a tensor with its graph.*self\.history\[0\].*keep tensor\.detach\(\)"),
    "mutates_the_batch": (0, r"wrote to batch\.inputs in place.*batch\.inputs\.clone\(\)"),
}
ELSEWHERE = {
    "prints_on_import",
    "same_name_as_another",
    "claims_a_first_result",
    "needs_less_than_it_says",
    "slow_on_import",
    "gone_before_it_is_loaded",
}


@pytest.fixture
def acme(install):
    """Install one of the plugins."""

    def do(name: str, called: str = "mine") -> Path:
        point = f"[stillhouse.methods]\n{called} = misbehaving_mine:Mine\n"
        return install("acme", point, misbehaving_mine=(PLUGINS / f"{name}.py").read_text())

    return do


@pytest.fixture
def bystander():
    """A run under way in the same process with the same teacher; it must end as it does when it is alone."""
    teacher = toys.net(16, seed=2)
    alone = toys.loop("kd", teacher=toys.net(16, seed=2))
    alone.run()
    other = toys.loop("kd", teacher=teacher)
    other.run(5)
    yield teacher
    other.run()
    assert toys.same_bits(other.model, alone.model)
    assert toys.same_bits(teacher, toys.net(16, seed=2))


def test_every_plugin_is_tried():
    assert {path.stem for path in PLUGINS.glob("*.py")} == {*ON_RESOLVING, *ON_RUNNING, *ELSEWHERE}
    assert len(list(PLUGINS.glob("*.py"))) >= 20


@pytest.mark.parametrize("name", ON_RESOLVING)
def test_it_is_refused_before_any_data_is_made(acme, cli, name, bystander):
    acme(name)
    said = cli("config", "show", "mnist1d-kd", "method=mine")
    assert said.code == 2
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    assert said.out == ""
    assert re.search(rf"{WHO}.*{ON_RESOLVING[name]}", said.err)


@pytest.mark.parametrize("verb", ["show", "check"])
@pytest.mark.parametrize("name", ON_RESOLVING)
def test_show_and_check_say_the_same_and_nothing_else(acme, cli, name, verb):
    acme(name)
    said = cli("plugins", verb, "mine")
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert re.search(rf"^error: .*{WHO}.*{ON_RESOLVING[name]}", said.err)


@pytest.mark.parametrize("name", ON_RUNNING)
def test_it_stops_its_run_in_the_first_updates(acme, name, bystander, capsys, tmp_path):
    acme(name)
    updates, message = ON_RUNNING[name]
    teacher = toys.net(16, seed=2)  # its own: one of these writes to it
    with pytest.raises(StillhouseError) as caught:
        distill(
            toys.net(8, seed=1),
            teacher,
            toys.splits(),
            method="mine",
            steps=20,
            batch_size=8,
            log_every=1,
            dir=tmp_path / "run",
        )
    capsys.readouterr()
    assert _report(caught.value) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert re.search(WHO, said)
    assert re.search(message, said)
    log = tmp_path / "run" / "metrics.jsonl"
    made = len(log.read_text().splitlines()) if log.is_file() else 0
    assert made <= updates


def test_it_stops_a_step_in_somebody_elses_loop_too(acme):
    acme("mutates_the_batch")
    with pytest.raises(PluginError, match=WHO):
        toys.loop("mine").run(1)


def test_a_claim_that_another_has_is_refused_before_step_0_naming_both(acme, bystander):
    acme("claims_a_first_result")
    with pytest.raises(PluginError) as caught:
        toys.loop(["sld", "mine"], teacher=bystander)
    assert re.search(rf"'stages' is claimed by plugin 'sld' \(stillhouse.*\) and {WHO}", str(caught.value))


def test_a_name_that_another_has_is_refused_naming_both_distributions(acme, cli, bystander):
    acme("same_name_as_another", called="kd")
    said = cli("config", "show", "mnist1d-kd")
    assert said.code == 2
    assert re.search(r"two plugins are called 'kd': acme 1\.2 .* and stillhouse", said.err)
    assert "note: method 'kd' is claimed by acme and stillhouse" in cli("plugins").out


def test_a_capability_that_is_not_needed_is_told_by_the_checks(acme):
    acme("needs_less_than_it_says")
    kind = loaded(catalog.find("method", "mine"))
    (told,) = outcomes(
        [check for check in checks_for(subject_of(kind)) if check.name == "declared_capabilities_are_needed"]
    )
    assert told.status == "failed"
    assert re.search(rf"{WHO}: requires 'unlabelled' and runs the same without", told.message)


def test_what_it_prints_on_import_spoils_no_listing_and_is_told_with_its_name(acme, cli):
    acme("prints_on_import")
    listed = json.loads(cli("plugins", "--json").out)
    assert "mine" in {entry["name"] for entry in listed}
    assert "misbehaving_mine" not in sys.modules
    said = cli("plugins", "show", "mine", "--json")
    assert json.loads(said.out)["name"] == "mine"
    assert re.search(rf"note: method {WHO} printed .*hello from mine.*take the print out", said.err)


def test_a_slow_import_is_told_with_its_name_and_does_not_slow_the_listing(acme, cli, monkeypatch):
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(catalog, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=sleep))
    acme("slow_on_import")
    assert cli("plugins").code == 0
    assert clock == [0.0]
    with pytest.warns(PluginWarning, match=rf"{WHO} took 60\.0 s to import"):
        loaded(catalog.find("method", "mine"))


def test_one_that_is_uninstalled_after_it_was_listed_is_told_so(acme):
    site = acme("gone_before_it_is_loaded")
    entry = catalog.find("method", "mine")
    shutil.rmtree(next(site.glob("acme-*.dist-info")))
    (site / "misbehaving_mine.py").unlink()
    with pytest.raises(PluginError, match=rf"{WHO} was uninstalled after it was listed; install acme again"):
        catalog.load(entry)
