from __future__ import annotations

import json
import signal

import pytest
import torch
import yaml
from resumed import assert_resumes
from torch import nn
from toys import CLASSES, loop, net, rows, same_bits, splits, weights

from stillhouse.api import ConfigError, DataError, Splits, StepInfo, TensorSplit
from stillhouse_tasks.multihead import MultiHead
from stillhouse_tcmd import (
    TCMD,
    CombinedNetwork,
    Router,
    SeveralTeachers,
    Specialist,
    losses,
    partition,
)

HALVES = [[0, 2], [1, 3]]
SIDE = {"name": "tcmd", "tasks": HALVES, "network": "side_by_side"}
MERGE = {"name": "tcmd", "tasks": [[0, 1, 2], [2, 3]], "network": "side_by_side", "gate": "merge"}
VARIANTS = {
    "shared": {"name": "tcmd", "tasks": HALVES},
    "found": {"name": "tcmd", "tasks": 2},
    "side by side, routed": SIDE,
    "side by side, merged": MERGE,
}


def heads(seed: int = 0, hidden: int = 8) -> MultiHead:
    """A trunk with two heads, of 3 and 2 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MultiHead(nn.Sequential(nn.Linear(6, hidden), nn.ReLU()), hidden, [3, 2])


def multitask_splits(ids=None, *, unlabelled: bool = True) -> Splits:
    """Rows of two tasks, 36 and 12, with labels of their own, and rows of none."""
    x, y = rows(48, 1)
    task = torch.tensor([0] * 36 + [1] * 12) if ids is None else ids
    labels = torch.where(task == 1, 3 + y % 2, y % 3)
    other, nothing = rows(32, 4)[0], torch.full((32,), -1)
    return Splits(
        train=TensorSplit({"inputs": x, "task": task}, labels, extra={"task": task}),
        validation=TensorSplit({"inputs": x, "task": task}, labels, extra={"task": task}),
        unlabelled=TensorSplit({"inputs": other, "task": nothing}, extra={"task": nothing})
        if unlabelled
        else None,
    )


def several(method="tcmd", **more):
    """A loop on two true tasks."""
    more = {"data": multitask_splits(), "student": heads(1, 5), "teacher": heads(2, 12)} | more
    return loop(method, **more)


def until(made, name: str) -> None:
    """Run to the start of a stage."""
    names = [stage.name for stage in made.step.stages]
    made.run(sum(made.lengths[: names.index(name)]))


# The networks.


def test_the_combined_network_saves_loads_and_runs_without_a_loop(tmp_path):
    for name, method in VARIANTS.items():
        made = loop(method)
        made.run()
        network = made.step.run.models["tcmd.network"]
        made.step.close()
        torch.save(network, tmp_path / "whole.pt")
        loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
        assert torch.equal(loaded(rows(5)[0]), network(rows(5)[0])), name
    parts = [Specialist(net(8, seed=9), own, CLASSES) for own in HALVES]
    routed = loop(SIDE)
    routed.run()
    trained = routed.step.run.models["tcmd.network"]
    empty = CombinedNetwork(parts, HALVES, CLASSES, router=Router(net(8, seed=9), HALVES))
    empty.load_state_dict(trained.state_dict())
    assert torch.equal(empty(rows(5)[0]), trained(rows(5)[0]))


def test_the_shared_network_is_the_students_own_weights():
    made = several()
    made.run()
    assert same_bits(made.step.run.models["tcmd.network"].parts[0], made.step.run.student)


def test_a_row_keeps_its_tasks_classes_alone():
    network = CombinedNetwork([net(8)], HALVES, CLASSES)
    x = rows(3)[0]
    made = network(x, task=torch.tensor([0, 1, -1])).softmax(-1)
    assert made[0, HALVES[1]].sum() == 0
    assert made[1, HALVES[0]].sum() == 0
    assert torch.equal(made[2], network(x).softmax(-1)[2])


def test_specialists_side_by_side_need_something_to_route_with():
    parts = [Specialist(net(8), own, CLASSES) for own in HALVES]
    with pytest.raises(ConfigError, match="no task for some rows, and no router; give task ids, or a router"):
        CombinedNetwork(parts, HALVES, CLASSES)(rows(3)[0])
    with pytest.raises(ConfigError, match="got 2 networks for 3 tasks; expected one, or one for each"):
        CombinedNetwork(parts, [[0], [1], [2]], CLASSES)
    with pytest.raises(ConfigError, match="gave 3 outputs; expected 4"):
        Specialist(net(8, outputs=3), [0, 1], CLASSES)(rows(3)[0])


def test_several_teachers_stand_as_one():
    teachers = SeveralTeachers([net(8, seed=3, outputs=3), net(9, seed=4, outputs=2)], [3, 2])
    assert teachers.tasks == [[0, 1, 2], [3, 4]]
    made = several(teacher=teachers)
    made.run()
    x = rows(4)[0]
    assert torch.equal(teachers(x)[:, 3:], teachers.teachers[1](x))
    with pytest.raises(DataError, match="task id 2 in row 1"):
        teachers(x, task=torch.tensor([0, 2, 0, 0]))


def test_teachers_that_share_classes_are_merged():
    parts = [
        Specialist(net(8, seed=3, outputs=3), [0, 1, 2], 4),
        Specialist(net(9, seed=4, outputs=2), [2, 3], 4),
    ]
    teacher = CombinedNetwork(parts, [[0, 1, 2], [2, 3]], 4, merge=True)
    made = loop(MERGE, teacher=teacher)
    assert made.run()


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
    made = several()
    made.run(1)
    assert sorted(made.rows.tolist()) == [*range(36), *range(48, 80)]
    made.run(made.lengths[0] - 1)
    assert made.step.info.stage.name == "specialise-1"
    assert sorted(made.rows.tolist()) == [*range(36, 80)]


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
    made.step.begin(made.step.stages[-1], 11)
    ends = {}
    for index in (0, 5, 10):
        made.step.info.stage_index = index
        loss, terms = made.step(method.network, batch)
        loss = loss.detach()
        ends[index] = (float(loss), float(terms["tcmd.kd"]), float(terms.get("tcmd.ce", torch.tensor(0.0))))
    assert ends[0][0] == pytest.approx(ends[0][1])
    assert ends[5][0] == pytest.approx(ends[5][1] + 0.5 * ends[5][2])
    assert ends[5][1] == pytest.approx(0.5 * ends[0][1], rel=1e-5)
    assert (ends[10][0], ends[10][1]) == (pytest.approx(ends[10][2]), 0)


def test_a_label_counts_among_its_own_tasks_classes():
    made = several({"name": "tcmd", "alpha": 0.0}, data=multitask_splits(unlabelled=False))
    method = made.step.plugins.plugins[0].method
    made.step.begin(made.step.stages[-1])
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
    monkeypatch.setattr("stillhouse.loop.Loop._restore_optimizer", lambda self, state: None)
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


# Tasks.


def test_classes_that_are_confused_make_a_task():
    confused = torch.full((6, 6), 0.01) + 0.9 * torch.eye(6)
    for a, b in ((0, 4), (1, 5), (2, 3)):
        confused[a, b] = 0.2
    assert partition.cluster(confused, 3) == [[0, 4], [1, 5], [2, 3]]
    assert partition.cluster(confused, 1) == [[0, 1, 2, 3, 4, 5]]
    confused[2, 3], confused[2, 1] = 0.01, 0.05
    confused[3, 0] = 0.05
    assert partition.cluster(confused, 4) == [[0, 3, 4], [1, 2, 5]], "2 and 3 do not stand alone"
    with pytest.raises(ConfigError, match="got 7 tasks for 6 classes; expected 1 to 6"):
        partition.cluster(confused, 7)


def test_confusion_counts_by_label_where_there_is_one():
    probabilities = torch.tensor([[0.6, 0.4], [0.2, 0.8]])
    assert torch.allclose(partition.confusion(probabilities, None), probabilities)
    by_label = partition.confusion(probabilities, torch.tensor([1, -100]))
    assert torch.allclose(by_label[1], torch.tensor([0.4, 0.6]))


def test_what_was_found_is_kept_and_said():
    made = loop(VARIANTS["found"])
    chosen = made.step.run.chosen["tcmd.tasks"]
    assert partition.check(chosen["value"], CLASSES) == chosen["value"]
    state = made.state_dict()
    state["plugins"]["tcmd"]["tasks"] = [[0], [1, 2, 3]]
    with pytest.raises(ConfigError, match="give them in the config"):
        loop(VARIANTS["found"]).load_state_dict(state)


# Bad input.

BAD = {
    "a class is missing": ({"tasks": [[0, 1], [2]]}, r"no task has class \[3\]; expected each of the 4 classes in one"),
    "a class is repeated": ({"tasks": [[0, 1], [1, 2, 3]]}, "class 1 stands in task 0 and in task 1; expected each class once"),
    "a class is twice in one": ({"tasks": [[0, 0, 1], [2, 3]]}, "class 0 stands in task 0 and in task 0"),
    "no such class": ({"tasks": [[0, 1], [2, 3, 4]]}, "task 1 has class 4; expected 0 to 3"),
    "an empty task": ({"tasks": [[0, 1, 2, 3], []]}, "task 1 is empty; expected at least one class in each"),
    "merged, and disjoint": (SIDE | {"gate": "merge"}, "tasks that do not overlap.*use gate: router"),
    "merged, and shared": ({"gate": "merge", "tasks": [[0, 1, 2], [2, 3]]}, "expected network: side_by_side"),
    "merged, and not listed": ({"gate": "merge", "network": "side_by_side"}, "expected tasks: lists that share classes"),
    "more tasks than classes": ({"tasks": 5}, "got 5 tasks for 4 classes"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_tasks_that_make_no_sense_are_refused_before_training(what):
    settings, message = BAD[what]
    with pytest.raises(ConfigError, match=message):
        loop({"name": "tcmd", **settings})


@pytest.mark.parametrize("wrong", [2, -2])
def test_a_task_id_out_of_range_is_refused_before_training(wrong):
    ids = torch.tensor([0] * 36 + [1] * 12)
    ids[40] = wrong
    data = multitask_splits()
    data.train.extra = {"task": ids}
    with pytest.raises(
        DataError, match=rf"the train split: task id {wrong} in row 40; expected 0 to 1, or -1"
    ):
        several(data=data)
    with pytest.raises(DataError, match=f"task id {wrong} in row 0"):
        CombinedNetwork([net(8)], HALVES, CLASSES)(rows(1)[0], task=torch.tensor([wrong]))


def test_tasks_that_nothing_tells_are_asked_for():
    teacher = heads(2, 12)
    del teacher.tasks
    teacher.forward = lambda inputs, task=None: torch.cat(
        [head(teacher.trunk(inputs)) for head in teacher.heads], -1
    )
    with pytest.raises(ConfigError, match="expected a list of classes for each task, or a teacher with"):
        several(teacher=teacher)
    assert several({"name": "tcmd", "tasks": [[0, 1, 2], [3, 4]]}, teacher=teacher).run()


def test_a_task_without_rows_is_refused():
    data = multitask_splits(torch.zeros(48, dtype=torch.long), unlabelled=False)
    with pytest.raises(ConfigError, match="task 1 has no row in the labelled data"):
        several(data=data).run()


def test_regression_is_refused():
    x, _ = rows(16)
    data = Splits(TensorSplit(x, torch.randn(16, 1)))
    with pytest.raises(ConfigError, match="regression"):
        loop("tcmd", data=data, student=net(4, outputs=1), teacher=net(8, outputs=1))


# Real processes.

CONFIG = {
    "task": {"name": "mnist1d-multitask", "digit": 60, "parity": 30, "position": 20, "unlabelled": 40, "validation": 10, "test": 10},
    "teacher": {"name": "cnn", "channels": 8, "width": 8, "train": {"steps": 20}},
    "student": {"name": "mlp", "hidden": 8},
    "method": {"name": "tcmd"},
    "steps": 48, "batch_size": 16, "scheduler": "CosineAnnealingLR", "log_every": 2, "validate_every": 8, "checkpoint_every": 3, "threads": 1,
}  # fmt: skip


def test_killed_in_every_stage_and_taken_up(tmp_path, forks):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    log = tmp_path / "log"
    run = lambda out, *more, **faults: forks.run(
        ["run", "run.yaml", f"out={out}", *more], tmp_path, log, **faults
    )
    assert run("whole") == 0, log.read_text()
    for update in (2, 6, 11, 20, 40):  # specialise 0, 1, 2, combine, refine
        die = {"function": "stillhouse.loop:Loop._update", "call": update, "when": "after"}
        assert run(f"at{update}", die=die) == -signal.SIGKILL, log.read_text()
        assert run(f"at{update}", "--resume") == 0, log.read_text()
        for name in ("student.safetensors", "tasks.json"):
            assert (tmp_path / f"at{update}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    entries = json.loads((tmp_path / "whole" / "tasks.json").read_text())["validation"]
    assert [entry["rows"] for entry in entries] == [10, 10, 10]
    assert all("router" not in entry for entry in entries), "with task ids nothing is routed"


def test_settings_are_explained_and_bounded():
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        TCMD.Config(sampling_temperature=0.5)
    assert StepInfo().share == 1.0
