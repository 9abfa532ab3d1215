"""HLDM in runs: what it trains, what it stands over, how it goes on, what it refuses."""

from __future__ import annotations

import json
import math
import re
import signal
from dataclasses import replace

import pytest
import torch
import yaml
from resumed import assert_resumes
from torch import nn
from toys import loop, net, rows, same_bits, splits, weights

from stillhouse.api import ConfigError, Diverged, LossTerm, Method, Splits, StepInfo, TensorSplit, hookimpl
from stillhouse.config import validate
from stillhouse.plugin.dispatch import PluginError
from stillhouse.runs.checkpoint import newest, read, step_of
from stillhouse.runs.resolve import resolve
from stillhouse_hldm import HLDM, HLDMConfig, method, weighting

WEIGHTINGS = {
    "uncertainty": {},
    "gradnorm": {},
    "dwa": {"window": 3},
    "fixed": {"weights": {"hldm.kd": 0.7}},
    "simplex": {"entropy": 0.5},
}


def hldm(name: str, **more):
    return {"name": "hldm", "weighting": name, **WEIGHTINGS[name], **more}


# In a run.


def test_in_a_run_gradnorm_evens_the_gradients_out():
    made = loop(
        hldm("gradnorm", alpha=0, lr=0.05, data="labelled"),
        steps=150,
        batch_size=48,
        scheduler="CosineAnnealingLR",
        optimizer={"lr": 1e-3},
    )
    made.run()
    plugin, step = made.step.plugins.plugins[0].method, made.step
    batch = made.splits.train.batch(torch.arange(48))
    out, teacher = step.run.student(batch.inputs), step.teacher(batch.inputs)
    info = StepInfo(stage=step.stages[0], rows=48, labelled=48)
    from stillhouse.contract.outputs import StudentOut, Targets

    terms = plugin.loss_terms(StudentOut(out), Targets(batch.labels, teacher), batch, info)
    weigh = plugin.weighting.weights(plugin.weighting.slots([f"hldm.{name}" for name in terms]))
    gradients = plugin._gradients([term.value for term in terms.values()], info)
    norms = torch.stack([torch.cat([part.flatten() for part in own]).norm() for own in gradients]) * weigh
    assert float(norms[0] / norms[1]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_weighting_trains_the_student_and_shows_its_weights(name):
    made = loop(hldm(name), steps=40)
    teacher = weights(made.step.teacher)
    made.run()
    assert same_bits(made.step.teacher, teacher)
    assert {"hldm.ce", "hldm.kd", "hldm.weight.hldm.ce", "hldm.weight.hldm.kd"} <= set(
        made.watcher.metrics[-1]
    )
    moved = made.watcher.metrics[-1]["hldm.weight.hldm.kd"] != made.watcher.metrics[0]["hldm.weight.hldm.kd"]
    assert moved is (name != "fixed")


def test_fixed_weights_are_the_ones_given():
    made = loop(hldm("fixed"))
    made.run()
    row = made.watcher.metrics[0]
    assert row["loss"] == pytest.approx(row["hldm.ce"] + 0.7 * row["hldm.kd"])


def test_the_loss_is_kendalls():
    made = loop(hldm("uncertainty", scales={"hldm.kd": 1.0}), steps=40)
    made.run()
    row = made.watcher.metrics[-1]
    s = [-math.log(row[f"hldm.weight.hldm.{name}"]) for name in ("ce", "kd")]
    kendall = sum(
        math.exp(-s_i) * row[f"hldm.{name}"] + s_i for s_i, name in zip(s, ("ce", "kd"), strict=True)
    )
    assert row["loss"] == pytest.approx(kendall, rel=1e-4)


def test_the_students_gradient_is_that_of_the_weighted_terms():
    made = loop(hldm("uncertainty"), steps=40)
    made.run(20)
    step = made.step
    batch = made.splits.train.batch(torch.arange(8))
    loss, _ = step(step.run.student, batch)
    got = torch.autograd.grad(loss, list(step.run.student.parameters()))
    logits, taught = step.run.student(batch.inputs), step.teacher(batch.inputs)
    from stillhouse.kernels import softmax_kl

    s = step.plugins.plugins[0].method.weighting.s.detach()
    expected = (-s[0]).exp() * nn.functional.cross_entropy(logits, batch.labels)
    expected = expected + (-s[1]).exp() * softmax_kl(logits, taught, temperature=4.0)
    for a, b in zip(got, torch.autograd.grad(expected, list(step.run.student.parameters())), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_weights_have_an_optimizer_group_of_their_own_without_weight_decay():
    made = loop(hldm("uncertainty", lr=0.3), optimizer={"lr": 1e-3, "weight_decay": 0.1})
    made.run(1)
    student, own = made.optimizer.param_groups
    assert (student["weight_decay"], student["lr"]) == (0.1, 1e-3)
    assert (own["weight_decay"], own["lr"]) == (0.0, 0.3)
    assert own["params"][0] is made.step.run.models["hldm.weights"].s
    assert "s" in made.state_dict()["models"]["hldm.weights"]


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_run_taken_up_anywhere_has_the_bits_of_an_unbroken_one(name):
    assert_resumes(lambda: loop(hldm(name)), range(1, 12, 5))


def test_forgotten_slots_are_seen(monkeypatch):
    monkeypatch.setattr(HLDM, "load_state_dict", hookimpl(lambda self, state: None))
    with pytest.raises(AssertionError):
        test_a_run_taken_up_anywhere_has_the_bits_of_an_unbroken_one("uncertainty")


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_micro_batches_give_the_same_weights(name):
    """On labelled and unlabelled rows together: some micro-batches have no label at all."""
    whole, parts = loop(hldm(name)), loop(hldm(name), micro_batch_size=3)
    whole.run(), parts.run()
    for key, value in whole.watcher.metrics[-1].items():
        assert parts.watcher.metrics[-1][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_norms_of_micro_batches_taken_one_by_one_are_seen(monkeypatch):
    from stillhouse_hldm import weighting

    sound = weighting.GradNorm.objective
    monkeypatch.setattr(
        weighting.GradNorm,
        "objective",
        lambda self, part: sound(self, replace(part, last=True)) if self.prepare() is None else None,
    )
    with pytest.raises(AssertionError):
        test_micro_batches_give_the_same_weights("gradnorm")


def test_without_labels_the_distillation_term_stands_alone():
    made = loop("hldm", data=splits(labels=False))
    made.run()
    assert "hldm.ce" not in made.watcher.metrics[-1]


def test_regression_has_squared_errors():
    x, _ = rows(24)
    data = Splits(TensorSplit(x, torch.randn(24, 1, generator=torch.Generator().manual_seed(1))))
    made = loop("hldm", data=data, student=net(4, outputs=1), teacher=net(8, seed=3, outputs=1), steps=6)
    made.run(1)
    assert made.step.stages[0].data == "labelled"
    assert made.watcher.metrics[0]["hldm.kd"] > 0


# Over other methods.


class Extra(Method):
    """A term that may be made not finite."""

    api_version = 1
    requires = frozenset()
    value = 1.0

    @hookimpl
    def loss_terms(self, student_out, info):
        return {"term": LossTerm(self.value * student_out.logits.square().mean())}


@pytest.mark.parametrize("name", ["uncertainty", "gradnorm", "dwa", "simplex", "fixed"])
def test_it_stands_over_any_other_methods(name):
    more = WEIGHTINGS[name] | ({"weights": {"fitnets.hint": 0.5}} if name == "fixed" else {})
    made = loop(["kd", "fitnets", {"name": "hldm", "weighting": name, **more}])
    before = weights(made.step.teacher)
    made.run()
    assert same_bits(made.step.teacher, before)
    shown = {key for key in made.watcher.metrics[-1] if key.startswith("hldm.weight.")}
    assert shown == {f"hldm.weight.{term}" for term in ("kd.kl", "kd.ce", "fitnets.hint")}
    assert made.step.run.chosen["hldm.terms"]["value"] == []


def test_it_stands_over_a_method_with_stages():
    made = loop(["sld", "hldm"])
    made.run()
    assert [stage.name for stage in made.step.stages] == ["distil", "relabel", "target"]
    assert "hldm.weight.sld.kl" in made.watcher.metrics[-1]


def test_its_own_terms_stand_beside_others_where_asked():
    made = loop(["fitnets", {"name": "hldm", "terms": ["ce", "kd"]}])
    made.run()
    assert {"fitnets.hint", "hldm.ce", "hldm.kd"} <= set(made.watcher.metrics[-1])


def test_a_methods_own_weight_counts_as_part_of_its_term():
    made = loop([{"name": "kd", "alpha": 0.25}, {"name": "hldm", "weighting": "fixed"}])
    made.run(1)
    row = made.watcher.metrics[0]
    assert row["loss"] == pytest.approx(0.25 * row["kd.kl"] + 0.75 * row["kd.ce"])


def test_two_of_one_name_are_balanced_apart():
    """Each T^2 is that of the one whose term it is."""
    twice = [
        {"name": "hldm", "terms": ["ce"]},
        {"name": "hldm", "as": "cold", "terms": ["kd"], "temperature": 3.0},
    ]
    made = loop(twice)
    made.run(2)
    assert {"hldm.ce", "cold.kd", "hldm.weight.hldm.ce", "cold.weight.cold.kd"} <= set(
        made.watcher.metrics[-1]
    )
    first, second = (plugin.method.weighting.scales for plugin in made.step.plugins.plugins)
    assert (first, second) == ({"hldm.kd": 16.0}, {"cold.kd": 9.0})


def test_methods_under_it_are_no_setting():
    with pytest.raises(ConfigError, match=r"methods: unknown"):
        resolve(validate({"task": "digits", "method": {"name": "hldm", "methods": ["kd"]}}))


# Bad input.


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["uncertainty", "gradnorm", "dwa", "simplex", "fixed"])
def test_a_loss_that_is_not_finite_stops_the_run_names_the_term_and_leaves_the_student(name, bad):
    extra = Extra()
    settings = WEIGHTINGS[name] if name != "fixed" else {}
    made = loop([extra, HLDM(HLDMConfig(weighting=name, **settings))])
    made.run(3)
    before = weights(made.step.run.student)
    extra.value = bad
    with pytest.raises(
        Diverged, match=r"not finite in update 3: extra.term = (nan|inf); the student is as it was"
    ):
        made.run()
    assert same_bits(made.step.run.student, before)


REFUSED = {
    "a term of no method": ({"weighting": "fixed", "weights": {"crd.nce": 1.0}}, "names a term of no method of this run"),
    "weights that are learned": ({"weights": {"hldm.kd": 1.0}}, "set weighting: fixed"),
    "an unknown key": ({"alhpa": 1}, "did you mean 'alpha'"),
    "a negative alpha": ({"alpha": -1}, "greater than or equal to 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_make_no_sense_are_refused(what):
    settings, message = REFUSED[what]
    with pytest.raises(ConfigError, match=message):
        loop({"name": "hldm", **settings})


def test_an_unknown_term_is_named_with_the_ones_there_are():
    made = loop(hldm("fixed", weights={"hldm.kl": 1.0}, data="labelled"))
    with pytest.raises(
        ConfigError, match=r"'hldm.kl' is no term of this run; its terms are hldm.ce, hldm.kd"
    ):
        made.run(1)


def test_an_unknown_layer_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"hldm.layer: no module 'fc'"):
        loop(hldm("gradnorm", layer="fc"))
    assert loop(hldm("gradnorm", layer="3")).run()


def test_data_beside_other_methods_is_refused():
    with pytest.raises(ConfigError, match="expected it for hldm alone"):
        loop(["kd", hldm("fixed", weights={}, data="all")])


def test_two_methods_with_stages_are_still_refused():
    with pytest.raises(PluginError, match="hook 'stages' is claimed by"):
        loop(["sld", "pddm"])


def test_more_terms_than_slots_are_refused():
    with pytest.raises(ConfigError, match="more than 32 loss terms"):
        weighting.Weighting().slots([f"t{number}" for number in range(33)])


# Real processes.

CONFIG = {
    "task": {"name": "digits", "labelled": 100, "unlabelled": 150, "validation": 60},
    "teacher": {"name": "mlp", "hidden": 24, "train": {"steps": 30}},
    "student": {"name": "mlp", "hidden": 8},
    "methods": ["kd", "fitnets", "hldm"],
    "steps": 40, "batch_size": 16, "log_every": 2, "validate_every": 10, "checkpoint_every": 4, "threads": 1,
}  # fmt: skip


def test_killed_and_taken_up_the_weights_and_their_plot_are_whole(tmp_path, forks):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    log = tmp_path / "log"
    run = lambda out, *more, **faults: forks.run(
        ["run", "run.yaml", f"out={out}", *more], tmp_path, log, **faults
    )
    assert run("whole") == 0, log.read_text()
    die = {"function": "stillhouse.training.loop:Loop._update", "call": 23, "when": "after"}
    assert run("again", die=die) == -signal.SIGKILL, log.read_text()
    assert run("again", "--resume") == 0, log.read_text()
    for name in ("student.safetensors", "weights.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    points = json.loads((tmp_path / "whole" / "weights.json").read_text())
    assert [point["step"] for point in points] == list(range(40))
    assert set(points[0]["weights"]) == {"kd.kl", "kd.ce", "fitnets.hint"}
    assert (tmp_path / "whole" / "weights.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("at", "lifted", "said", "kept"),
    [
        (10, 1e30, r"outputs of the student are not finite in update 11, found in hook 'loss_terms' of plugin 'kd'", 8),
        (10, 1e9, r"hldm: got a loss term that is not finite in update 12: fitnets.hint = inf; the student is as", 12),
        (11, 1e42, r"of student holds NaN or infinity after update 12; the checkpoint of update 8 is kept", 8),
    ],
    ids=["the outputs", "a term", "the weights, where a checkpoint is due"],
)  # fmt: skip
def test_a_run_that_diverges_names_what_did_and_keeps_its_last_good_checkpoint(
    at, lifted, said, kept, cli, tmp_path
):
    """The schedule lifts the learning rate after ``at`` updates; checkpoints are made every 4."""
    schedule = {"name": "StepLR", "step_size": at, "gamma": lifted}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**CONFIG, "scheduler": schedule, "out": "run"}))
    first = cli("run", "run.yaml")
    assert first.code != 0
    assert re.search(said, first.err), first.err
    assert re.search(r"checkpoint( of update 8)? is kept", first.err)
    assert "Traceback" not in first.err
    last = newest(tmp_path / "run" / "checkpoints")
    assert step_of(last) == kept
    assert all(tensor.isfinite().all() for tensor in read(last)["models"]["student"].values())
    assert not (tmp_path / "run" / "student.safetensors").exists()
    assert cli("run", "run.yaml", "--resume").err == first.err, "taken up, it ends alike"


@pytest.mark.parametrize(("steps", "shown"), [(3, [0, 1, 2]), (30, [0, 7, 14, 21, 28]), (8, [0, 2, 4, 6])])
def test_the_plot_has_as_many_points_however_long_the_run(monkeypatch, steps, shown):
    monkeypatch.setattr(method, "POINTS", 4)
    made = loop("hldm", steps=steps)
    made.run()
    rows = made.step.plugins.plugins[0].method.history.rows
    assert [row["step"] for row in rows] == shown
    assert all(row["weights"].keys() == {"hldm.ce", "hldm.kd"} for row in rows)
