"""The command line: what it imports, what it prints, how it ends."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stillhouse.cli.main import parser

HEAVY = ("torch", "numpy", "pydantic", "yaml", "numba", "matplotlib", "rich", "safetensors", "pluggy")
SMALL = [
    "task={name: digits, labelled: 60, unlabelled: 80, validation: 40}",
    "teacher={name: mlp, hidden: 8, train: {steps: 5}}",
    "student={name: mlp, hidden: 4}",
    "steps=6",
    "batch_size=8",
    "threads=1",
]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("task: digits\nmethod: sld\n")
    return path


def refused(said, *expected: str) -> None:
    assert said.code == 2, said.err
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err + said.out
    for text in expected:
        assert text in said.err


class TestImports:
    """Asserted, not timed: with a broken plugin of a third party installed."""

    def modules(self, install, *words: str) -> set[str]:
        site = install(
            "acme",
            "[stillhouse.methods]\nacme = acme_broken:Mine\n[stillhouse.tasks]\nt = acme_broken:T\n",
            acme_broken="raise RuntimeError('imported')",
        )
        script = (
            "import sys, json\n"
            "from stillhouse.cli.main import main\n"
            "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as leaving:\n    code = leaving.code\n"
            "print('\\n' + json.dumps([code, sorted(sys.modules)]))"
        )
        env = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, "-c", script, *words], env=env, capture_output=True, text=True, check=True
        )
        code, modules = json.loads(done.stdout.splitlines()[-1])
        assert code in (0, None), done.stderr
        assert "Traceback" not in done.stderr
        if words[0] == "plugins":
            assert "acme" in done.stdout
        return set(modules)

    @pytest.mark.parametrize(
        "words", [["--help"], ["run", "--help"], ["--version"], ["plugins"], ["plugins", "--json"]]
    )
    def test_asking_what_there_is_loads_nothing_heavy_and_no_plugin(self, install, words):
        loaded = self.modules(install, *words)
        assert not loaded & {*HEAVY, "acme_broken"}
        assert not {name for name in loaded if name.startswith("stillhouse_")}

    def test_importing_the_package_does_not_import_torch(self):
        script = "import sys, stillhouse; dir(stillhouse); assert 'torch' not in sys.modules; stillhouse.Batch; assert 'torch' in sys.modules"
        subprocess.run([sys.executable, "-c", script], check=True)

    def test_running_imports_the_plugins_that_the_config_names_alone(self, install):
        install(
            "acme",
            "[stillhouse.methods]\nacme = acme_mine:Mine\n",
            acme_mine="raise RuntimeError('imported')",
        )
        script = (
            "import sys\nfrom stillhouse.config import validate\nfrom stillhouse.runs.train import resolve\n"
            "resolve(validate({'task': 'digits', 'method': 'kd'}))\n"
            "assert 'stillhouse_baselines.kd' in sys.modules\n"
            "for name in ('stillhouse_sld', 'stillhouse_tensorboard', 'acme_mine', 'sklearn'):\n"
            "    assert name not in sys.modules, name\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True)


def surface(command: argparse.ArgumentParser, name: str = "stillhouse") -> list[str]:
    """Every command with its positionals and options, one a line."""
    lines, words = [], []
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub, inner in action.choices.items():
                lines += surface(inner, f"{name} {sub}")
        elif not isinstance(action, argparse._HelpAction):
            shape = {0: "", None: " X"}.get(action.nargs, f" {action.nargs}")
            words.append(f"[{'|'.join(action.option_strings) or action.dest}{shape}]")
    return [" ".join([name, *words]), *lines]


def test_the_command_line_is_frozen():
    """Whoever changes it changes cli_surface.txt too, and CHANGELOG.md."""
    frozen = Path(__file__).with_name("cli_surface.txt").read_text().splitlines()
    assert surface(parser()) == frozen


class TestMistakes:
    """Exit code 2, one clear message, no traceback, nothing trained or written."""

    CASES = {
        "unknown key": (["stpes=3"], "stpes: unknown; did you mean 'steps'?"),
        "wrong type": (["steps=many"], "steps: ", "got 'many'"),
        "misspelt method": (["method=sdl"], "no method is called 'sdl'; did you mean 'sld'?"),
        "misspelt task": (["task=digit"], "no task is called 'digit'; did you mean 'digits'?"),
        "misspelt observer": (["observers=tensorbord"], "no observer is called 'tensorbord'; did you mean 'tensorboard'"),
        "misspelt teacher": (["teacher=mlpp"], "teacher.name: no model is called 'mlpp'; did you mean 'mlp'?"),
        "misspelt student argument": (["student={name: mlp, hiden: 3}"], "student.hiden: unknown; did you mean 'hidden'"),
        "wrong student argument": (["student={name: mlp, hidden: wide}"], "student.hidden: "),
        "misspelt method setting": (["method.temprature=2"], "method.temprature: unknown; did you mean 'temperature'"),
        "misspelt task setting": (["task.labeled=3"], "task.labeled: unknown; did you mean 'labelled'"),
        "misspelt teacher training": (["teacher={name: mlp, train: {stpes: 3}}"], "teacher.train.stpes: unknown"),
        "misspelt optimizer": (["optimizer=AdamV"], "optimizer.name: no 'AdamV' in torch.optim"),
        "misspelt scheduler": (["scheduler=CosinLR"], "scheduler.name: no 'CosinLR'"),
        "optimizer argument": (["optimizer.betsa=1"], "optimizer.betsa: AdamW has no such argument; did you mean 'betas'"),
        "no device": (["device=cudda"], "device: got 'cudda'; expected auto, cpu, cuda or cuda:N"),
        "yaml tag": (["steps=!!python/object/apply:os.getpid []"], "could not determine a constructor"),
        "no override": (["steps"], "override 'steps': expected KEY=VALUE"),
        "too large a division": (["task.labelled=5000"], "expected fewer, so that some are left to test on"),
        "no checkpoint": (["teacher={name: mlp, checkpoint: no.safetensors}"], "can't be read"),
        "empty split": (["task=empty"], "the train split is empty; expected at least one row"),
        "NaN in inputs": (["task=nan"], "train.inputs holds NaN or infinity, first in row 2"),
        "different outputs": (["task=narrow", "teacher=net", "student=small", "method=pddm"], "outputs of shape (4, 3), the student (4, 2)"),
        "stochastic teacher": (["task=noisy"], "0 (Dice) is stochastic", "use the method 'kd'"),
        "plugin that raises on import": (["method=raises"], "method plugin 'raises' (acme 1.2) can't be loaded", "no licence"),
        "two plugins with one name": (["method=twice"], "two plugins are called 'twice'", "acme 1.2", "bmce 1.2"),
        "hook with a wrong argument": (["method=wrong"], "plugin 'wrong' (acme 1.2)", "did you mean 'student_out'?"),
        "misspelt hook": (["method=misspelt"], "'loss_term' is no hook; did you mean 'loss_terms'?"),
        "a hook that fails": (["method=fails"], "plugin 'fails' (acme 1.2)", "division by zero"),
    }  # fmt: skip

    @pytest.fixture(autouse=True)
    def _plugins(self, install):
        install(
            "acme",
            """
            [stillhouse.methods]
            raises = acme_raises:Mine
            twice = acme_mine:Wrong
            wrong = acme_mine:Wrong
            misspelt = acme_mine:Misspelt
            fails = acme_mine:Fails
            [stillhouse.tasks]
            empty = acme_mine:Empty
            nan = acme_mine:Nan
            narrow = acme_mine:Narrow
            noisy = acme_mine:Noisy
            """,
            acme_raises="raise RuntimeError('no licence')",
            acme_mine="""
            import torch
            from torch import nn
            from stillhouse.api import Method, Splits, Task, TensorSplit, hookimpl

            class Wrong(Method):
                api_version = 1
                @hookimpl
                def loss_terms(self, student_outs): return {}

            class Misspelt(Method):
                api_version = 1
                @hookimpl
                def loss_term(self, student_out): return {}

            class Fails(Method):
                api_version = 1
                @hookimpl
                def loss_terms(self, student_out): 1 / 0

            def net(outputs: int = 3) -> nn.Module: return nn.Linear(2, outputs)
            def small() -> nn.Module: return nn.Linear(2, 2)

            class Dice(nn.Module):
                def forward(self, x): return x + torch.rand_like(x)

            def dice() -> nn.Module: return nn.Sequential(Dice(), nn.Linear(2, 3))

            class Base(Task):
                api_version = 1
                teachers = {"net": net}
                students = {"net": net, "small": small}
                teacher_training = {"steps": 2}
                x = torch.ones(6, 2)
                def splits(self): return Splits(TensorSplit(self.x, torch.zeros(len(self.x), dtype=torch.long)))

            class Empty(Base): x = torch.ones(0, 2)
            class Nan(Base): x = torch.ones(6, 2).index_fill(0, torch.tensor([2]), float("nan"))
            class Narrow(Base): pass
            class Noisy(Base): teachers = {"dice": dice}
            """,
        )
        install(
            "bmce",
            "[stillhouse.methods]\ntwice = acme_mine:Wrong\n",
        )

    @pytest.mark.parametrize("case", CASES)
    def test_is_told_and_nothing_is_lost(self, case, cli, config, monkeypatch):
        monkeypatch.setenv("STILLHOUSE_CACHE", "cache")
        words, *expected = self.CASES[case]
        settings = SMALL if case == "a hook that fails" else ["steps=6"]
        if any(word.startswith("steps=") for word in words):
            settings = []
        said = cli("run", config, *settings, *words, "out=run")
        refused(said, *expected)
        trained = list(Path("run").rglob("step-*")) + list(Path("run").rglob("*.safetensors"))
        assert not trained, "before any training"
        if case != "a hook that fails":
            assert not list(Path("cache").rglob("*.safetensors")), "before a teacher is trained, too"
            assert not Path("run").exists(), "the config, mended, can be run there"

    @pytest.mark.parametrize(
        "words", [["task=noisy"], ["task=narrow", "teacher=net", "student=small", "method=pddm"]]
    )
    def test_leaves_the_run_that_it_was_to_overwrite(self, words, cli, config):
        assert cli("run", config, *SMALL, "out=run").code == 0
        before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
        assert cli("run", config, *words, "out=run", "--overwrite").code == 2
        assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before

    def test_in_where_the_run_is_kept_is_told_before_training(self, cli, config):
        Path("file").touch()
        refused(cli("run", config, *SMALL, "out=file/run"), "is no folder; choose another with out=DIR")

    def test_is_shown_in_full_with_debug_before_or_after_the_command(self, cli, config):
        for words in (["--debug", "run", config, "stpes=3"], ["run", config, "stpes=3", "--debug"]):
            with pytest.raises(ValueError, match=r"stpes: unknown"):
                cli(*words)

    def test_in_a_files_name_offers_the_nearest(self, cli):
        refused(cli("run", "mnist1d-sdl"), "did you mean 'mnist1d-sld'")

    def test_in_a_command_is_argparses(self, cli):
        assert cli("rum").code == 2
        assert cli("run", "x", "--resum3").code == 2
        assert cli("run", "x", "--resume", "--overwrite").code == 2

    def test_a_yaml_tag_in_a_file_runs_nothing(self, cli, tmp_path):
        mark = tmp_path / "ran"
        path = tmp_path / "evil.yaml"
        path.write_text(f"task: digits\nmethod: kd\nname: !!python/object/apply:os.mkdir ['{mark}']\n")
        refused(cli("run", path), "evil.yaml:3: could not determine a constructor")
        assert not mark.exists()

    def test_a_key_that_stands_twice(self, cli, tmp_path):
        path = tmp_path / "twice.yaml"
        path.write_text("task: digits\nmethod: kd\nsteps: 3\nsteps: 4\n")
        refused(cli("run", path), "twice.yaml:4: key 'steps' stands twice")

    def test_a_compare_of_nothing(self, cli):
        refused(cli("compare", "steps=3"), "expected at least one config")
        refused(cli("compare", "mnist1d-kd", "--seeds", "a,b"), "--seeds a,b: expected whole numbers")


class TestCommands:
    def test_without_a_command_helps(self, cli):
        said = cli()
        assert said.code == 0
        assert "COMMAND" in said.out

    def test_version(self, cli):
        assert cli("--version").out.startswith("stillhouse 0.")

    def test_plugins_lists_and_warns_of_double_claims(self, cli, install):
        install("acme", "[stillhouse.methods]\nkd = acme:X\n")
        said = cli("plugins")
        assert said.code == 0
        assert "sld" in said.out
        assert (
            "note: method 'kd' is claimed by acme and stillhouse; a config that names it is refused"
            in said.out
        )

    def test_plugins_as_json(self, cli):
        listed = json.loads(cli("plugins", "--json").out)
        assert {"kind", "name", "distribution", "version", "value"} == set(listed[0])
        assert ("method", "sld") in {(entry["kind"], entry["name"]) for entry in listed}

    def test_config_show_fills_in_every_default_and_runs_again_as_it_is(self, cli, config, tmp_path):
        said = cli("config", "show", config, "steps=7")
        assert said.code == 0
        shown = yaml.safe_load(said.out)
        assert shown["steps"] == 7
        assert shown["optimizer"]["name"] == "AdamW"
        assert shown["teacher"]["name"] == "mlp"
        assert shown["teacher"]["train"]["steps"] == 1500
        assert shown["method"]["labels"] == "soft"
        again = tmp_path / "again.yaml"
        again.write_text(said.out)
        assert yaml.safe_load(cli("config", "show", again).out) == shown

    def test_config_list_describes_each(self, cli):
        lines = cli("config", "list").out.splitlines()
        assert any(line.startswith("mnist1d-sld") and len(line) > 30 for line in lines)

    def test_doctor_says_what_is_there(self, cli):
        said = cli("doctor")
        assert said.code == 0
        for word in ("torch", "kernel backend", "extra", "cache", "method sld: loads"):
            assert word in said.out
        assert json.loads(cli("doctor", "--json").out)["plugins"]["method kd"] == ""

    def test_doctor_names_a_plugin_that_does_not_load(self, cli, install):
        install(
            "acme", "[stillhouse.methods]\nacme = acme_broken:Mine\n", acme_broken="import nothing_like_that"
        )
        said = cli("doctor")
        assert said.code == 0
        assert "can't be loaded" in said.out

    def test_run_prints_its_figures_and_where_they_are(self, cli, config):
        said = cli("run", config, *SMALL, "out=run")
        assert said.code == 0, said.err
        assert "test: accuracy" in said.out
        assert "6 updates" in said.out
        assert "see run/README.md" in said.out
        assert "\x1b[" not in said.out, "plain lines when piped"

    def test_overrides_may_stand_after_an_option(self, cli, config):
        assert cli("run", config, "--overwrite", *SMALL, "out=run").code == 0
        assert yaml.safe_load(Path("run/config.yaml").read_text())["steps"] == 6

    def test_compare_prints_one_table_and_keeps_it(self, cli, tmp_path):
        for name, method in (("hard", "hard_labels"), ("soft", "kd")):
            (tmp_path / f"{name}.yaml").write_text(f"task: digits\nmethod: {method}\n")
        said = cli("compare", "hard.yaml", "soft.yaml", "--seeds", "0,1", "--out", "c", *SMALL)
        assert said.code == 0, said.err
        rows = [line for line in said.out.splitlines() if line.startswith("| ")]
        assert [row.split("|")[1].strip() for row in rows[2:]] == ["hard", "soft"]
        assert "Seeds 0, 1; the same data, student, initial weights" in said.out
        assert "see c/report.html" in said.out
        kept = Path("c/scores.csv").read_text().splitlines()
        assert [row.split(",")[1:5] for row in kept[1:]] == [
            [name, "final", "0", seed] for name in ("hard", "soft") for seed in "01"
        ]

    def test_compare_says_what_is_not_the_same_for_every_row(self, cli, tmp_path):
        (tmp_path / "a.yaml").write_text("task: digits\nmethod: hard_labels\n")
        (tmp_path / "b.yaml").write_text("task: digits\nmethod: hard_labels\noptimizer: {lr: 0.1}\n")
        said = cli("compare", "a.yaml", "b.yaml", "--seeds", "0", "--out", "c", *SMALL)
        assert said.code == 0, said.err
        assert "not the same for every row: optimizer.lr is 0.001 in a, 0.1 in b" in said.out

    def test_a_closed_pipe_is_no_error(self):
        done = subprocess.run(
            f"{sys.executable} -m stillhouse.cli.main plugins --json | head -c 1",
            shell=True, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
