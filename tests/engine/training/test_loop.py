"""The reference loop: what a loop by hand gives, stages, two loops in one process, state that goes on."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from torch.utils.data import TensorDataset

from stillhouse.api import Auxiliary, LossTerm, Method, Stage, hookimpl
from stillhouse.contract.datasets import DatasetSplit
from stillhouse.contract.splits import Splits, TensorSplit
from stillhouse.training.labels import keep
from stillhouse.training.loop import micro_batches
from stillhouse.training.order import Order
from stillhouse.training.stages import stage_lengths

SLD = {"name": "sld", "shares": (1, 1, 1)}


def by_hand(steps: int, *, clip: float | None = None, lr: float = 1e-3, seed: int = 0) -> nn.Module:
    """Cross-entropy with AdamW, as anyone would write it."""
    student, data = toys.net(8, seed=1), toys.splits().train
    order = Order(len(data), 8, seed, 0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        index = order.batch(step)
        # The mean as the engine takes it: over the rows of the whole update.
        loss = F.cross_entropy(student(data.inputs[index]), data.labels[index], reduction="sum") / 8
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(student.parameters(), clip)
        optimizer.step()
        schedule.step()
    return student


@pytest.mark.parametrize("clip", [None, 0.1])
def test_gives_the_bits_of_a_loop_written_by_hand(clip):
    ours = toys.loop("hard_labels", steps=200, clip=clip, scheduler="CosineAnnealingLR")
    assert ours.run()
    assert toys.same_bits(ours.model, by_hand(200, clip=clip))
    assert not toys.same_bits(by_hand(200), by_hand(200, clip=0.1)), "clipping acts here"


def test_clipping_bounds_the_whole_gradient():
    seen = []

    class Looks(toys.Squares):
        @hookimpl
        def auxiliary_modules(self, run):
            return {"head": nn.Linear(toys.CLASSES, 3)}

        @hookimpl
        def on_run_start(self, run):
            self.run = run

        @hookimpl
        def loss_terms(self, student_out, info):
            out = self.run.models["looks.head"](student_out.logits)
            return {"x": LossTerm(1e3 * info.mean(out.square().mean(-1)))}

    loop = toys.loop(Looks(), clip=0.5, steps=3)
    loop._enter()
    step = loop.optimizer.step

    def looked(*args, **kwargs):
        grads = [p.grad.flatten() for group in loop.optimizer.param_groups for p in group["params"]]
        seen.append(torch.cat(grads).norm().item())
        return step(*args, **kwargs)

    loop.optimizer.step = looked
    loop.run()
    assert seen == pytest.approx([0.5] * 3, rel=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    a, b, c = (toys.loop("kd", seed=seed, student=toys.net(seed=1, dropout=0.5)) for seed in (3, 3, 4))
    for loop in (a, b, c):
        loop.run()
    assert toys.same_bits(a.model, b.model)
    assert not toys.same_bits(a.model, c.model)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("method", ["hard_labels", "kd", SLD], ids=str)
def test_two_loops_taking_turns_give_what_each_gives_alone(method, dropout):
    def make(seed: int):
        return toys.loop(method, seed=seed, student=toys.net(seed=seed, dropout=dropout), keep=keep, steps=15)

    alone = [make(seed) for seed in (1, 2)]
    for loop in alone:
        loop.run()
    turns = [make(seed) for seed in (1, 2)]
    done = [False, False]
    while not all(done):
        done = [loop.run(1) for loop in turns]
        torch.rand(3), np.random.rand(3), random.random()
    for one, other in zip(alone, turns, strict=True):
        assert toys.same_bits(one.model, other.model)


def test_the_global_generators_are_the_callers_own():
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(2), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    toys.loop("kd", student=toys.net(dropout=0.5)).run()
    got = torch.rand(2), np.random.rand(), random.random()
    assert torch.equal(got[0], expected[0])
    assert got[1:] == expected[1:]


@pytest.mark.parametrize("size", [None, 8, 3, 1])
def test_micro_batches_train_the_same_student(size):
    loops = [toys.loop("kd", micro_batch_size=given, steps=20) for given in (None, size)]
    for loop in loops:
        loop.run()
    for mine, its in zip(loops[0].model.parameters(), loops[1].model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)
    logged = [loop.watcher.metrics[0]["kd.kl"] for loop in loops]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_micro_batches_cover_the_batch():
    batch = toys.splits().train.batch(torch.arange(10))
    parts = micro_batches(batch, 4)
    assert [len(part) for part in parts] == [3, 4, 3], "as even as can be"
    assert torch.cat([part.ids for part in parts]).tolist() == list(range(10))


def test_bf16_trains_float32_weights():
    loop = toys.loop("kd", precision="bf16", steps=30, optimizer={"lr": 1e-2})
    seen = []
    loop.model = loop.step.model()
    loop.step.run.student[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    loop.run()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in loop.model.parameters()} == {torch.float32}
    assert loop.watcher.metrics[-1]["loss"] < loop.watcher.metrics[0]["loss"]


class TestStages:
    @pytest.mark.parametrize(
        ("shares", "steps", "lengths"),
        [
            ((1, 6, 2), 9000, [1000, 6000, 2000]),
            ((1, 1, 1), 10, [3, 4, 3]),
            ((0, 1), 5, [0, 5]),
            ((1, 1, 1), 1, [0, 1, 0]),
        ],
    )
    def test_share_the_updates_out_to_the_last_one(self, shares, steps, lengths):
        got = stage_lengths([Stage(str(n), share) for n, share in enumerate(shares)], steps)
        assert sum(got) == steps
        assert got == lengths

    def test_one_with_a_length_of_its_own_is_on_top(self):
        assert stage_lengths([Stage("a"), Stage("b", steps=7), Stage("c")], 10) == [5, 7, 5]

    def test_start_and_end_once_each_and_steps_are_counted_on(self):
        told = []

        class Tells(toys.Squares):
            @hookimpl
            def stages(self, run):
                return [Stage("a", teacher=None), Stage("b", teacher=None)]

            @hookimpl
            def on_stage_start(self, stage):
                told.append(f"start {stage.name}")

            @hookimpl
            def on_update_end(self, info, metrics):
                told.append((info.index, info.stage_index, info.stage_steps, info.stage.name))

            @hookimpl
            def on_stage_end(self, stage):
                told.append(f"end {stage.name}")

        toys.loop(Tells(), steps=4).run()
        assert told == [
            "start a", (0, 0, 2, "a"), (1, 1, 2, "a"), "end a",
            "start b", (2, 0, 2, "b"), (3, 1, 2, "b"), "end b",
        ]  # fmt: skip

    def test_one_schedule_spans_stages_that_train_the_same(self):
        seen = []
        loop = toys.loop(SLD, steps=9, scheduler="LinearLR", optimizer={"lr": 1.0, "name": "SGD"}, keep=keep)
        loop.watcher.updated = lambda loop, metrics: seen.append(loop.optimizer.param_groups[0]["lr"])
        loop.run()
        expected = [1 / 3 + (2 / 3) * done / 9 for done in range(1, 10)]
        assert seen == pytest.approx(expected)

    def test_another_target_gets_an_optimizer_and_a_schedule_of_its_own(self):
        seen = []
        loop = toys.loop(
            SLD,
            steps=9,
            target=toys.net(12, seed=5),
            scheduler="LinearLR",
            optimizer={"name": "SGD", "lr": 1.0},
        )
        loop.watcher.updated = lambda loop, metrics: seen.append(loop.optimizer.param_groups[0]["lr"])
        loop.run()
        assert seen[:6] == pytest.approx([1 / 3 + (2 / 3) * done / 6 for done in range(1, 7)])
        assert seen[6:] == pytest.approx([1 / 3 + (2 / 3) * done / 3 for done in range(1, 4)])

    def test_only_what_a_stage_trains_changes(self):
        loop = toys.loop(SLD, steps=9, target=toys.net(12, seed=5), keep=keep)
        student, target = loop.step.run.student, loop.step.run.target
        start = toys.weights(target)
        loop.run(6)
        assert toys.same_bits(start, target)
        middle = toys.weights(student)
        loop.run()
        assert toys.same_bits(middle, student)
        assert not toys.same_bits(start, target)


class TestAuxiliary:
    class Projects(Method):
        """Matches features through a projector."""

        api_version = 1

        @hookimpl
        def on_run_start(self, run):
            run.capture("student", "1")
            run.capture("teacher", "1")
            self.run = run

        @hookimpl
        def auxiliary_modules(self, run):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return {"map": Auxiliary(nn.Linear(8, 16), {"lr": 0.5, "weight_decay": 0.0})}

        @hookimpl
        def loss_terms(self, student_out, teacher_out, info):
            mapped = self.run.models["projects.map"](student_out.features["1"])
            return {"match": LossTerm(info.mean((mapped - teacher_out.features["1"]).square().mean(-1)))}

    def test_gets_an_optimizer_group_with_options_of_its_own(self):
        loop = toys.loop(self.Projects())
        before = toys.weights(loop.step.run.models["projects.map"])
        loop.run(1)
        groups = loop.optimizer.param_groups
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.01), (0.5, 0.0)]
        assert not toys.same_bits(before, loop.step.run.models["projects.map"])

    def test_travels_in_the_state(self):
        assert set(toys.loop(self.Projects()).state_dict()["models"]) == {"student", "projects.map"}


def test_a_parameter_shared_by_two_modules_is_updated_once():
    student = toys.net(seed=1)

    class Shares(toys.Squares):
        @hookimpl
        def auxiliary_modules(self, run):
            return {"again": run.student}

    plain, shared = toys.loop(toys.Squares(), student=toys.net(seed=1)), toys.loop(Shares(), student=student)
    for loop in (plain, shared):
        loop.run()
    assert toys.same_bits(plain.model, shared.model)


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def augmented(data: Splits) -> Splits:
    """The same rows through Datasets: not fixed, so nothing is kept by id."""
    pairs = DatasetSplit(TensorDataset(data.train.inputs, data.train.labels))
    return Splits(train=pairs, unlabelled=DatasetSplit(TensorDataset(data.unlabelled.inputs), labelled=False))


CASES = {
    "hard labels": {"method": "hard_labels"},
    "kd": {"method": "kd"},
    "kd, labels not kept": {"method": "kd", "cache_teacher": False},
    "sld": {"method": SLD},
    "sld, actual labels": {"method": {**SLD, "labels": "actual"}},
    "sld, target": {"method": SLD, "target": True},
    "sld, target, scheduled": {"method": SLD, "target": True, "scheduler": "CosineAnnealingLR"},
    "sld, top per class": {"method": {**SLD, "top_per_class": 3}},
    "sld, rows that are never twice the same": {"method": SLD, "data": augmented},
    "projector": {"method": TestAuxiliary.Projects},
}


@pytest.mark.parametrize("case", CASES)
def test_goes_on_from_any_update_bit_for_bit(case, tmp_path):
    """Every update of every stage, in a new loop over new models, through a file."""

    def make(folder: str):
        given = dict(CASES[case])
        method = given.pop("method")
        target = toys.net(12, seed=5, dropout=0.3) if given.pop("target", False) else None
        data = given.pop("data", lambda data: data)(toys.splits())
        return toys.loop(
            method() if isinstance(method, type) else method,
            student=toys.net(seed=1, dropout=0.3),
            target=target,
            data=data,
            keep=lambda loop, split, _: keep(loop, split, tmp_path / folder),
            steps=9,
            **{"scheduler": "CosineAnnealingLR", **given},
        )

    unbroken = make("whole")
    states = []
    while not unbroken.run(1):
        states.append(through_a_file(unbroken.state_dict()))
    ended = states.copy()
    last = unbroken.step.run.models
    for number, state in enumerate(ended):
        again = make("whole")
        again.load_state_dict(state)
        assert again.step.teacher_calls == state["teacher_calls"], "what was called before the file counts"
        again.run()
        for name, model in again.step.run.models.items():
            assert toys.same_bits(last[name], model), f"{name}, from update {number + 1}"
        assert again.watcher.metrics == unbroken.watcher.metrics[number + 1 :]


def test_the_state_holds_nothing_of_the_teacher():
    teacher = toys.net(16, seed=2)
    loop = toys.loop(SLD, teacher=teacher, keep=keep)
    loop.run(7)
    state = loop.state_dict()
    assert set(state["models"]) == {"student"}
    shapes = {tuple(tensor.shape) for tensor in teacher.state_dict().values()}

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from tensors(item)
        elif isinstance(value, list | tuple):
            for item in value:
                yield from tensors(item)

    own = {tuple(tensor.shape) for tensor in toys.net(8).state_dict().values()}
    assert not {tuple(tensor.shape) for tensor in tensors(state)} & (shapes - own)


def test_a_stage_trains_on_the_rows_that_a_method_chose():
    used = []

    class Chooses(toys.Squares):
        @hookimpl
        def stage_rows(self, stage, split):
            return torch.tensor([3, 5, 5, 40])

    loop = toys.loop(Chooses(), steps=30)
    toys.watch_ids(loop, lambda stage, ids: used.extend(ids))
    loop.run()
    assert [used.count(row) for row in (3, 5, 40)] == [60, 120, 60], "twice named, twice as often"
    assert len(used) == 240


def test_a_method_that_updates_the_student_itself_replaces_ours():
    class Updates(toys.Squares):
        requires = frozenset({"student_update"})

        @hookimpl
        def student_update(self, student, optimizer, loss, info):
            loss.backward()
            if info.last:
                with torch.no_grad():
                    for parameter in student.parameters():
                        parameter.sub_(0.1 * parameter.grad)
                optimizer.zero_grad()
            return True

    ours = toys.loop(Updates(), micro_batch_size=3, steps=5)
    plain = toys.loop(
        toys.Squares(), steps=5, micro_batch_size=3, optimizer={"name": "SGD", "lr": 0.1, "weight_decay": 0}
    )
    for loop in (ours, plain):
        loop.run()
    for mine, its in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_a_batch_may_be_larger_than_the_split():
    x, y = toys.rows(5)
    loop = toys.loop("kd", data=Splits(TensorSplit(x, y)), batch_size=12)
    loop.run()
    assert loop.at.step == 12
