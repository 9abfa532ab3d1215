"""Killed, interrupted, out of disk: real processes, taken up again, end with the bits of an unbroken run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

CONFIG = {
    "task": {"name": "digits", "labelled": 100, "unlabelled": 150, "validation": 60},
    "teacher": {"name": "mlp", "hidden": 24, "train": {"steps": 30}},
    "student": {"name": "mlp", "hidden": 8},
    "method": {"name": "sld", "shares": [1, 1, 1]},
    "steps": 45,
    "batch_size": 16,
    "scheduler": "CosineAnnealingLR",
    "log_every": 2,
    "validate_every": 5,
    "checkpoint_every": 4,
    "threads": 1,
}
REHEARSED = 4
"""Updates that are made with models of their own before the run: one of each stage, one of the teacher's."""
STAGES = {"distil": (0, 15), "relabel": (15, 30), "target": (30, 45)}
VARIANTS = {
    "one student": {},
    "another target": {"target": {"name": "mlp", "hidden": 12}},
}
RUN = ["run", "run.yaml", "out=run"]


class Place:
    """A folder with a config; commands run in it in processes of their own."""

    def __init__(self, folder: Path, forks, config: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.forks, self.log = folder, forks, folder / "log"
        (folder / "run.yaml").write_text(yaml.safe_dump(config))

    def run(self, *more: str, **faults) -> int:
        return self.forks.run([*RUN, *more], self.folder, self.log, **{"quick": True, **faults})

    @property
    def weights(self) -> bytes:
        return (self.folder / "run" / "student.safetensors").read_bytes()

    @property
    def rows(self) -> list[dict]:
        """metrics.jsonl without times."""
        lines = (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    @property
    def summary(self) -> dict:
        made = json.loads((self.folder / "run" / "summary.json").read_text())
        return {key: made[key] for key in ("scores", "steps", "teacher_calls", "test_opened", "warnings")}

    def equals(self, other: Place) -> None:
        assert self.weights == other.weights, "the weights, bit for bit"
        assert self.rows == other.rows, "no row of metrics.jsonl is missing, doubled or different"
        assert self.summary["scores"] == other.summary["scores"]

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, forks):
    """For each variant, a run that nothing happened to."""
    made: dict[str, Place] = {}

    def get(variant: str, *more: str) -> Place:
        key = variant + str(more)
        if key not in made:
            folder = tmp_path_factory.mktemp("unbroken")
            made[key] = Place(folder, forks, CONFIG | VARIANTS[variant])
            assert made[key].run(*more) == 0, made[key].said()
        return made[key]

    return get


@pytest.fixture
def place(tmp_path, forks):
    return lambda variant: Place(tmp_path, forks, CONFIG | VARIANTS[variant])


def test_two_runs_of_one_seed_are_the_same(unbroken, place):
    again = place("one student")
    assert again.run(quick=False) == 0, again.said()
    again.equals(unbroken("one student"))
    assert (again.folder / "run" / "curve.png").stat().st_size > 5_000
    rows = again.rows
    assert [row["step"] for row in rows if "loss" in row] == list(range(2, 46, 2))
    assert [row["step"] for row in rows if "validation.accuracy" in row] == list(range(5, 46, 5))


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_from_outside_at_ten_random_moments(variant, unbroken, place):
    """One run, killed ten times wherever it happens to be, and taken up again each time."""
    here, moments, long = place(variant), random.Random(variant), "steps=240"
    whole = unbroken(variant, long)
    run = here.folder / "run"
    landed = 0
    for kill in range(10):
        flags = ["--resume"] if kill else []
        pid = here.forks.start([*RUN, long, *flags], here.folder, here.log, quick=True)
        if kill % 3 == 0:  # while starting or training the teacher, or whenever that is over
            time.sleep(moments.random() * 0.4)
        else:  # in the middle of updates
            before = size_of(run / "metrics.jsonl")
            while size_of(run / "metrics.jsonl") <= before and not (run / "summary.json").is_file():
                time.sleep(0.001)
            time.sleep(moments.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        code = here.forks.wait(pid)
        landed += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), here.said()
    assert here.run(long, "--resume") == 0, here.said()
    here.equals(whole)
    assert landed, "no kill landed before the run had ended"


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


POINTS = {
    **{
        f"{when} update {update} ({stage})": {
            "function": "stillhouse.training.loop:Loop._update",
            "call": update + REHEARSED,
            "when": when,
        }
        for stage, (first, last) in STAGES.items()
        for update, when in ((first + 1, "before"), (first + 7, "after"), (last, "after"))
    },
    "a checkpoint is written and not yet in place": {"function": "os:fsync", "call": 9, "when": "after"},
    "a checkpoint is half written": {"function": "os:fsync", "call": 8, "when": "before"},
    "soft labels are kept, and nothing trained on them": {
        "function": "stillhouse.softlabels.store:SoftLabels.save",
        "call": 1,
        "when": "after",
    },
    "the run is trained and not yet scored": {
        "function": "stillhouse.runs.train:_finish",
        "call": 1,
        "when": "before",
    },
    "the student is written and the summary is not": {
        "function": "stillhouse.runs.page:page",
        "call": 1,
        "when": "before",
    },
    "the first file is being written": {"function": "os:fsync", "call": 1, "when": "after"},
}


@pytest.mark.parametrize(
    ("point", "variant"),
    [
        (point, variant)
        for point in POINTS
        for variant in VARIANTS
        if variant != "one student" or "update" in point
    ],
)
def test_killed_at_a_chosen_moment(point, variant, unbroken, place):
    whole, here = unbroken(variant), place(variant)
    assert here.run(die=POINTS[point]) == -signal.SIGKILL, here.said()
    assert here.run("--resume") == 0, here.said()
    here.equals(whole)
    left = [
        path.name for path in (here.folder / "run" / "checkpoints").iterdir() if path.name.startswith(".")
    ]
    assert not left, "half a checkpoint is left behind"


def test_teacher_calls_are_counted_over_both_parts(unbroken, place):
    here = place("one student")
    here.run(die=POINTS["after update 37 (target)"])
    assert here.run("--resume") == 0, here.said()
    assert here.summary["teacher_calls"] == unbroken("one student").summary["teacher_calls"]


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(unbroken, place):
    here = place("one student")
    long = ["steps=450000", "checkpoint_every=100000", "validate_every=100000"]
    pid = here.forks.start([*RUN, *long], here.folder, here.log)
    metrics = here.folder / "run" / "metrics.jsonl"
    while not metrics.is_file():
        time.sleep(0.005)
    os.kill(pid, signal.SIGINT)
    assert here.forks.wait(pid) == 130
    said = here.said()
    assert "error: interrupted after update" in said
    assert "the checkpoint is written: go on with --resume" in said
    assert "Traceback" not in said
    update = int(said.split("after update ")[1].split(";")[0])
    assert [path.name for path in (here.folder / "run" / "checkpoints").iterdir()] == [
        f"step-{update:09d}.pt"
    ]


def test_interrupted_and_taken_up_equals_unbroken(unbroken, place):
    whole, here = unbroken("one student"), place("one student")
    sends = {"function": "stillhouse.training.loop:Loop._update", "call": 18 + REHEARSED}
    assert here.run(interrupt=sends) == 130
    assert "interrupted after update 18; the checkpoint is written" in here.said()
    assert here.run("--resume") == 0, here.said()
    here.equals(whole)


def test_a_second_ctrl_c_stops_at_once(place):
    here = place("one student")
    sends = {"function": "stillhouse.training.loop:Loop._update", "call": 18 + REHEARSED, "times": 2}
    assert here.run(interrupt=sends) == 130
    assert "Traceback" not in here.said()


def test_ctrl_c_while_the_teacher_is_trained_loses_no_more_than_that(unbroken, place):
    here = place("one student")
    settings = ["teacher.train.steps=31"]  # a teacher of its own, so that it is trained here
    sends = {"function": "stillhouse.training.loop:Loop._update", "call": 3 + REHEARSED}
    assert here.run(*settings, interrupt=sends) == 130
    assert "Traceback" not in here.said()
    assert "--resume" in here.said()
    assert here.run(*settings, "--resume") == 0, here.said()


@pytest.mark.parametrize("call", [6, 12])
def test_a_full_disk_ends_the_run_and_loses_nothing(call, unbroken, place):
    whole, here = unbroken("one student"), place("one student")
    fault = {"function": "os:fsync", "call": call}
    assert here.run(full=fault) == 2
    said = here.said()
    assert "No space left on device" in said
    assert re.search(
        r"run/(checkpoints/step-\d+\.pt|soft-labels/2-target\.safetensors) can't be written", said
    )
    assert "free some space" in said
    assert "then go on with --resume" in said
    assert "Traceback" not in said
    assert here.run("--resume") == 0, here.said()
    here.equals(whole)


def copied(whole: Place, here: Place) -> Path:
    """The unbroken run as it was before its summary was written."""
    shutil.copytree(whole.folder / "run", here.folder / "run")
    (here.folder / "run" / "summary.json").unlink()
    return here.folder / "run"


class TestWhatDoesNotFit:
    def test_an_unfinished_run_is_not_taken_up_or_replaced_unasked(self, place):
        here = place("one student")
        here.run(die=POINTS["after update 7 (distil)"])
        assert here.run() == 2
        assert (
            "holds an unfinished run of this config; --resume goes on with it, --overwrite starts over"
            in here.said()
        )

    def test_a_finished_run_is_shown_and_not_made_again(self, unbroken, place):
        whole = unbroken("one student")
        before = whole.weights
        assert whole.run() == 0
        assert "holds this run, finished" in whole.said()
        assert whole.weights == before

    @pytest.mark.parametrize("flag", [[], ["--resume"]])
    def test_another_configs_directory_is_refused_naming_what_differs(self, flag, unbroken, place):
        whole = unbroken("one student")
        before = {path: path.read_bytes() for path in (whole.folder / "run").rglob("*") if path.is_file()}
        assert whole.run("optimizer.lr=0.5", "method.temperature=2", *flag) == 2
        said = whole.said()
        assert "holds a run of another config" in said
        assert "optimizer.lr: 0.001 there, 0.5 here" in said
        assert "method.temperature: None there, 2.0 here" in said
        assert "Traceback" not in said
        assert before == {path: path.read_bytes() for path in before}, "nothing was lost"

    def test_a_folder_that_holds_something_else_is_left_alone(self, place):
        here = place("one student")
        (here.folder / "run").mkdir()
        (here.folder / "run" / "thesis.tex").write_text("x")
        for flag in ([], ["--resume"], ["--overwrite"]):
            assert here.run(*flag) == 2
            assert "is not empty and holds no run" in here.said()
        assert [path.name for path in (here.folder / "run").iterdir()] == ["thesis.tex"]

    def test_a_truncated_checkpoint_is_named_and_the_one_before_goes_on(self, unbroken, place):
        whole, here = unbroken("one student"), place("one student")
        folder = copied(whole, here)
        newest = max((folder / "checkpoints").iterdir())
        newest.write_bytes(newest.read_bytes()[:1000])
        assert here.run("--resume") == 0, here.said()
        said = here.said()
        assert f"{newest.name} can't be read" in said
        assert "it is removed, and the checkpoint before it is taken" in said
        assert "resumed after update 44" in said
        here.equals(whole)

    def test_where_no_checkpoint_is_good_nothing_is_done(self, unbroken, place):
        whole, here = unbroken("one student"), place("one student")
        folder = copied(whole, here)
        for path in (folder / "checkpoints").iterdir():
            path.write_bytes(path.read_bytes()[:-1])
        before = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
        assert here.run("--resume") == 2
        assert "no checkpoint before is left: --overwrite starts over" in here.said()
        assert before == {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
        assert here.run("--overwrite") == 0, here.said()
        here.equals(whole)

    def test_damaged_soft_labels_cost_the_stage_and_no_more(self, unbroken, place):
        whole, here = unbroken("one student"), place("one student")
        assert here.run(die=POINTS["after update 37 (target)"]) == -signal.SIGKILL
        kept = next((here.folder / "run" / "soft-labels").iterdir())
        content = bytearray(kept.read_bytes())
        content[-1] ^= 1
        kept.write_bytes(content)
        assert here.run("--resume") == 0, here.said()
        assert "soft labels run/soft-labels/2-target.safetensors can't be read" in here.said()
        assert "resumed after update 30" in here.said()
        here.equals(whole)

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("seed=1", "seed"),
            ("optimizer.lr=0.01", "optimizer.lr"),
            ("target={name: mlp, hidden: 12}", "target"),
            ("task.seed=5", "task.seed"),
            ("teacher.train.steps=29", "teacher.train.steps"),
        ],
    )
    def test_a_checkpoint_of_another_config_is_refused_naming_the_field(
        self, override, said, unbroken, place
    ):
        whole, here = unbroken("one student"), place("one student")
        second = {"function": "stillhouse.runs.checkpoint:write", "call": 2, "when": "after"}
        assert here.run(override, die=second) == -signal.SIGKILL
        for path in (here.folder / "run" / "checkpoints").iterdir():
            path.unlink()
        theirs = max((whole.folder / "run" / "checkpoints").iterdir())
        shutil.copy(theirs, here.folder / "run" / "checkpoints")
        assert here.run(override, "--resume") == 2, here.said()
        assert theirs.name in here.said()
        assert said in here.said()
        assert "Traceback" not in here.said()

    def test_soft_labels_of_another_run_are_refused_naming_the_field(self, unbroken, place):
        _whole, here = unbroken("one student"), place("one student")
        assert here.run(die=POINTS["after update 37 (target)"]) == -signal.SIGKILL
        kept = next((here.folder / "run" / "soft-labels").iterdir())
        from stillhouse.files.tensors import read_tensors, write_tensors

        tensors, about = read_tensors(kept)
        made_from = json.loads(about["fingerprint"])
        made_from["data"] = "another"
        write_tensors(kept, tensors, {"fingerprint": json.dumps(made_from)})
        assert here.run("--resume") == 2
        assert "were made with data = 'another'" in here.said()
        assert "Traceback" not in here.said()

    def test_what_does_not_enter_the_weights_may_change(self, unbroken, place):
        whole, here = unbroken("one student"), place("one student")
        assert here.run(die=POINTS["after update 22 (relabel)"]) == -signal.SIGKILL
        assert here.run("--resume", "checkpoint_every=7") == 0, here.said()
        here.equals(whole)
