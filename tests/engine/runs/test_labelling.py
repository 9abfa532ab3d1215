"""``stillhouse label`` and ``labels``: a config's teacher over its data, by one process or several, killed and gone on with."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stillhouse.config import read
from stillhouse.errors import ConfigError
from stillhouse.softlabels import SoftLabels
from stillhouse.softlabels.inspection import verify

SMALL = [
    "task={name: digits, labelled: 60, unlabelled: 80, validation: 40}",
    "teacher={name: mlp, hidden: 8, train: {steps: 5}}",
    "student={name: mlp, hidden: 4}",
    "device=cpu",
]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("task: digits\nmethod: kd\n")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("shard-")}


def test_keeps_the_answers_to_all_samples_and_says_what_they_cost(cli, config):
    said = cli("label", config, *SMALL, "--out", "kept", "--shard-samples", 50)
    assert said.code == 0, said.err
    assert "140 samples in 3 shards, about 3.3 KiB" in said.out
    assert "140 samples, 140 rows in " in said.out
    assert "KL(exact || stored), all classes: " in said.out
    labels = SoftLabels.open("kept")
    assert (len(labels), labels.form.kind, labels.about["data"]) == (140, "dense", "all")
    assert labels.about["fidelity"]["kl"] < 1e-6
    again = cli("label", config, *SMALL, "--out", "kept", "--shard-samples", 50)
    assert "140 of 140 samples are there already" in again.out
    assert "0 labelled now" in again.out


def test_labels_are_those_of_the_teacher_of_a_run(cli, config):
    from stillhouse.runs.labelling import Options, set_up

    assert cli("label", config, *SMALL, "--out", "kept", "--dtype", "float32").code == 0
    setting = set_up(read(str(config), SMALL), Options(), lambda message: None)
    ids = torch.tensor([0, 61, 139])
    with torch.no_grad():
        expected = setting.asking.teacher(setting.split.batch(ids).for_teacher)
    labels = SoftLabels.open("kept")
    torch.testing.assert_close(labels.lookup(ids), expected, rtol=1e-5, atol=1e-5)
    labels.check(split=setting.split)


@pytest.mark.parametrize("form", [("--form", "topk", "--k", 3), ("--form", "sampled"), ("--form", "hidden")])
def test_every_form_is_made_from_the_command_line(form, cli, config):
    said = cli("label", config, *SMALL, "--out", "kept", *form, "--features", "0")
    assert said.code == 0, said.err
    assert cli("labels", "verify", "kept").code == 0
    shown = cli("labels", "inspect", "kept", "--plot", "x.png", "--json")
    assert json.loads(shown.out)["samples"] == 140
    assert Path("x.png").stat().st_size > 1000
    assert "sample 0, row 0: " in cli("labels", "inspect", "kept").out
    assert SoftLabels.open("kept").features(torch.tensor([3]))["0"].shape[0] == 1


def test_names_stand_in_place_of_numbers(cli, config):
    cli("label", config, *SMALL, "--out", "kept")
    Path("names.json").write_text(json.dumps([f"digit-{number}" for number in range(10)]))
    assert "digit-" in cli("labels", "inspect", "kept", "--names", "names.json").out
    Path("names.json").write_text("3")
    assert "expected a list of names" in cli("labels", "inspect", "kept", "--names", "names.json").err


def test_export_import_and_compact_from_the_command_line(cli, config):
    cli("label", config, *SMALL, "--out", "kept", "--shard-samples", 50)
    assert "140 samples, 140 rows" in cli("labels", "export", "kept", "--out", "x.parquet").out
    assert cli("labels", "import", "x.parquet", "--out", "again").code == 0
    assert contents(Path("again")).keys() == contents(Path("kept")).keys()
    assert "3 shards of" in cli("labels", "compact", "kept", "--out", "less").out
    refused = cli("labels", "import", "x.parquet", "colour=red", "--out", "other")
    assert "expected teacher=DIGEST" in refused.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--k", "5"], "k is for topk and sampled"),
        (["--form", "topk", "--k", "11"], "k = 11; expected 1 to 10, the number of the teacher's outputs"),
        (["--batch-size", "0"], "--batch-size 0; expected 1 or more"),
        (["--shard-samples", "0"], "--shard-samples 0; expected 1 or more"),
        (["--features", "nowhere"], "teacher.nowhere: no such module"),
        (["--form", "hidden", "--head", "nowhere"], "head 'nowhere' is no linear module"),
        (["method=hard_labels"], "take no teacher"),
        (["methods=[mixup, kd]", "method="], "changes the inputs at random"),
    ],
)
def test_what_can_not_be_is_refused_and_nothing_is_written(words, said, cli, config):
    found = cli("label", config, *SMALL, *words, "--out", "kept")
    assert found.code == 2, found.out
    assert said in found.err
    assert "Traceback" not in found.err
    assert not Path("kept").exists()


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_folder_without_labels_is_refused(verb, cli):
    Path("empty").mkdir()
    said = cli("labels", verb, "empty")
    assert said.code == 2
    assert "empty" in said.err


def test_damage_is_found_and_mended(cli, config):
    words = ("label", config, *SMALL, "--out", "kept", "--shard-samples", 50)
    cli(*words)
    before = contents(Path("kept"))
    path = Path("kept/shard-000000000050.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    found = cli("labels", "verify", "kept")
    assert found.code == 2
    assert "DAMAGED shard-000000000050 (samples 50 to 99)" in found.out
    assert "run the command that labelled it again" in found.err
    mended = cli(*words)
    assert "to be made again: soft labels: shard shard-000000000050.safetensors" in mended.out
    assert "50 labelled now" in mended.out
    assert contents(Path("kept")) == before


def test_one_writer_at_a_time_and_who_it_is(cli, config):
    from stillhouse.softlabels.holding import held
    from stillhouse.softlabels.places import place

    with held(place("kept")):
        said = cli("label", config, *SMALL, "--out", "kept")
    assert said.code == 2
    assert f"kept is in use: process {os.getpid()} on " in said.err


def test_several_processes_make_the_same_bytes(cli, config):
    words = ("label", config, *SMALL, "--shard-samples", 35)
    cli(*words, "--out", "one")
    said = cli(*words, "--out", "two", "--workers", 2)
    assert said.code == 0, said.err
    assert contents(Path("one")) == contents(Path("two"))


@pytest.mark.slow
def test_a_ray_cluster_makes_the_same_bytes(cli, config):
    pytest.importorskip("ray")
    words = ("label", config, *SMALL, "--shard-samples", 35)
    cli(*words, "--out", Path("one").absolute())
    said = cli(*words, "--out", Path("two").absolute(), "--ray", "--workers", 2)
    assert said.code == 0, said.err
    assert contents(Path("one")) == contents(Path("two"))


def kills(tmp_path: Path, config: Path, moments: int, *more: str) -> int:
    """Label, killed at random moments, until it is done; how often it was killed. Compared with an unbroken one."""
    words = [
        sys.executable,
        "-m",
        "stillhouse.cli",
        "label",
        str(config),
        *SMALL,
        "--shard-samples",
        "2",
        *more,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    subprocess.run([*words, "--out", "whole"], cwd=tmp_path, env=env, check=True, capture_output=True)
    lasts, chance, killed = time.monotonic() - begin, random.Random(7), 0
    for _ in range(moments):
        running = subprocess.Popen(
            [*words, "--out", "killed"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL
        )
        try:
            running.wait(lasts * chance.uniform(0.4, 1.0))
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.wait()
            killed += 1
        if (tmp_path / "killed" / "store.json").exists():
            SoftLabels.open(tmp_path / "killed")  # what is published is readable at every moment
        if chance.random() < 0.5:  # start over, so that later moments find something to do
            shutil.rmtree(tmp_path / "killed", ignore_errors=True)
    done = subprocess.run([*words, "--out", "killed"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not any(problem for _, problem in verify(tmp_path / "killed"))
    assert torch.equal(SoftLabels.open(tmp_path / "killed").ids, torch.arange(140))
    assert not list((tmp_path / "killed").glob(".*.part"))
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--workers", "2")], ids=["one", "workers"])
def test_killed_at_twenty_random_moments_it_ends_with_the_same_bytes(more, tmp_path, config):
    assert kills(tmp_path, config, 20, *more) > 5


WRITES = {  # of 4 shards: store.json, then a shard and its manifest each
    "before anything is written": (1, "before"),
    "store.json is half written": (1, "after"),
    "a shard is written and its manifest is not": (3, "before"),
    "the second manifest is half written": (5, "before"),
    "the third shard is half written": (6, "after"),
}


@pytest.mark.parametrize("moment", WRITES.values(), ids=WRITES.keys())
def test_killed_while_it_writes_it_goes_on_with_the_same_bytes(moment, forks, tmp_path, config):
    words = ["label", config, *SMALL, "--shard-samples", 35, "--out"]
    log, (call, when) = tmp_path / "log", moment
    assert forks.run([*words, "whole"], tmp_path, log) == 0, log.read_text()
    fault = {"function": "os:fsync", "call": call, "when": when}
    assert forks.run([*words, "killed"], tmp_path, log, die=fault) == -signal.SIGKILL
    if (tmp_path / "killed" / "store.json").exists():
        SoftLabels.open(tmp_path / "killed")
    assert forks.run([*words, "killed"], tmp_path, log) == 0, log.read_text()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.part"))


def test_ctrl_c_says_how_to_go_on(forks, tmp_path, config):
    words = ["label", config, *SMALL, "--shard-samples", 35, "--out", "kept"]
    fault = {"function": "stillhouse.softlabels.writer:make", "call": 2}
    assert forks.run(words, tmp_path, tmp_path / "log", interrupt=fault) != 0
    said = (tmp_path / "log").read_text()
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert forks.run(words, tmp_path, tmp_path / "log") == 0


def test_a_teacher_on_a_server_is_asked_from_a_config(cli, tmp_path, install):
    sys.path.insert(0, str(Path(__file__).parents[2] / "plugins"))
    from serving import Server
    from test_openai import Toy

    install(
        "texts",
        "[stillhouse.tasks]\ntexts = texts:Texts\n",
        texts="""
        import torch
        from torch import nn
        from stillhouse.api import Splits, Task, TensorSplit

        class Texts(Task):
            api_version = 1
            teachers = students = {"toy": lambda: nn.Embedding(30, 30)}

            def splits(self):
                ids = torch.arange(40).reshape(8, 5) % 30
                return Splits(train=TensorSplit(ids, mask=torch.ones_like(ids, dtype=torch.bool)))
        """,
    )
    Path("c.yaml").write_text("task: texts\nmethod: kd\ndevice: cpu\n")
    with Server(Toy()) as server:
        teacher = f"teacher={{name: openai, url: '{server.url}', outputs: 30, k: 4}}"
        said = cli("label", "c.yaml", teacher, "--out", "kept", "--shard-samples", 3)
        assert said.code == 0, said.err
        assert len(server.asked) >= 8
    labels = SoftLabels.open("kept")
    assert labels.fingerprint["teacher"] == "served:toy"
    with torch.no_grad():
        expected = Toy()(torch.arange(40).reshape(8, 5) % 30).topk(4).indices
    assert torch.equal(labels.lookup(torch.arange(8)).indices, expected)
    found = cli(
        "label", "c.yaml", teacher.replace("k: 4", "k: 4, retries: 0"), "--out", "kept", "--shard-samples", 3
    )
    assert found.code == 2
    assert "nobody listens there, 1 times" in found.err


def test_a_split_that_changes_is_refused(config, monkeypatch):
    from stillhouse.runs import labelling

    setting = labelling.set_up(read(str(config), SMALL), labelling.Options(), lambda message: None)
    setting.split.first.fixed = setting.split.fixed = False
    monkeypatch.setattr(labelling, "set_up", lambda *given: setting)
    with pytest.raises(ConfigError, match="random input transform"):
        labelling.label(read(str(config), SMALL), "kept", labelling.Options())


@pytest.mark.parametrize(
    "words", [("--features", "nowhere"), ("--form", "hidden", "--head", "nowhere")], ids=["features", "head"]
)
def test_modules_that_are_not_there_are_refused_before_the_teacher_is_trained(
    words, cli, config, monkeypatch
):
    from stillhouse.runs import teachers

    trained = []
    monkeypatch.setattr(teachers, "trained", lambda *given: trained.append(given))
    found = cli("label", config, *SMALL, "--out", "kept", *words)
    assert found.code == 2
    assert "nowhere" in found.err
    assert not trained
