from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import CLASSES, loop, net, rows

from stillhouse.kernels import softmax_kl
from stillhouse_tcmd import CombinedNetwork, Router, Specialist, losses, networks, report

HALVES = [[0, 2], [1, 3]]
SIDE = {"name": "tcmd", "tasks": HALVES, "network": "side_by_side"}


class Call(nn.Module):
    """A network that gives what it is given."""

    def forward(self, x):
        return x


# Known answers.


def teachers_own(logits, tasks, *, merge=False):
    """The combination with the teacher's conditionals as specialists and its marginals as router."""
    parts = [Specialist(Call(), own, logits.shape[-1]) for own in tasks]
    router = None if merge else Router(Call(), tasks)
    return CombinedNetwork(parts, tasks, logits.shape[-1], router=router, merge=merge)(logits).softmax(-1)


@pytest.mark.parametrize("tasks", [[[0, 1], [2, 3], [4]], [[0, 3], [1, 4], [2]], [[0, 1, 2, 3, 4]]])
def test_with_the_teachers_marginals_and_conditionals_the_combination_is_the_teacher(tasks):
    logits = 5 * torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(teachers_own(logits, tasks), logits.softmax(-1), atol=1e-6)


def test_so_it_is_for_tasks_that_overlap_and_are_merged():
    logits = 2 * torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    made = teachers_own(logits, [[0, 1, 2], [2, 3], [3, 4, 0]], merge=True)
    assert torch.allclose(made, logits.softmax(-1), atol=1e-5)


def test_a_broken_router_or_merge_is_seen(monkeypatch):
    monkeypatch.setattr(Router, "forward", lambda self, x: torch.zeros(len(x), len(self.tasks)))
    with pytest.raises(AssertionError):
        test_with_the_teachers_marginals_and_conditionals_the_combination_is_the_teacher(
            [[0, 1], [2, 3], [4]]
        )
    sound = networks.merging
    monkeypatch.setattr(networks, "merging", lambda *given: sound(*given).roll(1, 1))
    with pytest.raises(AssertionError):
        test_so_it_is_for_tasks_that_overlap_and_are_merged()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_specialists_losses_and_the_routers_sum_to_kd(temperature):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(32, 5, generator=generator) for _ in range(2))
    tasks = [[0, 3], [1, 2, 4]]
    pi = losses.task_weights(teacher, tasks, temperature)
    parts = [pi[:, k] * losses.restricted(student, teacher, own, temperature) for k, own in enumerate(tasks)]
    total = sum(parts) + losses.routing(student, teacher, tasks, temperature)
    assert torch.allclose(total, losses.whole(student, teacher, temperature), rtol=1e-4, atol=1e-5)


def test_a_wrong_weight_is_seen(monkeypatch):
    sound = losses.task_weights
    monkeypatch.setattr(losses, "task_weights", lambda *given: sound(*given[:2], 1.0))
    with pytest.raises(AssertionError):
        test_the_specialists_losses_and_the_routers_sum_to_kd(4.0)


@pytest.mark.parametrize("network", ["shared", "side_by_side"])
def test_one_task_reduces_to_kd(network):
    method = {"name": "tcmd", "tasks": [list(range(CLASSES))], "network": network, "alpha": 1.0}
    made = loop(method, teacher=net(16, seed=2))
    batch, step = made.splits.train.batch(torch.arange(8)), made.step
    for stage in step.stages:
        step.progress.begin(stage)
        model = step.model(stage)
        loss, _ = step(model, batch)
        reference = step.run.models["tcmd.specialist0"] if stage.teacher is None else step.teacher
        if stage.name == "combine" and network == "shared":
            reference = step.run.models["tcmd.specialist0"]
        kd = softmax_kl(model(batch.inputs), reference(batch.inputs).detach(), temperature=4.0)
        assert loss.item() == pytest.approx(kd.item(), rel=1e-5), stage.name


def test_one_task_with_a_forgotten_temperature_is_seen(monkeypatch):
    sound = losses.whole
    monkeypatch.setattr(losses, "whole", lambda s, t, temperature, mask=None: sound(s, t, 1.0, mask))
    with pytest.raises(AssertionError):
        test_one_task_reduces_to_kd("shared")


def test_a_router_cannot_leak():
    """What is routed is made from a row's inputs alone; the scores with the task given stand apart."""
    made = loop(SIDE)
    made.run()
    network = made.step.run.models["tcmd.network"]
    x, y = rows(64, 7)
    with torch.no_grad():
        logits = network(x)
        alone = torch.cat([network(row[None]) for row in x])
        told = network(x, task=torch.isin(y, torch.tensor(HALVES[1])).long())
    torch.testing.assert_close(alone, logits, msg="a row's answer holds something of its neighbours'")
    assert not torch.equal(told.argmax(-1), logits.argmax(-1)), "some rows are routed wrongly here"
    for entry in report.scores(logits, y, HALVES, exclusive=True):
        mine = torch.isin(y, torch.tensor(entry["classes"]))
        assert entry["given"] == pytest.approx(float((told.argmax(-1) == y)[mine].float().mean()))
        assert entry["routed"] == pytest.approx(float((logits.argmax(-1) == y)[mine].float().mean()))
        assert entry["routed"] <= min(entry["given"], entry["router"])


def test_scores_given_and_routed_are_told_apart():
    logits, y = torch.tensor([[0.0, 5.0, 1.0, 0.0]]), torch.tensor([2])
    entry = report.scores(logits, y, HALVES, exclusive=True)[0]
    assert (entry["given"], entry["routed"], entry["router"]) == (1.0, 0.0, 0.0)


def test_a_router_that_leaks_is_seen(monkeypatch):
    sound = Router.forward
    with monkeypatch.context() as patch:
        patch.setattr(Router, "forward", lambda self, x: sound(self, x - x.mean(0)))
        with pytest.raises(AssertionError, match="neighbours"):
            test_a_router_cannot_leak()
    scores = report.scores

    def told(*given, **more):
        return [entry | {"routed": entry.get("given"), "router": 1.0} for entry in scores(*given, **more)]

    monkeypatch.setattr(report, "scores", told)
    for answer in (test_a_router_cannot_leak, test_scores_given_and_routed_are_told_apart):
        with pytest.raises(AssertionError):
            answer()
