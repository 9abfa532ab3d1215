"""TCMD's combined network, its tasks, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from several_tasks import HALVES, MERGE, SIDE, VARIANTS, heads, multitask_splits, several
from toys import CLASSES, loop, net, rows, same_bits

from stillhouse.api import ConfigError, DataError, Splits, TensorSplit
from stillhouse_tcmd import (
    CombinedNetwork,
    Router,
    SeveralTeachers,
    Specialist,
    partition,
)

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
