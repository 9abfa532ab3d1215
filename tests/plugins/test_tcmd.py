"""TCMD in its stages: what they train, what they lose, how they go on."""

from __future__ import annotations

import json
import signal

import pytest
import torch
import yaml
from resumed import assert_resumes
from several_tasks import SIDE, VARIANTS, multitask_splits, several
from torch import nn
from toys import loop, net, same_bits, splits, watch_ids, weights

from stillhouse.api import StepInfo
from stillhouse_tcmd import (
    TCMD,
    losses,
    partition,
)


def until(made, name: str) -> None:
    """Run to the start of a stage."""
    names = [stage.name for stage in made.step.stages]
    made.run(sum(made.lengths[: names.index(name)]))


# Stages.


@pytest.mark.parametrize("name", VARIANTS)
def test_a_partition_of_classes_goes_through_its_stages(name):
    made = loop(VARIANTS[name])
    before = weights(made.step.teacher)
    made.run()
    assert same_bits(made.step.teacher, before)
    found = [stage.name for stage in made.step.stages]
    tasks = len(made.step.plugins.plugins[0].method.tasks)
    specialise = [f"specialise-{number}" for number in range(tasks)]
    assert found == [*specialise, *(["combine"] if "merged" not in name else []), "refine"]


def test_each_specialise_stage_trains_one_specialist():
    made = several()
    models = made.step.run.models
    for number in range(2):
        before = {name: weights(model) for name, model in models.items()}
        until_end = made.lengths[number]
        made.run(until_end)
        changed = [name for name, model in models.items() if not same_bits(model, before[name])]
        assert changed == [f"tcmd.specialist{number}"]


def test_side_by_side_combine_trains_the_router_alone():
    made = loop(SIDE)
    until(made, "combine")
    before = {name: weights(model) for name, model in made.step.run.models.items()}
    made.run(made.lengths[2])
    changed = {name for name, model in made.step.run.models.items() if not same_bits(model, before[name])}
    assert changed == {"tcmd.router", "tcmd.network"}
    assert all(
        same_bits(made.step.run.models[f"tcmd.specialist{k}"], before[f"tcmd.specialist{k}"]) for k in (0, 1)
    )


def test_with_task_ids_combine_learns_from_the_specialists_and_never_calls_the_teacher():
    made = several()
    before = weights(made.step.teacher)
    until(made, "combine")
    calls = made.step.teacher_calls
    assert calls > 0
    made.run(made.lengths[2])
    assert made.step.teacher_calls == calls
    made.run()
    assert made.step.teacher_calls > calls
    assert same_bits(made.step.teacher, before)


def test_specialists_learn_their_tasks_rows_and_the_unlabelled_ones():
    made, seen = several({"name": "tcmd", "shares": [1, 1, 2]}, steps=120), {}
    watch_ids(made, lambda stage, ids: seen.setdefault(stage, set()).update(ids))
    made.run()
    assert seen["specialise-0"] == {*range(36), *range(48, 80)}
    assert seen["specialise-1"] == {*range(36, 80)}


def test_a_tasks_rows_are_drawn_by_temperature():
    ids = torch.tensor([0] * 1000 + [1] * 100 + [-1] * 7)

    def counts(temperature):
        found = ids[partition.sampled(ids, 2, temperature)]
        return [int((found == k).sum()) for k in (0, 1, -1)]

    assert counts(1.0) == [1000, 100, 7]
    assert counts(1e9) == [1000, 1000, 7]
    assert counts(4 / 3) == [1000, round(1000 * 0.1**0.75), 7]
    assert set(partition.sampled(ids, 2, 2.0).tolist()) == set(range(len(ids))), "no row is lost"


def test_annealing_goes_from_soft_labels_to_labels():
    made = several({"name": "tcmd", "annealing": True}, data=multitask_splits(unlabelled=False), steps=24)
    method = made.step.plugins.plugins[0].method
    batch = made.splits.train.batch(torch.arange(30, 42))
    made.step.progress.begin(made.step.stages[-1])
    made.step.info.stage_steps = 11
    ends = {}
    for index in (0, 5, 10):
        made.step.info.stage_index = index
        loss, terms = made.step(method.network, batch)
        made.step.end_update()
        loss = loss.detach()
        ends[index] = (float(loss), float(terms["tcmd.kd"]), float(terms.get("tcmd.ce", torch.tensor(0.0))))
    assert ends[0][0] == pytest.approx(ends[0][1])
    assert ends[5][0] == pytest.approx(ends[5][1] + 0.5 * ends[5][2])
    assert ends[5][1] == pytest.approx(0.5 * ends[0][1], rel=1e-5)
    assert (ends[10][0], ends[10][1]) == (pytest.approx(ends[10][2]), 0)


def test_a_label_counts_among_its_own_tasks_classes():
    made = several({"name": "tcmd", "alpha": 0.0}, data=multitask_splits(unlabelled=False))
    method = made.step.plugins.plugins[0].method
    made.step.progress.begin(made.step.stages[-1])
    batch = made.splits.train.batch(torch.arange(36, 42))
    _, terms = made.step(method.network, batch)
    logits = made.step.run.student(batch.inputs["inputs"])[:, 3:]
    assert float(terms["tcmd.ce"]) == pytest.approx(
        nn.functional.cross_entropy(logits, batch.labels - 3).item()
    )


def test_rows_of_no_task_learn_from_every_head():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(4, 5, generator=generator) for _ in range(2))
    tasks, ids = [[0, 1, 2], [3, 4]], torch.tensor([0, 1, -1, -1])
    made = losses.by_task(student, teacher, tasks, ids, 2.0)
    heads_ = torch.stack([losses.restricted(student, teacher, own, 2.0) for own in tasks])
    assert torch.allclose(
        made, torch.stack([heads_[0, 0], heads_[1, 1], heads_[:, 2].mean(), heads_[:, 3].mean()])
    )


@pytest.mark.parametrize("name", [*VARIANTS, "several tasks", "no labels"])
def test_a_run_taken_up_in_any_stage_has_the_bits_of_an_unbroken_one(name):
    def make():
        if name == "several tasks":
            return several()
        if name == "no labels":
            return loop("tcmd", data=splits(labels=False))
        return loop(VARIANTS[name])

    assert_resumes(make, range(1, 12, 1 if name == "several tasks" else 3))


def test_a_forgotten_state_is_seen(monkeypatch):
    monkeypatch.setattr("torch.optim.Optimizer.load_state_dict", lambda self, state: None)
    with pytest.raises(AssertionError):
        test_a_run_taken_up_in_any_stage_has_the_bits_of_an_unbroken_one("several tasks")


def test_micro_batches_give_the_same_loss():
    whole, parts = several(batch_size=12), several(batch_size=12, micro_batch_size=5)
    whole.run(), parts.run()
    a, b = whole.step.run.models, parts.step.run.models
    for name in a:
        for key, tensor in a[name].state_dict().items():
            assert torch.allclose(tensor, b[name].state_dict()[key], atol=1e-4), (name, key)


def test_wide_students_targets_and_specialists_of_other_sizes():
    made = loop(VARIANTS["shared"], student=net(4, seed=1), target=net(24, seed=5))
    made.run()
    assert made.step.run.models["tcmd.network"].parts[0] is made.step.run.target
    assert made.step.run.models["tcmd.specialist0"].network[0].out_features == 4


# Real processes.

CONFIG = {
    "task": {"name": "mnist1d-multitask", "digit": 60, "parity": 30, "position": 20, "unlabelled": 40, "validation": 10, "test": 10},
    "teacher": {"name": "cnn", "channels": 8, "width": 8, "train": {"steps": 20}},
    "student": {"name": "mlp", "hidden": 8},
    "method": {"name": "tcmd"},
    "steps": 48, "batch_size": 16, "scheduler": "CosineAnnealingLR", "log_every": 2, "validate_every": 8, "checkpoint_every": 3, "threads": 1,
}  # fmt: skip


ROUTED = {
    "task": {"name": "digits", "labelled": 100, "unlabelled": 150, "validation": 60},
    "teacher": {"name": "mlp", "hidden": 24, "train": {"steps": 30}},
    "student": {"name": "mlp", "hidden": 8},
    "method": {"name": "tcmd", "tasks": 2, "network": "side_by_side"},
    "steps": 48, "batch_size": 16, "scheduler": "CosineAnnealingLR", "log_every": 2, "validate_every": 8, "checkpoint_every": 3, "threads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "kills"),
    # specialise 0, 1, 2, combine, refine; then specialise 0, 1, the router, refine
    [(CONFIG, (2, 6, 11, 20, 40)), (ROUTED, (4, 10, 20, 40))],
    ids=["several tasks", "routed"],
)
def test_killed_in_every_stage_and_taken_up(config, kills, tmp_path, forks):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    log = tmp_path / "log"
    run = lambda out, *more, **faults: forks.run(
        ["run", "run.yaml", f"out={out}", *more], tmp_path, log, **faults
    )
    assert run("whole") == 0, log.read_text()
    for update in kills:
        die = {"function": "stillhouse.training.loop:Loop._update", "call": update, "when": "after"}
        assert run(f"at{update}", die=die) == -signal.SIGKILL, log.read_text()
        assert run(f"at{update}", "--resume") == 0, log.read_text()
        for name in ("student.safetensors", "tasks.json"):
            assert (tmp_path / f"at{update}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    entries = json.loads((tmp_path / "whole" / "tasks.json").read_text())["validation"]
    if config is CONFIG:
        assert [entry["rows"] for entry in entries] == [10, 10, 10]
    assert all(("router" in entry) is (config is ROUTED) for entry in entries), (
        "with task ids nothing is routed"
    )


def test_settings_are_explained_and_bounded():
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        TCMD.Config(sampling_temperature=0.5)
    assert StepInfo().share == 1.0
