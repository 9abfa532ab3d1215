"""Cells, resuming, editing, merging, and everything that a study refuses."""

from __future__ import annotations

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_study import RATES, make, small, untuned

from stillhouse.errors import CheckpointError, ConfigError, MissingExtra
from stillhouse.study import directory, processes, work
from stillhouse.study.plan import Plan, answered, cells, of_study
from stillhouse.study.schema import to_text, validate

TABLES = ("scores.csv", "statistics.csv", "report.tex")
"""What holds no time."""
EXACT = (
    "pair",
    "method",
    "teacher_calls",
    "student_parameters",
    "updates_to_target",
    "reached_target",
    "seeds",
)
"""Columns of ``costs.csv`` that are of no clock and no memory."""

CSV_TASK = """
    import torch
    from torch import nn
    from stillhouse.api import Splits, Task, TaskConfig, TensorSplit

    class CsvConfig(TaskConfig):
        path: str

    class CsvTask(Task):
        api_version = 1
        Config = CsvConfig
        kind = "classification"
        students = {"small": lambda: nn.Linear(2, 2)}

        def splits(self):
            rows = torch.tensor([[float(value) for value in line.split(",")] for line in open(self.config.path)])
            parts = {"train": rows[:20], "validation": rows[20:30], "test": rows[30:]}
            return Splits(**{name: TensorSplit(part[:, :2], part[:, 2].long()) for name, part in parts.items()})
"""
"""A task that reads a file."""


def results(folder: Path) -> dict[str, dict]:
    found, damaged = directory.read_results(folder)
    assert not damaged
    return found


def tables(folder: Path) -> dict[str, Any]:
    costs = csv.DictReader((folder / "costs.csv").open())
    exact = [{name: row[name] for name in EXACT} for row in costs]
    report = untimed((folder / "report.md").read_text())
    return {name: (folder / name).read_text() for name in TABLES} | {"costs": exact, "report.md": report}


def untimed(report: str) -> list[str]:
    """The report's lines, its tables without the columns of a clock or of memory."""
    lines, measured = [], set()
    for line in report.splitlines():
        columns = line.split("|")
        if line.startswith("| method |"):
            measured = {place for place, head in enumerate(columns) if re.search(r"second|\(s\)|MB", head)}
        elif not line.startswith("|"):
            measured = set()
        lines.append("|".join(column for place, column in enumerate(columns) if place not in measured))
    return lines


class TestCells:
    def test_tuning_sees_validation_alone_and_each_reported_cell_opens_the_test_split_once(self, finished):
        _, analysis, _ = finished
        assert analysis.complete
        assert {one.phase for one, _ in analysis.provenance} == {"tuning", "final"}
        for one, found in analysis.provenance:
            tuned = one.phase == "tuning"
            assert set(found["scores"]) == ({"validation"} if tuned else {"validation", "test"})
            assert found["test_opened"] == (0 if tuned else 1)
            assert one.seed in ([100] if tuned else [0, 1, 2])

    def test_all_methods_have_the_same_number_of_trials_and_updates(self, tmp_path):
        """Stages share the updates; those that a method makes on top are in its cell's result."""
        content = untuned(budget={"updates": 40, "trials": 2}, seeds={"tuning": [100], "fresh": [0]})
        stages = {
            "takd": {"name": "takd", "assistants": [{"name": "mlp", "hidden": 4}]},
            "pddm": {"name": "pddm", "pdnet_steps": 10},
        }
        content["methods"] |= {name: {"config": {"method": method}} for name, method in stages.items()}
        for method in content["methods"].values():
            method["search"] = {"optimizer.lr": RATES}
        analysis, _ = make(content, tmp_path / "s")
        for row in analysis.rows["digits"]:
            mine = [(one, found) for one, found in analysis.provenance if one.method == row.entry.method]
            assert [sum(one.phase == phase for one, _ in mine) for phase in ("tuning", "final")] == [2, 1]
            assert {found["steps"] for _, found in mine} == {50 if row.entry.method == "pddm" else 40}

    def test_the_best_trial_on_validation_is_the_one_that_is_reported(self, finished):
        _, analysis, _ = finished
        for row in analysis.rows["digits"]:
            best = max(range(2), key=lambda trial: row.trials[trial])
            assert row.chosen == best
            assert row.settings == row.entry.trials[best].settings

    def test_a_method_that_does_not_fit_a_task_is_not_applicable_with_the_reason(self, finished):
        _, analysis, said = finished
        row = analysis.rows["diabetes"][1]
        assert (row.status, row.scores) == ("not applicable", {})
        assert "has no meaning for regression" in row.reason
        assert "not applicable: kd on diabetes" in said
        assert not [one for one, _ in analysis.provenance if (one.method, one.pair) == ("kd", "diabetes")]

    def test_a_teacher_is_trained_once_for_all(self, finished):
        folder, _, _ = finished
        logs = [path.read_text() for path in folder.glob("cells/*/log.txt")]
        assert not any("training it once" in log for log in logs)
        assert sum("kept from an earlier run" in log for log in logs) == 5

    def test_a_tuning_cell_keeps_its_figures_and_a_reported_one_its_run(self, finished):
        folder, analysis, _ = finished
        for one, _ in analysis.provenance:
            student = folder / "cells" / one.digest / "run" / "student.safetensors"
            assert student.is_file() == (one.phase == "final")

    def test_it_says_what_was_passed_and_what_was_in_force(self, finished):
        folder, _, _ = finished
        plan = Plan.model_validate_json((folder / "plan.json").read_text())
        entry = plan.entry("kd", "digits")
        assert entry.given["method"] == "kd"
        assert entry.trials[0].config["method"] == {
            "name": "kd",
            "temperature": 4.0,
            "alpha": 0.9,
            "data": "labelled",
        }

    def test_one_that_fails_is_reported_with_its_error_and_the_rest_go_on(self, tmp_path):
        content = untuned()
        content["methods"]["wild"] = {"config": {"method": "hard_labels", "optimizer": {"lr": 1e30}}}
        analysis, said = make(content, tmp_path / "s")
        row = analysis.rows["digits"][2]
        assert row.status == "failed"
        assert "not finite" in row.reason or "NaN" in row.reason
        assert len(analysis.failures) == 3
        assert [len(other.scores) for other in analysis.rows["digits"][:2]] == [3, 3]
        assert "wild on digits, seed 0: failed" in said
        page = (tmp_path / "s" / "report.md").read_text()
        assert "wild on digits, seed 0: failed" in page

    def test_two_names_for_one_config_share_its_cells(self, tmp_path):
        content = untuned()
        hard = content["methods"]["hard"]
        content["methods"] = {"one": hard, "other": {**hard, "title": "Other"}}
        analysis, _ = make({**content, "baseline": "one"}, tmp_path / "s")
        assert len(results(tmp_path / "s")) == 3
        assert analysis.rows["digits"][1].difference.interval.mean == 0.0

    def test_a_limit_is_that_of_every_cell(self, cli, tmp_path, monkeypatch):
        given = []
        monkeypatch.setattr("stillhouse.study.run.Processes", lambda *words: given.append(words) or 1 / 0)
        (tmp_path / "mine.yaml").write_text(to_text(validate(untuned())))
        cli("study", "mine.yaml", "--limit", "90")
        assert [words[2] for words in given] == [90.0]


class TestGoingOn:
    def test_a_finished_study_is_shown_again_without_a_run(self, finished):
        folder, _, _ = finished
        before, text = results(folder), tables(folder)
        _, said = make(small(), folder)
        assert results(folder) == before
        assert tables(folder) == text
        assert "preparing" not in said

    def test_a_finished_study_notices_that_its_data_changed(self, install, tmp_path):
        rows = tmp_path / "rows.csv"
        rows.write_text("".join(f"{n % 5},{n % 2},{n % 2}\n" for n in range(40)))
        install("csvtask", "[stillhouse.tasks]\ncsvtask = csvtask:CsvTask\n", csvtask=CSV_TASK)
        content = untuned(methods={"hard": {"config": {"method": "hard_labels"}}})
        content["pairs"] = [
            {"name": "rows", "task": {"name": "csvtask", "path": str(rows)}, "student": "small"}
        ]
        make(content, tmp_path / "s")
        before = results(tmp_path / "s")
        rows.write_text("".join(f"{n % 5},{n % 3},{n % 2}\n" for n in range(40)))
        with pytest.raises(
            CheckpointError, match="holds this study, unfinished or with other data; --resume"
        ):
            make(content, tmp_path / "s")
        assert results(tmp_path / "s") == before
        analysis, said = make(content, tmp_path / "s", resume=True)
        assert "what it was made from has changed: " in said
        assert "; rows: train is " in said
        assert not before.keys() & {one.digest for one, _ in analysis.provenance}
        assert analysis.complete
        rows.unlink()
        with pytest.raises(CheckpointError, match="or with other data"):
            make(content, tmp_path / "s")

    def test_an_edit_runs_what_changed_and_no_more(self, finished, tmp_path):
        folder = tmp_path / "s"
        shutil.copytree(finished[0], folder)
        before = results(folder)
        edited = small(seeds={"tuning": [100], "fresh": [0, 1, 2, 3]})
        with pytest.raises(CheckpointError, match="--resume runs what is missing"):
            make(edited, folder)
        analysis, _ = make(edited, folder, resume=True)
        after = results(folder)
        assert {name: after[name] for name in before} == before
        new = [one for one, _ in analysis.provenance if one.digest not in before]
        assert sorted((one.method, one.pair, one.seed) for one in new) == [
            ("hard", "diabetes", 3), ("hard", "digits", 3), ("kd", "digits", 3)
        ]  # fmt: skip

    def test_a_damaged_cell_is_made_again_and_comes_out_the_same(self, finished, tmp_path):
        folder = tmp_path / "s"
        shutil.copytree(finished[0], folder)
        text = tables(folder)
        one = next(one for one, _ in finished[1].provenance if one.phase == "final")
        path = folder / "cells" / one.digest / "result.json"
        path.write_text(path.read_text().replace('"status": "done"', '"status": "doNe"'))
        _, said = make(small(), folder, resume=True)
        assert f"cell {one.digest} is damaged: it is to be made again" in said
        assert tables(folder) == text

    def test_what_diverged_would_do_so_again_and_is_kept(self, tmp_path):
        content = untuned()
        content["methods"]["kd"]["config"]["optimizer"] = {"lr": 1e30}
        make(content, tmp_path / "s")
        before = results(tmp_path / "s")
        assert sum(found["status"] == "failed" for found in before.values()) == 3
        analysis, said = make(content, tmp_path / "s")
        assert analysis.complete
        assert "preparing" not in said, "it is finished: nothing is left to run"
        assert results(tmp_path / "s") == before

    def test_what_was_lost_holds_back_the_reported_cells_and_is_tried_again_on_a_resume(
        self, finished, tmp_path
    ):
        folder = tmp_path / "s"
        shutil.copytree(finished[0], folder)
        one = next(one for one, _ in finished[1].provenance if one.phase == "tuning" and one.method == "kd")
        cell = folder / "cells" / one.digest
        order = work.order(one, cell)
        directory.write_result(cell, processes.lost(order, "its process was ended", time.time()))
        kept = results(folder)
        assert not answered(kept[one.digest])
        entry = Plan.model_validate_json((folder / "plan.json").read_text()).entry("kd", "digits")
        listed = cells(finished[1].plan.model_copy(update={"entries": [entry]}), kept)
        assert {cell.phase for cell in listed} == {"tuning"}
        with pytest.raises(CheckpointError, match="unfinished or with other settings; --resume"):
            make(small(), folder)
        make(small(), folder, resume=True)
        assert results(folder)[one.digest]["status"] == "done"
        assert tables(folder) == tables(finished[0])

    def test_what_a_kill_leaves_is_gone_on_with_to_the_same_tables(self, finished, tmp_path):
        """A cell that was finished and not told of, one cut short before its first checkpoint, one not begun."""
        folder = tmp_path / "s"
        shutil.copytree(finished[0], folder)
        text = tables(folder)
        told, cut, new = [
            folder / "cells" / one.digest for one, _ in finished[1].provenance if one.phase == "final"
        ][:3]
        (told / "result.json").unlink()
        (cut / "result.json").unlink()
        (cut / "run" / "summary.json").unlink()
        shutil.rmtree(cut / "run" / "checkpoints")
        shutil.rmtree(new)
        make(small(), folder, resume=True)
        assert tables(folder) == text

    @pytest.mark.slow
    @pytest.mark.parametrize("moments", [10])
    def test_killed_and_resumed_it_ends_with_the_same_tables(self, tmp_path, moments):
        """SIGKILL to the study's process at ``moments`` random times; its cells end with it."""
        chance = random.Random(moments)
        content = small(seeds={"tuning": [100], "fresh": list(range(8))})
        make(content, tmp_path / "whole")
        path = tmp_path / "small.yaml"
        path.write_text(to_text(validate(content)))
        command = [
            sys.executable,
            "-m",
            "stillhouse.cli.main",
            "study",
            str(path),
            "--out",
            str(tmp_path / "s"),
        ]
        command += ["--resume", "--workers", "2"]
        for moment in range(moments):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            cells = moment % 3  # that end before; none: while it imports, prepares, or begins the first
            while cells and (line := process.stdout.readline()):
                cells -= line.startswith("[")
            time.sleep(chance.random() * (0.5 if moment % 3 else 8))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL, "the study ended before its time"
        subprocess.run(command, check=True, capture_output=True)
        assert tables(tmp_path / "s") == tables(tmp_path / "whole")

    @pytest.mark.slow
    def test_ctrl_c_stops_the_cells_and_says_how_to_go_on(self, tmp_path):
        path = tmp_path / "long.yaml"
        path.write_text(to_text(validate({**untuned(), "budget": {"updates": 100_000}})))
        command = [
            sys.executable,
            "-m",
            "stillhouse.cli.main",
            "study",
            str(path),
            "--out",
            str(tmp_path / "s"),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 120
        while not list(tmp_path.glob("s/cells/*/run/checkpoints/*")) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, told = process.communicate(timeout=120)
        assert process.returncode == 130, told
        assert "0 cells finished and 2 begun; go on with --resume" in told
        assert "for at most 60 s; Ctrl-C once more ends all at once" in said
        assert not list(tmp_path.glob("s/cells/*/result.json"))


def made_elsewhere(folder: Path, part: str, **changed: str) -> None:
    """Rewrite a study's cells as if something that they are made from had been another there."""
    for path in list((folder / "cells").iterdir()):
        result = directory.read_result(path)
        result["made_from"][part].update(changed)
        result["digest"] = directory.digest(result["made_from"])
        path.rename(path.with_name(result["digest"]))
        directory.write_result(path.with_name(result["digest"]), result)


class TestMerge:
    def test_finished_cells_of_another_machine_are_taken_over(self, finished, tmp_path):
        analysis, said = make(small(), tmp_path / "here", merge=[finished[0]])
        assert analysis.complete
        assert f"{finished[0]}: 15 finished cells taken over" in said
        assert "[" not in said.replace(str(tmp_path), ""), "no cell was run"
        assert tables(tmp_path / "here") == tables(finished[0])

    def test_cells_of_another_version_are_not_and_the_version_is_told(self, tmp_path):
        content = untuned(methods={"hard": {"config": {"method": "hard_labels"}}})
        make(content, tmp_path / "there")
        made_elsewhere(tmp_path / "there", "versions", torch="1.0")
        _, said = make(content, tmp_path / "here", merge=[tmp_path / "there"])
        assert "0 finished cells taken over" in said
        assert "cells not taken over: torch is 1.0 there" in said
        assert len(results(tmp_path / "here")) == 3

    def test_cells_of_another_device_are_not_and_the_device_is_told(self, tmp_path):
        content = untuned(methods={"hard": {"config": {"method": "hard_labels"}}}, seeds={"fresh": [0]})
        make(content, tmp_path / "there")
        made_elsewhere(tmp_path / "there", "machine", device="NVIDIA H200")
        _, said = make(content, tmp_path / "here", merge=[tmp_path / "there"])
        assert "cells not taken over: the machine's device is NVIDIA H200 there, cpu here" in said

    def test_cells_of_other_settings_are_not_and_the_setting_is_told(self, tmp_path):
        """Such as a path of the data: what it names may be the same bytes, which the config doesn't say."""
        content = untuned(methods={"hard": {"config": {"method": "hard_labels"}}}, seeds={"fresh": [0, 1]})
        make(content, tmp_path / "there")
        content["pairs"][0]["student"] = {"name": "mlp", "hidden": 9}
        _, said = make(content, tmp_path / "here", merge=[tmp_path / "there"])
        assert "0 finished cells taken over" in said
        assert "cells not taken over: student.hidden is 8 there, 9 here\n" in said


class TestRefused:
    """Before anything is run, and nothing that is there is touched."""

    @pytest.fixture
    def untouched(self, monkeypatch):
        """A teacher that is trained fails the test."""

        def prepared(pairs, workers):
            raise AssertionError("preparing began")

        monkeypatch.setattr("stillhouse.study.run.prepared", prepared)

    def test_the_directory_of_another_study(self, finished):
        with pytest.raises(CheckpointError, match="holds the study 'small', and this is 'other'"):
            make(small(name="other"), finished[0], resume=True)

    def test_a_directory_that_holds_something_else(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("mine")
        for options in ({}, {"overwrite": True}):
            with pytest.raises(CheckpointError, match=r"holds no study \(thesis.tex\)"):
                make(small(), tmp_path, **options)
        assert (tmp_path / "thesis.tex").read_text() == "mine"

    def test_overwrite_removes_what_is_a_studys_alone(self, finished, tmp_path):
        folder = tmp_path / "s"
        shutil.copytree(finished[0], folder)
        (folder / "notes.txt").write_text("mine")
        directory.clear(folder)
        assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == ["notes.txt"]

    @pytest.mark.parametrize("fault", ["another study", "nothing to prepare it from", "a directory to merge"])
    def test_overwrite_removes_nothing_before_everything_is_checked(
        self, finished, tmp_path, monkeypatch, fault
    ):
        folder = tmp_path / "s"
        shutil.copytree(finished[0], folder)
        before = results(folder)
        content, options = small(), {}
        if fault == "another study":
            content["name"] = "other"
        elif fault == "a directory to merge":
            options["merge"] = [folder]
        else:
            monkeypatch.setattr("stillhouse.study.run.prepared", lambda pairs, workers: 1 / 0)
        with pytest.raises((CheckpointError, ZeroDivisionError)):
            make(content, folder, overwrite=True, **options)
        assert results(folder) == before
        assert (folder / "report.html").is_file()

    def test_two_studies_in_one_directory_at_once(self, tmp_path):
        with directory.held(tmp_path / "s"), pytest.raises(CheckpointError) as error:
            make(small(), tmp_path / "s")
        assert f"is in use by process {os.getpid()} on " in str(error.value)
        assert "wait for it, or choose another with --out" in str(error.value)

    def test_a_plan_that_can_not_be_read(self, tmp_path):
        (tmp_path / "plan.json").write_text("{")
        with pytest.raises(CheckpointError, match="can't be read as a study's plan; remove it"):
            make(small(), tmp_path)

    def test_a_metric_that_a_task_does_not_have(self, tmp_path):
        with pytest.raises(
            ConfigError, match=r"hard on diabetes: metric.name: the task has no 'accuracy'.*r2"
        ):
            of_study(validate(small(metric={"name": "accuracy", "better": "higher"})))

    def test_a_directory_to_merge_that_is_none_of_this_study(self, finished, tmp_path, untouched):
        with pytest.raises(CheckpointError, match="holds no study"):
            make(small(), tmp_path / "s", merge=[tmp_path])
        with pytest.raises(CheckpointError, match="holds the study 'small', and this is 'other'"):
            make(small(name="other"), tmp_path / "s", merge=[finished[0]])

    def test_ray_that_is_not_there(self, tmp_path, untouched, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(MissingExtra, match=r"--ray needs ray: pip install 'stillhouse\[ray\]'"):
            make(small(), tmp_path / "s", ray=True)

    @pytest.mark.parametrize("limit", ["0", "-1", "nan"])
    def test_a_limit_that_is_none(self, cli, tmp_path, untouched, limit):
        (tmp_path / "mine.yaml").write_text(to_text(validate(untuned())))
        said = cli("study", "mine.yaml", f"--limit={limit}")
        assert (said.code, said.out) == (2, "")
        assert f"--limit {limit}: expected more than 0 seconds" in said.err

    def test_a_folder_that_can_not_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="is no folder; choose another with --out"):
            make(small(), tmp_path / "file" / "s")


@pytest.mark.slow
def test_a_local_ray_cluster_gives_the_same_results_bit_for_bit(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    content = untuned()
    make(content, tmp_path / "here")
    make(content, tmp_path / "ray", ray=True)
    assert tables(tmp_path / "ray") == tables(tmp_path / "here")
    students = sorted((tmp_path / "here").glob("cells/*/run/student.safetensors"))
    assert len(students) == 6
    for path in students:
        other = tmp_path / "ray" / path.relative_to(tmp_path / "here")
        assert other.read_bytes() == path.read_bytes()
