"""DistillStep: (student, batch) -> (loss, metrics), and what it refuses before the first step."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn

from stillhouse.api import IGNORE, Batch, LossTerm, Method, Stage, StepInfo, TeacherOut, hookimpl
from stillhouse.errors import ConfigError, DataError, PluginError
from stillhouse.training.compatibility import OFFERED
from stillhouse.training.loop import micro_batches
from stillhouse.training.step import DistillStep

METHODS = [
    "hard_labels",
    "kd",
    {"name": "kd", "alpha": 0.0},
    {"name": "kd", "alpha": 1.0, "temperature": 1.0},
    "sld",
    {"name": "sld", "labels": "hard"},
    {"name": "sld", "labels": "actual"},
]


def step_of(method, student, teacher=None, **given) -> DistillStep:
    teacher = teacher if teacher is not None else toys.net(16, seed=2)
    if method == "hard_labels":
        teacher = None
    return DistillStep(
        method, student=student, teacher=teacher, **{"probe": toys.rows(4), "steps": 9, **given}
    )


def gradient(method, batch: Batch, parts: int | list[int], stage: int, *, bf16: bool = False) -> torch.Tensor:
    """The update's whole gradient when it is made in ``parts`` micro-batches, or in some of these sizes."""
    student = toys.net(seed=1)
    step = step_of(method, student)
    step.begin(step.stages[min(stage, len(step.stages) - 1)])
    with torch.no_grad():  # away from the copy that stands in for the teacher in a later stage
        for parameter in student.parameters():
            parameter.add_(0.3 * parameter.flip(0))
    if isinstance(parts, list):
        ends = [0, *itertools.accumulate(parts)]
        assert ends[-1] == len(batch)
        micro = [batch.part(slice(*bounds)) for bounds in itertools.pairwise(ends)]
    else:
        micro = micro_batches(batch, -(-len(batch) // parts))
        assert len(micro) == parts
    step.begin_update(micro)
    for part in micro:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = step(student, part)
        loss.backward()
    return torch.cat([p.grad.flatten() for p in student.parameters()])


def batches() -> dict[str, Batch]:
    x, y = toys.rows(16, 7)
    some = torch.where(torch.arange(16) % 3 == 0, IGNORE, y)
    late = torch.where(torch.arange(16) >= 4, IGNORE, y)  # some micro-batches hold no label at all
    mask = torch.arange(16) % 5 != 1
    last = torch.arange(16) >= 12  # three micro-batches of four are masked altogether
    return {
        "every row has a label": Batch(x, y),
        "some rows have no label": Batch(x, some),
        "labels in the first micro-batch alone": Batch(x, late),
        "some rows are masked": Batch(x, y, mask=mask),
        "whole micro-batches are masked": Batch(x, y, mask=last),
        "masked and unlabelled": Batch(x, some, mask=mask),
    }


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("rows", batches())
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_gradient_does_not_depend_on_how_the_update_is_split(method, rows, stage):
    whole, *parts = (gradient(method, batches()[rows], count, stage) for count in (1, 2, 4))
    assert whole.norm() > 0.01
    for part in parts:
        assert (part - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("sizes", [[1, 15], [11, 5], [2, 9, 1, 4]], ids=str)
def test_uneven_micro_batches_too(sizes):
    batch = batches()["masked and unlabelled"]
    whole, part = gradient("kd", batch, 1, 0), gradient("kd", batch, sizes, 0)
    assert (part - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("method", ["kd", "sld", "hard_labels"])
def test_masked_rows_have_no_loss_and_no_gradient_whatever_the_models_make_of_them(method):
    x, y = toys.rows(8, 7)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1]).bool()
    found = []
    for bad in (0.0, float("nan"), float("inf")):
        logits = [net(x).detach().clone() for net in (toys.net(seed=1), toys.net(16, seed=2))]
        for given in logits:
            given[~mask] = bad
        student = nn.Linear(toys.FEATURES, toys.CLASSES)
        step = step_of(method, student, nn.Linear(toys.FEATURES, toys.CLASSES))
        logits[0].requires_grad_()
        step._student_out = lambda model, batch, given=logits[0]: type("Out", (), {"logits": given})()
        step.answers.give = lambda batch, given=logits[1]: TeacherOut(given)
        loss, _ = step(student, Batch(x, y, mask=mask))
        loss.backward()
        assert torch.equal(logits[0].grad[~mask], torch.zeros(2, toys.CLASSES))
        found.append((loss.item(), logits[0].grad.clone()))
    for loss, grad in found[1:]:
        assert loss == found[0][0]
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_update_with_every_row_masked_is_a_defined_zero(method):
    x, y = toys.rows(8)
    student = toys.net(seed=1)
    step = step_of(method, student)
    loss, _ = step(student, Batch(x, y, mask=torch.zeros(8, dtype=torch.bool)))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in student.parameters())


def test_bf16_gives_the_same_split_and_a_gradient_near_float32():
    batch = batches()["every row has a label"]
    exact = gradient("kd", batch, 1, 0)
    whole, half = (gradient("kd", batch, parts, 0, bf16=True) for parts in (1, 2))
    assert (whole - exact).norm() <= 0.02 * exact.norm()
    assert (whole - half).norm() <= 0.01 * whole.norm()
    assert not torch.equal(whole, exact), "bf16 was in use"


class TestEmbedded:
    """In somebody else's loop."""

    def test_is_the_paper_in_three_lines(self):
        student, teacher = toys.net(seed=1), toys.net(16, seed=2)
        x, y = toys.rows(8)
        step = step_of({"name": "kd", "temperature": 2.0, "alpha": 0.5}, student, teacher)
        loss, metrics = step(student, (x, y))
        with torch.no_grad():
            soft = teacher(x)
        kl = 4 * F.kl_div((student(x) / 2).log_softmax(-1), (soft / 2).softmax(-1), reduction="batchmean")
        ce = F.cross_entropy(student(x), y)
        torch.testing.assert_close(loss, 0.5 * kl + 0.5 * ce, rtol=1e-5, atol=1e-6)
        assert set(metrics) == {"kd.kl", "kd.ce", "loss"}
        torch.testing.assert_close(metrics["kd.kl"], kl, rtol=1e-5, atol=1e-6)
        assert not any(value.requires_grad for value in metrics.values())

    def test_several_methods_are_summed(self):
        student, teacher = toys.net(seed=1), toys.net(16, seed=2)
        batch = Batch(*toys.rows(8))
        apart = []
        for method in ({"name": "kd", "alpha": 1.0}, toys.Squares()):
            apart.append(step_of(method, student, teacher)(student, batch)[0])
        both, metrics = step_of([{"name": "kd", "alpha": 1.0}, toys.Squares()], student, teacher)(
            student, batch
        )
        assert torch.equal(both, apart[0] + apart[1])
        assert set(metrics) == {"kd.kl", "squares.square", "loss"}

    def test_a_wrapper_is_called_as_a_whole(self):
        """Pitfall 10's cause: calling the inner module goes around DistributedDataParallel."""
        student = toys.net(seed=1)
        calls = []

        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.module = student

            def forward(self, inputs):
                calls.append(len(inputs))
                return self.module(inputs)

        step = step_of("kd", student)
        step(Wrapper(), Batch(*toys.rows(8)))
        assert calls == [8]

    def test_a_closed_step_evaluates_but_trains_no_more(self):
        student = toys.net(seed=1)
        step, batch = step_of("kd", student), Batch(*toys.rows(8))
        step.close()
        with torch.no_grad():
            assert step(student, batch).loss > 0
        with pytest.raises(ConfigError, match="the step was closed"):
            step(student, batch)

    def test_leaves_nothing_on_the_models(self):
        student, teacher = toys.net(seed=1), toys.net(16, seed=2)
        step = step_of("kd", student, teacher)
        step.run.capture("student", "0")
        step.run.capture("teacher", "0")
        step.close()
        for module in (*student.modules(), *teacher.modules()):
            assert not module._forward_hooks
            assert not module._forward_pre_hooks

    def test_features_of_named_modules_are_found_and_hold_no_graph_afterwards(self):
        class Reads(Method):
            api_version = 1

            @hookimpl
            def on_run_start(self, run):
                run.capture("student", "1")
                run.capture("teacher", "0")

            @hookimpl
            def loss_terms(self, student_out, teacher_out, info):
                self.seen = student_out.features["1"], teacher_out.features["0"]
                return {"x": LossTerm(info.mean(self.seen[0].sum(-1)))}

        method = Reads()
        student, teacher = toys.net(seed=1), toys.net(16, seed=2)
        step = step_of(method, student, teacher)
        x, y = toys.rows(8)
        step(student, (x, y))
        assert step.captures.take("student") == {}
        assert not method.seen[1].requires_grad
        assert torch.equal(method.seen[0], student[:2](x))
        assert torch.equal(method.seen[1], teacher[0](x))

    def test_a_misspelt_module_is_refused_with_the_nearest_name(self):
        step = step_of("kd", toys.net(seed=1))
        with pytest.raises(
            ConfigError, match=r"student\.33: no such module in Sequential; (did you mean|known)"
        ):
            step.run.capture("student", "33")
        with pytest.raises(ConfigError, match=r"no such model; did you mean 'student'"):
            step.run.capture("studnet", "0")


class TestDifferentNumbersOfOutputs:
    """Padded vocabularies: the shared prefix is aligned, and an entry that one side lacks counts as -inf there."""

    @pytest.mark.parametrize("outputs", [3, 6])
    @pytest.mark.parametrize("method", ["kd", "sld"])
    def test_are_told_and_compared_where_both_have_them(self, method, outputs):
        told = []
        student, teacher = toys.net(seed=1, outputs=outputs), toys.net(16, seed=2)
        x = toys.rows(8)[0]
        probe = (x, torch.zeros(8, dtype=torch.long))
        made = [{"name": method, "temperature": 1.0}]
        step = step_of(made, student, teacher, probe=probe, say=told.append)
        shared = min(outputs, toys.CLASSES)
        (said,) = [line for line in told if line.startswith("outputs = ")]
        assert said.startswith(f"outputs = {shared} shared (the teacher has 4, the student {outputs}")
        _, metrics = step(student, probe)
        p = teacher(x)[:, :shared].softmax(-1)
        own = student(x).log_softmax(-1)[:, :shared]  # the teacher never names the student's other outputs
        kl = (p * (p.log() - own)).sum(-1).mean()
        torch.testing.assert_close(metrics[f"{method}.kl"], kl.detach(), rtol=1e-5, atol=1e-6)

    def test_labels_beyond_the_smaller_number_are_refused(self):
        x, _ = toys.rows(4)
        with pytest.raises(DataError, match=r"labels holds? 3, first in row 1; expected 0 to 2"):
            step_of("hard_labels", toys.net(outputs=3), probe=(x, torch.tensor([0, 3, 1, 2])))

    @pytest.mark.parametrize("label", [4, -1])
    @pytest.mark.parametrize("method", ["hard_labels", "kd", "dkd", "dist", "reverse_kl", "hldm"])
    def test_labels_beyond_them_in_a_later_batch_are_refused_by_row(self, method, label):
        step, (x, y) = step_of(method, toys.net(seed=1), toys.net(16, seed=2)), toys.rows(4)
        step(step.run.student, (x, y)).loss.backward()
        y[2] = label
        with pytest.raises(DataError, match=rf"labels hold {label}, first in row 2; expected 0 to 3"):
            step(step.run.student, (x, y))


class TestTeacher:
    @pytest.mark.parametrize("method", ["kd", "sld"])
    def test_stays_as_it_is_bit_for_bit_in_eval_mode_without_a_gradient(self, method):
        teacher = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
        before = toys.weights(teacher)
        loop = toys.loop(method, teacher=teacher, steps=10)
        teacher.train()  # as a careless caller would
        teacher.eval()
        loop.run()
        assert toys.same_bits(before, toys.weights(teacher))
        assert not any(module.training for module in teacher.modules())
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())

    def test_one_that_is_written_to_is_noticed_with_the_culprit_named(self):
        class Writes(toys.Squares):
            requires = frozenset({"logits"})

            @hookimpl
            def on_update_end(self, info):
                with torch.no_grad():
                    self.teacher[0].weight.add_(1)

            @hookimpl
            def on_run_start(self, run):
                self.teacher = run.teacher

        with pytest.raises(
            PluginError, match=r"plugin 'writes' .* wrote to the teacher's weights or buffers"
        ):
            toys.loop(Writes()).run()

    def test_one_that_is_written_to_later_is_noticed_at_the_stages_end(self):
        teacher = toys.net(16, seed=2)
        loop = toys.loop("kd", teacher=teacher, steps=10)
        loop.run(8)
        with torch.no_grad():
            teacher[0].weight.add_(1)
        with pytest.raises(ConfigError, match=r"written to, by the trainer or one of plugin 'kd'"):
            loop.run()

    def test_a_hook_may_answer_in_its_place(self):
        class Answers(Method):
            api_version = 1

            @hookimpl
            def teacher_forward(self, batch):
                return TeacherOut(torch.full((len(batch), toys.CLASSES), 5.0))

            @hookimpl
            def loss_terms(self, teacher_out, student_out, info):
                assert (teacher_out.logits == 5).all()
                return {"x": LossTerm(student_out.logits.sum() * 0)}

        step = step_of(Answers(), toys.net(seed=1))
        before = step.teacher_calls
        step(step.run.student, toys.rows(3))
        assert step.teacher_calls == before

    def test_calls_are_counted(self):
        step = step_of("kd", toys.net(seed=1))
        assert step.teacher_calls == 0
        for _ in range(3):
            step(step.run.student, toys.rows(3))
        assert step.teacher_calls == 3

    def test_the_student_itself_can_not_be_its_own_teacher_object(self):
        net = toys.net()
        with pytest.raises(ConfigError, match=r"same"):
            step_of("kd", net, net)


class TestRefusedBeforeTheFirstStep:
    def test_different_numbers_of_outputs(self):
        with pytest.raises(ConfigError) as caught:
            step_of(toys.Alike(), toys.net(outputs=5))
        said = str(caught.value)
        assert "plugin 'alike'" in said
        assert "the teacher gives outputs of shape (4, 4), the student (4, 5)" in said

    def test_different_numbers_of_outputs_of_the_target(self):
        with pytest.raises(ConfigError, match=r"shape \(4, 4\), the target \(4, 7\)"):
            step_of(["sld", toys.Alike()], toys.net(), target=toys.net(outputs=7))

    def test_outputs_for_other_rows(self):
        class Positions(nn.Module):
            def forward(self, inputs):
                return inputs[:, None, :4].expand(-1, 3, -1)

        with pytest.raises(ConfigError, match=r"outputs of shape \(4, 3, 4\), the student \(4, 4\)"):
            step_of("kd", toys.net(), Positions(), probe=toys.rows(4)[0])

    def test_a_kind_of_task_that_the_method_has_no_meaning_for(self):
        x, y = toys.rows(4)
        said = r"plugin 'sld' .* has no meaning for regression .*expected one of classification, "
        with pytest.raises(ConfigError, match=said):
            step_of("sld", toys.net(), probe=(x, F.one_hot(y, toys.CLASSES).float()))

    def test_a_stochastic_teacher_under_sld_names_the_module(self):
        class Sampler(nn.Module):
            def forward(self, inputs):
                return inputs + torch.rand_like(inputs)

        teacher = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.ReLU(), Sampler()), nn.Linear(8, 4))
        with pytest.raises(ConfigError) as caught:
            step_of("sld", toys.net(), teacher)
        said = str(caught.value)
        assert "plugin 'sld'" in said
        assert "1.1 (Sampler) is stochastic" in said
        assert "use the method 'kd'" in said
        step_of("kd", toys.net(), teacher)  # as it says

    def test_dropout_that_ignores_eval_mode_is_named(self):
        class Always(nn.Dropout):
            def forward(self, inputs):
                return F.dropout(inputs, self.p, training=True)

        with pytest.raises(ConfigError, match=r"1 \(Always\) is stochastic"):
            step_of("sld", toys.net(), nn.Sequential(nn.Linear(6, 8), Always(), nn.Linear(8, 4)))

    def test_ordinary_dropout_is_off_in_the_teacher_so_it_may_have_some(self):
        step_of("sld", toys.net(), toys.net(16, dropout=0.5).train())

    def test_no_teacher_where_one_is_needed(self):
        with pytest.raises(ConfigError, match=r"plugin 'kd' .* needs a teacher, and there is none"):
            DistillStep("kd", student=toys.net(), probe=toys.rows(2))

    def test_no_labels_where_some_are_needed(self):
        with pytest.raises(
            ConfigError, match=r"'hard_labels' .* needs labels, and the training split has none"
        ):
            DistillStep("hard_labels", student=toys.net(), probe=toys.rows(2)[0])

    def test_a_capability_that_the_trainer_does_not_offer(self):
        class Needs(toys.Squares):
            requires = frozenset({"student_update"})

        with pytest.raises(
            ConfigError, match=r"'needs' .* requires 'student_update', which this trainer does not"
        ):
            DistillStep(Needs(), student=toys.net(), probe=toys.rows(2), offers=OFFERED - {"student_update"})

    def test_an_unlabelled_split_that_is_missing(self):
        class Needs(toys.Squares):
            requires = frozenset({"unlabelled"})

        with pytest.raises(ConfigError, match=r"needs an unlabelled split"):
            DistillStep(Needs(), student=toys.net(), probe=toys.rows(2), splits=toys.splits(unlabelled=0))

    def test_a_model_that_gives_no_logits(self):
        class Odd(nn.Module):
            def forward(self, inputs):
                return {"out": inputs}

        with pytest.raises(ConfigError, match=r"Odd gave dict with out; expected a tensor of logits"):
            step_of("kd", Odd())

    def test_a_hook_that_can_not_work_is_refused_here_already(self):
        class Bad(toys.Squares):
            @hookimpl
            def on_update_ended(self, info): ...

        with pytest.raises(PluginError, match=r"did you mean 'on_update_end'"):
            step_of(Bad(), toys.net())

    def test_no_method_at_all(self):
        with pytest.raises(ConfigError):
            DistillStep([], student=toys.net(), probe=toys.rows(2))

    def test_the_models_are_as_before_when_all_is_well(self):
        student = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
        before, state = copy.deepcopy(student.state_dict()), torch.get_rng_state()
        step_of("sld", student)
        assert toys.same_bits(before, student)
        assert torch.equal(state, torch.get_rng_state())


def test_stages_train_and_freeze_what_they_say():
    class Two(toys.Squares):
        @hookimpl
        def auxiliary_modules(self, run):
            return {"head": nn.Linear(2, 2)}

        @hookimpl
        def stages(self, run):
            return [
                Stage("one", teacher=None, train=("two.head",)),
                Stage("two", teacher=None),
                Stage("three", teacher=None, train=("student",)),
            ]

    student = toys.net()
    step = DistillStep(Two(), student=student, probe=toys.rows(2))
    head = step.run.models["two.head"]
    for stage, (trains_student, trains_head) in zip(step.stages, [(0, 1), (1, 1), (1, 0)], strict=True):
        step.begin(stage)
        assert {p.requires_grad for p in student.parameters()} == {bool(trains_student)}
        assert {p.requires_grad for p in head.parameters()} == {bool(trains_head)}
        assert (student.training, head.training) == (bool(trains_student), bool(trains_head))
        assert step.modules.of(stage) == tuple(
            n for n, on in (("student", trains_student), ("two.head", trains_head)) if on
        )


def test_what_the_user_froze_stays_frozen():
    student = toys.net()
    student[0].weight.requires_grad_(False)
    step = DistillStep("hard_labels", student=student, probe=toys.rows(2))
    step.begin(step.stages[0])
    assert not student[0].weight.requires_grad
    assert student[0].bias.requires_grad


def test_means_are_over_the_updates_rows():
    step = StepInfo(rows=10)
    values = torch.tensor([1.0, 2.0, float("nan")])
    assert step.mean(values, torch.tensor([True, True, False])).item() == pytest.approx(0.3)
