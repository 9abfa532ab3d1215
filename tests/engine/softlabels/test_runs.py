"""``soft_labels: DIR`` in a config: a run with no teacher in memory, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import making
import pytest
import torch
import toys
from safetensors.torch import load_file

import stillhouse
from stillhouse.api import Method, Stage, hookimpl
from stillhouse.errors import CheckpointError, ConfigError
from stillhouse.runs import teachers
from stillhouse.softlabels import Form, SoftLabels
from stillhouse.training.labels import of_stage

SMALL = [
    "task={name: digits, labelled: 60, unlabelled: 80, validation: 40}",
    "student={name: mlp, hidden: 4}",
    "device=cpu",
    "threads=1",
]
TEACHER = "teacher={name: mlp, hidden: 8, train: {steps: 5}}"
RUN = ["steps=24", "batch_size=16", "validate_every=6", "log_every=6", "checkpoint_every=6"]


@pytest.fixture
def labelled(cli, tmp_path):
    """A config, and labels of its teacher in ``kept``."""
    (tmp_path / "mine.yaml").write_text("task: digits\nmethod: kd\n")
    said = cli("label", "mine.yaml", *SMALL, TEACHER, "--out", "kept", "--dtype", "float32")
    assert said.code == 0, said.err
    return cli


def run(cli, *words, out="run", labels="kept"):
    given = [] if labels is None else [f"soft_labels={labels}"]
    return cli("run", "mine.yaml", *SMALL, *RUN, *given, f"out={out}", *words)


def student(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "student.safetensors")


def same(a, b) -> None:
    for name, expected in student(b).items():
        torch.testing.assert_close(student(a)[name], expected, rtol=0, atol=1e-6, msg=name)


def manifest(folder) -> dict:
    return json.loads((Path(folder) / "manifest.json").read_text())


def test_the_student_is_that_of_a_run_that_asks_and_there_is_no_teacher(labelled, monkeypatch):
    assert run(labelled, TEACHER, labels=None, out="online").code == 0
    monkeypatch.setattr(teachers, "trained", None)
    monkeypatch.setattr(teachers, "load", None)
    said = run(labelled)
    assert said.code == 0, said.err
    same("run", "online")
    made, labels = manifest("run"), SoftLabels.open("kept")
    assert (
        made["teacher"]["digest"] == labels.fingerprint["teacher"] == manifest("online")["teacher"]["digest"]
    )
    assert made["teacher"]["soft_labels"]["form"] == "dense: all 10 logits, float32"
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["teacher_calls"] == 0
    assert "teacher" not in made["parameters"]


def test_labels_of_rows_behind_the_labelled_ones_are_found_by_a_stage_over_these_alone(labelled):
    words = ["method={name: sld, shares: [1, 1, 1]}"]
    assert run(labelled, TEACHER, *words, labels=None, out="online").code == 0
    said = run(labelled, *words)
    assert said.code == 0, said.err
    same("run", "online")


class Unlabelled(Method):
    """KD on the unlabelled rows alone."""

    api_version = 1
    requires = frozenset({"logits"})
    supports = frozenset({"classification"})

    @hookimpl
    def stages(self):
        return [Stage("alone", 1.0, data="unlabelled")]

    @hookimpl
    def loss_terms(self, student_out, teacher_out, batch, info):
        gap = (student_out.logits - teacher_out.logits).square().mean(-1)
        return {"gap": stillhouse.api.LossTerm(info.mean(gap, batch.mask))}


@pytest.mark.parametrize("data", ["all", "unlabelled"])
def test_ids_are_those_of_the_rows_that_the_store_says(data, tmp_path):
    splits, teacher = toys.splits(48, 64), toys.net(16, seed=2)
    form = Form.choose(4, "dense", "float32")
    labels = making.made(tmp_path, form, split=splits.stage(data), teacher=teacher, shard_samples=50)
    labels.data = data
    loop = toys.loop(
        Unlabelled(),
        data=splits,
        teacher=teacher,
        keep=lambda loop, *given: of_stage(labels, loop.schedule.stage, splits),
    )
    loop.run()
    online = toys.loop(Unlabelled(), data=splits, teacher=teacher, cache_teacher=False)
    online.run()
    for name, got in loop.step.run.student.state_dict().items():
        torch.testing.assert_close(got, online.step.run.student.state_dict()[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kept", "stage", "enough"),
    [
        ("all", "labelled", True),
        ("all", "unlabelled", True),
        ("labelled", "labelled", True),
        ("labelled", "all", False),
        ("labelled", "unlabelled", False),
        ("unlabelled", "unlabelled", True),
        ("unlabelled", "labelled", False),
        ("unlabelled", "all", False),
    ],
)
def test_a_stage_over_rows_that_are_not_there_is_refused(kept, stage, enough, tmp_path):
    splits, teacher = toys.splits(48, 64), toys.net(16, seed=2)
    labels = making.made(tmp_path, Form.choose(4), split=splits.stage(kept), teacher=teacher)
    labels.data = kept
    if enough:
        assert of_stage(labels, Stage("s", 1.0, data=stage), splits).count(0, len(splits.stage(stage))) > 0
        return
    with pytest.raises(
        CheckpointError, match=rf"made with data = '\d+ samples', this run has '\d+ {stage} ones in stage s'"
    ):
        of_stage(labels, Stage("s", 1.0, data=stage), splits)


REFUSED = {
    "a teacher that is not trained here": (["teacher={name: mlp, hidden: 9}"], "teacher = '", "teacher=null"),
    "other data": (["task={name: digits, labelled: 60, unlabelled: 80, validation: 40, seed: 1}"], "with data = '", "this run has"),
    "fewer data": (["task={name: digits, labelled: 60, unlabelled: 70, validation: 40}"], "with data = 'sample 139'", "130"),
    "more data": (["task={name: digits, labelled: 60, unlabelled: 90, validation: 40}"], "with data = '80 samples'", "90 unlabelled ones"),
    "inputs that a method changes": (["methods=[mixup, kd]", "method=null"], "with transform = 'none'", "by 'mixup'"),
    "no store": (["soft_labels=nowhere"], "soft labels nowhere can't be read", "expected a directory"),
    "features of a teacher": (
        ["methods=[kd, {name: fitnets, layers: {'0': '0'}}]", "method=null"], "needs a teacher", "there is none"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("words", "said", "more"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_naming_the_field_and_nothing_is_written(words, said, more, labelled):
    if said == "with data = '80 samples'":  # SLD is the one here that reads them
        words = [*words, "method=sld"]
    found = run(labelled, *words)
    assert found.code == 2, found.out
    assert said in found.err
    assert more in found.err
    assert "Traceback" not in found.err
    assert not Path("run").exists()


def test_another_teacher_that_is_trained_here_is_told_by_its_digest(labelled):
    other = "teacher={name: mlp, hidden: 9, train: {steps: 5}}"
    assert run(labelled, other, labels=None, out="other").code == 0
    digest = manifest("other")["teacher"]["digest"]
    found = run(labelled, other)
    assert found.code == 2
    assert (
        f"made with teacher = '{SoftLabels.open('kept').fingerprint['teacher']}', this run has '{digest}'"
        in found.err
    )
    assert run(labelled, TEACHER, out="same").code == 0


def test_a_teacher_in_a_checkpoint_is_compared_and_let_go(labelled):
    from stillhouse.config import read
    from stillhouse.runs import labelling
    from stillhouse.runs.weights import plain_state

    setting = labelling.set_up(
        read("mine.yaml", [*SMALL, TEACHER]), labelling.Options(), lambda message: None
    )
    from safetensors.torch import save_file

    save_file(plain_state(setting.asking.teacher), "teacher.safetensors")
    given = "teacher={name: mlp, hidden: 8, checkpoint: teacher.safetensors}"
    assert run(labelled, given).code == 0
    state = {name: value + 1e-3 for name, value in load_file("teacher.safetensors").items()}
    save_file(state, "teacher.safetensors")
    assert "were made with teacher = '" in run(labelled, given, out="other").err


def test_another_tokenizer_is_refused(labelled, monkeypatch):
    from stillhouse.runs import stored

    monkeypatch.setattr(stored, "tokenizer_digest", lambda tokenizer: "0123")
    assert "made with tokenizer = 'none', this run has '0123'" in run(labelled).err


def test_a_top_k_has_no_meaning_at_another_temperature_and_that_is_said_first(labelled):
    labelled("label", "mine.yaml", *SMALL, TEACHER, "--out", "few", "--form", "topk", "--k", "3")
    found = run(labelled, "method.temperature=2", labels="few")
    assert found.code == 2
    assert "temperature" in found.err
    assert not Path("run").exists()
    assert run(labelled, "method.temperature=1", labels="few").code == 0


def test_damage_is_said_before_anything_is_written(labelled):
    path = next(Path("kept").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = run(labelled)
    assert found.code == 2
    assert f"shard {path.name} of kept (samples 0 to 139)" in found.err
    assert not Path("run").exists()


def broken_off(cli, monkeypatch, *words) -> None:
    """A run that ends after its first checkpoint."""
    from stillhouse.runs.recorder import Recorder

    whole = Recorder.checkpoint

    def once(self, *given):
        whole(self, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "checkpoint", once)
        assert run(cli, *words).code != 0


def test_it_is_gone_on_with_from_the_same_labels(labelled, monkeypatch):
    assert run(labelled, out="whole").code == 0
    broken_off(labelled, monkeypatch)
    found = run(labelled, "--resume")
    assert found.code == 0, found.err
    assert "resumed after update 6" in found.out + found.err
    assert all(torch.equal(value, student("whole")[name]) for name, value in student("run").items())


def test_it_is_not_gone_on_with_from_labels_of_another_form(labelled, monkeypatch):
    broken_off(labelled, monkeypatch)
    shutil.rmtree("kept")
    labelled("label", "mine.yaml", *SMALL, TEACHER, "--out", "kept", "--dtype", "float16")
    found = run(labelled, "--resume")
    assert found.code == 2
    assert (
        "another form of soft labels (dense: all 10 logits, float32 there, dense: all 10 logits, float16 here)"
        in found.err
    )
    said = labelled("verify", "run").out
    assert (
        "soft labels kept were made with form = 'dense: all 10 logits, float16', this run has 'dense" in said
    )


def test_verify_looks_at_the_labels_that_a_resume_needs(labelled, monkeypatch):
    broken_off(labelled, monkeypatch)
    assert labelled("verify", "run").code == 0
    path = next(Path("kept").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    found = labelled("verify", "run")
    assert found.code == 1
    assert "soft labels kept" in found.out
    assert path.name in found.out


def test_compared_methods_read_the_same_labels(labelled, tmp_path):
    for name in ("kd", "hard_labels"):
        words = "soft_labels: kept" if name == "kd" else ""
        Path(f"{name}.yaml").write_text(
            f"name: {name}\nmethod: {name}\n{words}\ntask: {{name: digits, labelled: 60, unlabelled: 80, validation: 40}}\n"
            "student: {name: mlp, hidden: 4}\nsteps: 12\ndevice: cpu\nthreads: 1\nteacher: null\n"
        )
    said = labelled("compare", "hard_labels.yaml", "kd.yaml", "--seeds", "0,1", "--out", "compared")
    assert said.code == 0, said.err + said.out
    assert "not the same for every row" not in said.out
    cells = sorted(Path("compared").rglob("manifest.json"))
    told = [json.loads(path.read_text()) for path in cells]
    assert sum("soft_labels" in one.get("teacher", {}) for one in told) == 2


def test_from_python(tmp_path):
    splits, teacher = toys.splits(48, 0), toys.net(16, seed=2)
    labels = making.made(
        tmp_path / "kept", Form.choose(4, "dense", "float32"), split=splits.train, teacher=teacher
    )
    given = {
        "data": {"train": (splits.train.inputs, splits.train.labels)},
        "method": "kd",
        "steps": 12,
        "device": "cpu",
    }
    mine = stillhouse.distill(
        toys.net(8, seed=1), None, **given, soft_labels=tmp_path / "kept", dir=tmp_path / "run"
    )
    online = stillhouse.distill(toys.net(8, seed=1), teacher, **given)
    assert mine.summary["teacher_calls"] == 0
    for name, got in mine.student.state_dict().items():
        torch.testing.assert_close(got, online.student.state_dict()[name], rtol=0, atol=1e-6)
    again = stillhouse.distill(
        toys.net(8, seed=5), None, **given, soft_labels=tmp_path / "kept", dir=tmp_path / "run"
    )
    assert toys.same_bits(again.student, mine.student)
    with pytest.raises(CheckpointError, match=f"made with teacher = '{labels.fingerprint['teacher']}'"):
        stillhouse.distill(
            toys.net(8, seed=1), toys.net(16, seed=3), **given, soft_labels=str(tmp_path / "kept")
        )


def test_a_method_that_calls_the_teacher_by_itself_is_refused(tmp_path):
    class Own(Unlabelled):
        @hookimpl
        def teacher_forward(self, teacher, batch):
            return None

    splits, teacher = toys.splits(48, 0), toys.net(16, seed=2)
    making.made(tmp_path, Form.choose(4), split=splits.train, teacher=teacher)
    with pytest.raises(ConfigError, match="in a way of its own, which kept labels can't answer"):
        stillhouse.distill(
            toys.net(8), None, {"train": (splits.train.inputs, splits.train.labels)}, method=Own(), soft_labels=str(tmp_path),
            steps=2,
        )  # fmt: skip
