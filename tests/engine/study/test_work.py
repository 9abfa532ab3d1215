"""A cell in its process: its curve, its errors, the machine that it is made on."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
from small_study import make, small, untuned

from stillhouse.contract.metrics import higher_is_better, metric_behind
from stillhouse.errors import CheckpointError, ConfigError, Diverged, WriteFailed
from stillhouse.files import read_json
from stillhouse.study import directory, processes, work
from stillhouse.study.compare import of_configs
from stillhouse.study.plan import cells, chosen, of_study, score
from stillhouse.study.schema import validate


class TestWorker:
    ORDER = work.Order(
        "0" * 16, {"data": {}, "teacher": None}, {"task": "digits", "method": "kd"}, "", True, True
    )

    def order(self, folder: Path) -> work.Order:
        return work.replace(self.ORDER, folder=str(folder / self.ORDER.digest))

    @pytest.mark.parametrize("by", ["a signal", "the limit"])
    def test_a_killed_process_ends_its_cell_alone_with_the_reason_and_the_time_it_took(self, tmp_path, by):
        running = processes.Processes(1, limit=1000.0)
        order = work.replace(self.order(tmp_path), config={"task": "mnist1d", "method": "kd", "steps": 10**6})
        running.start(order)
        assert running.finished(0.0) == []
        (process,) = running._running
        if by == "a signal":
            os.kill(process.pid, signal.SIGKILL)
        began = running._running[process][1]
        running._running[process] = (order, began - (2000.0 if by == "the limit" else 500.0))
        ended = []
        while not ended:
            ended = running.finished(1.0)
        assert ended == [(order, 0)]
        told = read_json(Path(order.folder) / directory.RESULT, what="result", sealed=True)
        assert (told["status"], told["again"]) == ("failed", True)
        if by == "a signal":
            assert told["error"]["message"].startswith(
                "its process was ended by SIGKILL (out of memory?); see "
            )
            assert told["wall_seconds"] >= 500
        else:
            assert told["error"]["message"].startswith(
                "it was killed after 1000 s, the limit of a cell; see "
            )
            assert told["wall_seconds"] >= 2000
        running.close()

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_is_no_result_of_the_cell(self, tmp_path, monkeypatch, number):
        def full(*given):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("stillhouse.runs.directory.write_text", full)
        with pytest.raises(WriteFailed, match=rf"{os.strerror(number)}; free some space"):
            work.work(self.order(tmp_path))

    def test_a_disk_too_full_for_a_result_ends_the_study_with_a_word_on_going_on(self, tmp_path, monkeypatch):
        def full(folder, result):
            raise WriteFailed(f"{folder} can't be written", 28)

        monkeypatch.setattr(processes, "read_result", lambda folder: None)
        monkeypatch.setattr(processes, "write_result", full)
        with pytest.raises(WriteFailed, match=r"can't be written: then go on with --resume"):
            make(untuned(), tmp_path / "s")

    def test_data_that_are_not_those_of_the_study_are_refused(self, tmp_path):
        with pytest.raises(
            CheckpointError, match="the train split is b here and a where the study was prepared"
        ):
            work._check_origin(
                {"data": {"train": "a"}, "teacher": None}, {"data": {"train": "b"}, "teacher": {}}
            )
        with pytest.raises(CheckpointError, match="the teacher is None here and t where the study"):
            work._check_origin({"data": {}, "teacher": "t"}, {"data": {}, "teacher": {}})


def made(content: dict, folder: Path) -> dict:
    """The result of the study's last cell, made in this process."""
    plan = of_study(validate(content))
    facts, _ = work.prepare_pair([(entry.method, entry.trials[0].config) for entry in plan.entries])
    plan = plan.with_facts({(entry.method, entry.pair): facts[entry.method] for entry in plan.entries})
    one = cells(plan, {})[-1]
    return work.work(work.order(one, folder / one.digest))


STAGES = {
    "takd": {"name": "takd", "assistants": [{"name": "mlp", "hidden": 4}]},
    "pddm": {"name": "pddm", "pdnet_steps": 10},
}


class TestResult:
    @pytest.mark.parametrize("method", STAGES)
    def test_a_curve_is_of_the_model_that_the_run_ends_with(self, tmp_path, method):
        content = untuned(budget={"updates": 40}, seeds={"fresh": [0]}, common__validate_every=5)
        content["methods"] = {
            "hard": content["methods"]["hard"],
            method: {"config": {"method": STAGES[method]}},
        }
        found = made(content, tmp_path)
        rows = (tmp_path / found["digest"] / "run" / "metrics.jsonl").read_text().splitlines()
        scored = [row for row in map(json.loads, rows) if "validation.accuracy" in row]
        others = {row["stage"] for row in scored if row["model"] not in ("student", "target")}
        assert others, "some rows are of a network on the way"
        assert found["curve"]
        assert not others & {row["stage"] for row in found["curve"]}
        assert found["curve"][-1]["accuracy"] == found["scores"]["validation"]["accuracy"]
        assert found["validate_every"] == 5

    def test_memory_is_the_rise_from_the_cells_beginning(self, tmp_path, monkeypatch):
        held = iter([700, 900])
        monkeypatch.setattr(work, "most_memory", lambda: next(held))
        found = made(untuned(seeds={"fresh": [0]}), tmp_path)
        assert (found["peak_memory"], found["peak_gpu_memory"]) == (200, None)

    def test_a_score_that_is_not_finite_is_missing_and_is_told(self):
        assert work._not_finite({"validation": {"nll": float("inf"), "accuracy": 0.5}, "test": {"nll": None}}) == [
            "validation nll is not finite: it counts as missing", "test nll is not finite: it counts as missing"
        ]  # fmt: skip
        for value in (float("nan"), float("inf"), None):
            assert score({"status": "done", "scores": {"test": {"nll": value}}}, "test", "nll") is None

    def test_a_trial_without_a_finite_score_is_not_chosen(self, finished):
        plan = finished[1].plan
        entry = plan.entry("hard", "digits")
        kept = {one.digest: dict(found) for one, found in finished[1].provenance}
        first = next(one for one, _ in finished[1].provenance if one.method == "hard" and one.trial == 0)
        kept[first.digest]["scores"] = {"validation": {"accuracy": float("nan")}}
        assert chosen(plan, entry, kept) == 1

    @pytest.mark.parametrize(
        ("error", "again"),
        [
            (Diverged("loss is not finite"), False),
            (ValueError("a plugin's mistake"), False),
            (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
            (RuntimeError("CUDA out of memory"), True),
            (MemoryError(), True),
            (OSError(5, "Input/output error"), True),
            (CheckpointError("the teacher is another"), True),
        ],
    )
    def test_what_may_not_come_again_is_tried_again(self, tmp_path, monkeypatch, error, again):
        def fails(*given, **further):
            raise error

        monkeypatch.setattr(work, "run", fails)
        found = work.work(TestWorker().order(tmp_path))
        assert (found["status"], found["again"]) == ("failed", again)


BREAKS = """
    from stillhouse.api import Method, MethodConfig, hookimpl, LossTerm

    class Breaks(Method):
        api_version = 1
        updates = 0

        @hookimpl
        def loss_terms(self, student_out, targets, batch, info):
            self.updates += 1
            if self.updates > AT:
                raise ERROR
            return {"own": LossTerm(student_out.logits.square().sum() / info.rows)}
"""


@pytest.fixture
def breaks(install):
    """A method that fails at an update."""

    def write(at: int, error: str) -> Path:
        source = BREAKS.replace("AT", str(at)).replace("ERROR", error)
        return install(
            "breaks", "[stillhouse.methods]\nbreaks = rehearsal_breaks:Breaks\n", rehearsal_breaks=source
        )

    return write


class TestPreparation:
    def test_a_method_that_fails_in_its_rehearsal_is_told_and_the_rest_go_on(self, tmp_path, breaks):
        breaks(0, "ValueError('no such thing')")
        content = untuned(seeds={"fresh": [0]})
        content["methods"]["breaks"] = {"config": {"method": "breaks"}}
        analysis, said = make(content, tmp_path / "s")
        assert "failed: breaks on digits: no such thing" in said
        facts = analysis.plan.entry("breaks", "digits").facts
        assert facts.status == "failed"
        assert "in hook 'loss_terms' of plugin 'breaks' (breaks 1.2)" in facts.refused
        assert [len(row.scores) for row in analysis.rows["digits"][:2]] == [1, 1]

    def test_nothing_that_can_be_run_is_an_error(self, tmp_path, breaks):
        breaks(0, "ValueError('no such thing')")
        content = untuned(baseline="breaks", methods={"breaks": {"config": {"method": "breaks"}}})
        with pytest.raises(ValueError, match="nothing can be run: no such thing"):
            make(content, tmp_path / "s")

    def test_a_full_disk_in_a_cell_stops_the_study_and_the_cell_counts_as_not_run(self, tmp_path, breaks):
        breaks(3, "OSError(28, 'No space left on device')")
        content = untuned(baseline="breaks", methods={"breaks": {"config": {"method": "breaks"}}})
        with pytest.raises(WriteFailed, match=r"No space left on device; free some space.*--resume"):
            make(content, tmp_path / "s")
        assert not list(tmp_path.glob("s/cells/*/result.json"))


class TestMachine:
    def test_another_version_code_or_device_is_refused_before_training(self, tmp_path):
        content = untuned(seeds={"fresh": [0]})
        plan = of_study(validate(content))
        one = cells(plan, {})[0]
        order = work.replace(work.order(one, tmp_path / one.digest), elsewhere=True)
        work._check_machine(order)
        order.made_from["versions"]["torch"] = "1.0"
        order.made_from["code"]["stillhouse_baselines"] = "0" * 16
        order.made_from["machine"]["threads"] = 64
        found = work.work(order)
        assert (found["status"], found["again"]) == ("failed", True)
        for told in (
            "torch is 1.0 where the study was planned",
            "the code of stillhouse_baselines is 0000",
            "the machine's threads is 64",
        ):
            assert told in found["error"]["message"]
        assert not (tmp_path / one.digest).exists()

    def test_one_cell_at_once_on_a_gpu_where_nothing_is_said(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
        assert processes.default_workers(2, {"cpu"}) == 8
        assert processes.default_workers(1, {"cuda"}) == 1
        assert processes.default_workers(1, {"cuda:0", "cuda:1"}) == 2


class TestDirection:
    class Error:
        higher_is_better = False

    def test_the_object_behind_a_score_says_what_is_better(self):
        metrics = {"mae": self.Error(), "": object()}
        assert metric_behind("mae", metrics) is metrics["mae"]
        assert metric_behind("mae.2", metrics) is metrics["mae"]
        assert metric_behind("other", metrics) is metrics[""]
        assert not higher_is_better("mae", metrics["mae"])

    @pytest.fixture
    def scored_by(self, monkeypatch):
        from stillhouse_tasks.diabetes import Diabetes

        def judged(metric):
            monkeypatch.setattr(Diabetes, "metric", "mae")
            monkeypatch.setattr(Diabetes, "metrics", lambda self: {"mae": metric()})

        return judged

    def test_tuning_takes_the_lower_of_an_error_by_the_tasks_own_object(self, scored_by):
        import torchmetrics

        scored_by(torchmetrics.MeanAbsoluteError)
        content = small()
        content["pairs"] = content["pairs"][1:]
        plan = of_study(validate(content))
        facts, _ = work.prepare_pair([("hard", plan.entry("hard", "diabetes").trials[0].config)])
        assert (facts["hard"].metric, facts["hard"].higher) == ("mae", False)

    def test_one_that_nobody_knows_is_refused_with_what_to_say(self, scored_by):
        scored_by(lambda: object())
        content = small()
        with pytest.raises(
            ConfigError, match=r"'mae' is better is not known.*metric: \{name: mae, better: higher\}"
        ):
            of_study(validate(content))
        content["pairs"] = content["pairs"][1:]
        assert of_study(validate({**content, "metric": {"name": "mae", "better": "lower"}}))


class TestCompare:
    @pytest.mark.parametrize(("key", "value"), [("steps", 1000), ("batch_size", 8)])
    def test_budgets_that_differ_are_refused_with_how_to_make_them_equal(self, key, value):
        from stillhouse.config import validate as run

        given = {"task": "digits", "method": "hard_labels", "steps": 10, "batch_size": 4}
        configs = [run({**given, "name": "a"}), run({**given, "name": "b", key: value})]
        with pytest.raises(
            ConfigError, match=rf"the budgets differ: {key} is .* in a, {value} in b.*such as {key}={value}"
        ):
            of_configs(configs, [0])


def test_a_result_that_was_cut_short_or_changed_or_moved_is_none(tmp_path):
    cell = tmp_path / directory.digest({"a": 1})
    directory.write_result(cell, {"digest": cell.name, "made_from": {"a": 1}, "status": "done"})
    assert directory.read_result(cell)["status"] == "done"
    text = (cell / "result.json").read_text()
    for broken in (text[:-9], text.replace("done", "DONE"), json.dumps([1])):
        (cell / "result.json").write_text(broken)
        assert directory.read_result(cell) is None
    (cell / "result.json").write_text(text)
    moved = cell.rename(tmp_path / "other")
    assert directory.read_result(moved) is None
