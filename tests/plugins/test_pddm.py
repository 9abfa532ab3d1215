"""PDDM in its stages: what they train, that they don't call the teacher, how they go on, what is refused."""

from __future__ import annotations

import itertools
import json
import math
import sys

import pytest
import resuming
import torch
import toys
from torch import nn

from stillhouse.api import Splits, TensorSplit
from stillhouse.config import Training
from stillhouse.errors import ConfigError, MissingExtra
from stillhouse.training.labels import keep
from stillhouse.training.loop import Loop
from stillhouse.training.step import DistillStep
from stillhouse_pddm import PDDM, PDDMConfig, PDNet
from stillhouse_pddm.networks import mappable, parameters_of, relative_error

QUICK = {"name": "pddm", "points": 3, "pdnet_steps": 5, "shares": (1, 1)}


def loop(method=QUICK, **more):
    torch.manual_seed(0)
    return toys.loop(method, **more)


# Stages.


@pytest.mark.parametrize("kept", [keep, None], ids=["soft labels kept", "a call at each step"])
def test_after_the_path_the_teacher_is_withdrawn(kept):
    made = loop(keep=kept)
    teacher, calls = toys.weights(made.step.teacher), []
    for upto in (made.lengths[0], made.lengths[1], None):
        made.run(upto)
        calls.append(made.step.teacher_calls)
    assert calls[0] > 0
    assert calls[0] == calls[1] == calls[2], "pdnet and target don't call it"
    assert toys.same_bits(made.step.teacher, teacher)
    assert [stage.teacher for stage in made.step.stages] == ["teacher", None, "pddm.path"]


def test_each_stage_trains_what_it_says():
    made = loop()
    models, states = made.step.run.models, []
    # Not the whole of pdnet: the loop enters the next stage before it stops, and the target is loaded there.
    for upto in (0, made.lengths[0], made.lengths[1] - 1, None):
        made.run(upto)
        states.append({name: toys.weights(model) for name, model in models.items()})
    changed = [
        {name for name in models if name != "pddm.path" and not toys.same_bits(before[name], after[name])}
        for before, after in itertools.pairwise(states)
    ]
    assert changed[0] == {"pddm.small1", "pddm.small2", "pddm.small3"}
    assert changed[1] == {"pddm.pdnet"}
    assert changed[2] == {"student", "pddm.pdnet"}
    firsts = [states[1][f"pddm.small{point}"]["0.weight"] for point in (1, 2, 3)]
    assert not torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[1], firsts[2])


class Normed(nn.Module):
    """A network with buffers."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.a, self.norm, self.b = (
            nn.Linear(toys.FEATURES, hidden),
            nn.BatchNorm1d(hidden),
            nn.Linear(hidden, toys.CLASSES),
        )

    def forward(self, inputs):
        return self.b(self.norm(self.a(inputs)).relu())


def test_the_target_starts_at_pdnets_step_past_the_end_with_the_last_networks_buffers():
    torch.manual_seed(0)
    made = loop(student=Normed())
    method = made.step.plugins.plugins[0].method
    made.run(made.lengths[0] + made.lengths[1])
    assert made.step.info.stage.name == "target"
    seen = toys.weights(made.step.run.student)
    last = method.networks[-1]
    with torch.no_grad():
        expected = method.pdnet(parameters_of(last), 2)
    assert all(torch.equal(seen[name], value) for name, value in expected.items())
    assert not torch.equal(seen["a.weight"], last.a.weight)
    assert torch.equal(seen["norm.running_mean"], last.norm.running_mean)


def test_pdnet_learns_to_predict_better_than_a_copy():
    made = loop(
        {**QUICK, "pdnet_steps": 150, "pdnet_lr": 1e-2, "outputs": 0.0}, steps=40, optimizer={"lr": 0.02}
    )
    made.run(made.lengths[0])
    first = made.lengths[0]
    made.run(made.lengths[1])
    errors = [row["pddm.parameters"] for row in made.watcher.metrics[first : first + 150]]
    assert errors[-1] < 0.2 * errors[0], "its first step is a copy"


@pytest.mark.parametrize(
    "at", [3, 6, 8, 11, 14], ids=["path", "after path", "pdnet", "after pdnet", "target"]
)
def test_resumes_bit_for_bit_in_every_stage(at):
    make = lambda: loop(scheduler="CosineAnnealingLR", keep=keep)
    unbroken = make()
    assert unbroken.lengths == [6, 5, 6]
    unbroken.run()
    assert resuming.same(unbroken, resuming.taken_up(make, at))


def test_micro_batches_give_the_same_loss():
    whole, parts = (loop(micro_batch_size=size) for size in (None, 3))
    for made in (whole, parts):
        made.run()
    for ours, theirs in zip(whole.watcher.metrics, parts.watcher.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-6)


# A path along size.

SIZES = {
    "networks": ({"name": "net", "hidden": 12}, {"name": "net", "hidden": 10}),
    "pdnet_steps": 5,
}


def sized(student=None, **settings) -> Loop:
    """A loop over networks of different widths, built by name."""
    torch.manual_seed(0)
    data, training = toys.splits(), Training(steps=18, batch_size=8, device="cpu")
    step = DistillStep(
        PDDM(PDDMConfig(**{**SIZES, **settings})),
        student=student or toys.net(8, seed=1),
        teacher=toys.net(16, seed=2),
        probe=data.train.batch(torch.arange(4)),
        splits=data,
        steps=18,
        build=lambda spec: toys.net(**{name: value for name, value in spec.items() if name != "name"}),
    )
    return Loop(step, data, training, torch.device("cpu"), toys.Silent(keep))


@pytest.mark.parametrize("taught_by", ["teacher", "previous"])
def test_a_path_along_size_ends_in_a_target_of_another_width(taught_by):
    made = sized(taught_by=taught_by)
    stages = {stage.name: stage for stage in made.step.stages}
    assert list(stages) == ["path.1", "path.2", "pdnet", "target"]
    assert stages["path.2"].teacher == {"teacher": "teacher", "previous": "pddm.small1"}[taught_by]
    projected = made.step.run.chosen["pddm.projections"]["value"]
    assert projected["0.weight"] == "12x6 -> 10x6 -> 8x6"
    made.run()
    assert resuming.same(made, resuming.taken_up(lambda: sized(taught_by=taught_by), 15))


def test_networks_that_cannot_be_mapped_are_named_with_both_shapes():
    with pytest.raises(ConfigError, match="can't be mapped") as refused:
        sized(student=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    said = str(refused.value)
    assert "2.bias is no such layer in network 1 (name=net, hidden=12) and (8,) in the student" in said
    kernels = [("one", nn.Conv1d(1, 4, 3)), ("other", nn.Conv1d(1, 4, 5))]
    with pytest.raises(ConfigError, match=r"weight is \(4, 1, 3\) in one and \(4, 1, 5\) in other"):
        mappable(kernels)


def test_a_network_with_other_outputs_is_refused():
    networks = ({"name": "net", "hidden": 12}, {"name": "net", "hidden": 10, "outputs": 7})
    with pytest.raises(ConfigError, match=r"outputs=7\) gives outputs of shape \(4, 7\)"):
        sized(networks=networks)


def test_a_path_along_size_needs_a_trainer_that_builds_models():
    with pytest.raises(ConfigError, match="knows models as objects only"):
        loop({"name": "pddm", "networks": SIZES["networks"]})


# Where it applies, and what is refused.


def test_works_without_labels():
    made = loop(data=toys.splits(labels=False))
    made.run()
    assert set(made.watcher.metrics[0]) == {"pddm.soft", "loss"}


def test_regression_compares_squared_errors():
    x = toys.rows(48, 1)[0]
    made = loop(
        student=toys.net(8, seed=1, outputs=1),
        teacher=toys.net(16, seed=2, outputs=1),
        data=Splits(TensorSplit(x, x[:, :1] - x[:, 1:2])),
    )
    made.run()
    assert set(made.watcher.metrics[0]) == {"pddm.soft", "pddm.labels", "loss"}
    assert math.isfinite(made.watcher.metrics[-1]["loss"])


@pytest.mark.parametrize(
    "setting", ["method.points=1", "method.networks=[{name: mlp, hidden: 8}]"], ids=["snapshots", "sizes"]
)
def test_a_path_of_fewer_than_two_points_is_refused(setting, cli):
    said = cli("run", "mnist1d-pddm", setting)
    assert said.code != 0
    assert setting.partition("=")[0] in said.err
    assert "2" in said.err


def test_without_scipy_alignment_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtra, match="study"):
        loop()
    loop({**QUICK, "align": False})


# In a process of its own.

CONFIG = {
    "task": {"name": "digits", "labelled": 100, "unlabelled": 150, "validation": 60},
    "teacher": {"name": "mlp", "hidden": 24, "train": {"steps": 30}},
    "student": {"name": "mlp", "hidden": 8},
    "method": {"name": "pddm", "points": 3, "pdnet_steps": 10, "shares": [1, 1]},
    "steps": 20,
    "batch_size": 16,
    "log_every": 5,
    "checkpoint_every": 4,
    "threads": 1,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, forks):
    run = resuming.Run(tmp_path_factory.mktemp("pddm"), forks, CONFIG)
    assert run.go() == 0, run.said()
    return run


@pytest.mark.parametrize("update", [7, 15, 27], ids=["path", "pdnet", "target"])
def test_killed_and_resumed_it_ends_with_the_same_bits(update, finished, tmp_path, forks):
    run = resuming.Run(tmp_path, forks, CONFIG)
    run.killed_after(update)
    assert run.go("--resume") == 0, run.said()
    assert run.weights == finished.weights
    assert (run.out / "pddm/path.json").read_text() == (finished.out / "pddm/path.json").read_text()


SIZED = {
    **CONFIG,
    "method": {
        "name": "pddm",
        "networks": [{"name": "mlp", "hidden": 12}, {"name": "mlp", "hidden": 10}],
        "taught_by": "previous",
        "pdnet_steps": 10,
    },
    "steps": 30,
}


def test_along_size_too_killed_in_every_stage_it_ends_with_the_same_bits(tmp_path, forks):
    whole = resuming.Run(tmp_path / "whole", forks, SIZED)
    assert whole.go() == 0, whole.said()
    for update in (5, 15, 25, 35):  # path.1, path.2, pdnet, target
        run = resuming.Run(tmp_path / f"at{update}", forks, SIZED)
        run.killed_after(update)
        assert run.go("--resume") == 0, run.said()
        assert run.weights == whole.weights, update
        assert (run.out / "pddm/path.json").read_text() == (whole.out / "pddm/path.json").read_text()


def test_a_run_directory_shows_the_error_at_every_path_point(finished):
    folder = finished.out / "pddm"
    shown = json.loads((folder / "path.json").read_text())
    assert shown["path"] == ["snapshot 1", "snapshot 2", "snapshot 3"]
    assert [row["point"] for row in shown["points"]] == [2, 3]
    for row in shown["points"]:
        for name in ("parameter_error", "output_error", "flow_error", "copied_parameter_error"):
            assert row[name] >= 0
    assert (folder / "path.png").read_bytes()[:4] == b"\x89PNG"
    kept = torch.load(folder / "path.pt", weights_only=True)
    pdnet = PDNet.load(folder / "pdnet.pt")
    made = pdnet({name: kept["parameters"][0][name] for name in pdnet.shapes}, 0)
    real = {name: kept["parameters"][1][name] for name in pdnet.shapes}
    assert float(relative_error(made, real).detach()) == pytest.approx(
        shown["points"][0]["parameter_error"], rel=1e-4
    )
    assert len(kept["outputs"]) == len(kept["flows"]) == 3
