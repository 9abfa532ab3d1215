"""SLD: answers that are known beforehand, its three stages, and every form its data may take."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn

import stillhouse
from stillhouse.api import (
    IGNORE,
    Batch,
    RunContext,
    Splits,
    Stage,
    StepInfo,
    StudentOut,
    Targets,
    TensorSplit,
)
from stillhouse.errors import ConfigError
from stillhouse.kernels import softmax_kl
from stillhouse.training.labels import keep
from stillhouse.training.stages import stage_lengths
from stillhouse.training.step import DistillStep
from stillhouse_baselines.kd import KD, KDConfig
from stillhouse_sld import SLD, SLDConfig

EVEN = {"name": "sld", "shares": (1, 1, 1)}


def logits(rows: int, seed: int, classes: int = 5) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl_of(student: torch.Tensor, teacher: torch.Tensor, temperature: float, **step) -> torch.Tensor:
    method = SLD(SLDConfig(temperature=temperature))
    info = StepInfo(rows=len(student), labelled=len(student), stage=Stage("distil"), **step)
    return method.loss_terms(StudentOut(student), Targets(None, teacher), Batch(student), info)["kl"].value


class TestKnownAnswers:
    def test_student_equal_to_teacher_has_loss_zero_and_gradient_zero(self):
        student = logits(8, 0).requires_grad_()
        loss = kl_of(student, student.detach().clone(), 4.0)
        loss.backward()
        assert abs(loss.item()) < 1e-14
        assert student.grad.abs().max() < 1e-14

    def test_models_that_are_equal_stay_equal(self):
        teacher = toys.net(seed=2)
        student = copy.deepcopy(teacher)
        loop = toys.loop(
            EVEN, student=student, teacher=teacher, optimizer={"name": "SGD", "lr": 0.1, "weight_decay": 0}
        )
        loop.run()
        assert max(row["loss"] for row in loop.watcher.metrics) < 1e-9
        for mine, its in zip(student.parameters(), teacher.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 50.0])
    def test_the_gradient_is_t_times_the_difference_of_probabilities_over_n(self, temperature):
        student, teacher = logits(8, 0).requires_grad_(), logits(8, 1)
        kl_of(student, teacher, temperature).backward()
        p, q = (teacher / temperature).softmax(-1), (student.detach() / temperature).softmax(-1)
        torch.testing.assert_close(student.grad, temperature * (q - p) / 8, rtol=1e-9, atol=1e-12)

    def test_at_infinite_temperature_centred_logits_are_matched(self):
        student, teacher = logits(8, 0).requires_grad_(), logits(8, 1)
        kl_of(student, teacher, 1e5).backward()
        centred = [x - x.mean(-1, keepdim=True) for x in (student.detach(), teacher)]
        torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / (8 * 5), rtol=1e-3, atol=1e-6)

    def test_the_gradients_scale_does_not_shrink_with_temperature(self):
        """Pitfall 3: without T^2 it falls by 64 from T = 1 to T = 8."""
        norms = []
        for temperature in (1.0, 8.0):
            student = logits(8, 0).requires_grad_()
            kl_of(student, logits(8, 1), temperature).backward()
            norms.append(student.grad.norm().item())
        assert 0.2 < norms[1] / norms[0] < 5

    def test_a_linear_student_recovers_a_linear_teacher_up_to_a_constant_per_row(self):
        torch.manual_seed(0)
        teacher, student = (nn.Linear(toys.FEATURES, toys.CLASSES) for _ in range(2))
        stillhouse.distill(
            student,
            teacher,
            {"train": toys.rows(300)[0], "unlabelled": toys.rows(300, 9)[0]},
            method="sld",
            steps=3000,
            batch_size=128,
            optimizer={"lr": 3e-2, "weight_decay": 0.0},
            scheduler="CosineAnnealingLR",
            device="cpu",
        )
        weights = [torch.cat([m.weight.detach(), m.bias.detach()[:, None]], 1) for m in (student, teacher)]
        # Adding a constant to every class's logit changes no probability: compare differences of classes.
        recovered, true = (w - w.mean(0) for w in weights)
        torch.testing.assert_close(recovered, true, rtol=0, atol=2e-3)
        assert (weights[0] - weights[1]).norm() > 0.1, "the constant itself is free"

    def test_a_one_hot_teacher_is_cross_entropy(self):
        student = logits(8, 0).requires_grad_()
        labels = torch.arange(8) % 5
        sure = torch.where(F.one_hot(labels, 5).bool(), 0.0, -torch.inf).double()
        torch.testing.assert_close(
            kl_of(student, sure, 1.0), F.cross_entropy(student, labels), rtol=1e-9, atol=0
        )

    def test_is_the_textbook_formula(self):
        student, teacher = logits(8, 0), logits(8, 1)
        expected = 16 * F.kl_div(
            (student / 4).log_softmax(-1),
            (teacher / 4).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        torch.testing.assert_close(kl_of(student, teacher, 4.0), expected, rtol=1e-9, atol=0)


class TestStages:
    def stages(self, **settings) -> list[Stage]:
        models = {"student": toys.net(), **settings.pop("models", {})}
        return SLD(SLDConfig(**settings)).stages(RunContext(models))

    def test_are_distil_relabel_and_target(self):
        distil, relabel, target = self.stages()
        assert (distil.name, distil.data, distil.model, distil.teacher) == (
            "distil",
            "labelled",
            "student",
            "teacher",
        )
        assert (relabel.name, relabel.data, relabel.model, relabel.teacher) == (
            "relabel",
            "unlabelled",
            "student",
            "teacher",
        )
        assert (target.name, target.data, target.model, target.teacher) == (
            "target",
            "all",
            "student",
            "student",
        )
        assert stage_lengths([distil, relabel, target], 9000) == [1000, 6000, 2000]

    def test_train_another_target_at_the_end_where_there_is_one(self):
        assert self.stages(models={"target": toys.net()})[2].model == "target"

    def test_with_a_weight_for_the_labels_relabel_reads_the_rows_that_have_one(self):
        assert [stage.data for stage in self.stages(alpha=0.9)] == ["labelled", "all", "all"]

    def test_with_a_weight_for_the_labels_the_first_stages_are_kds_loss(self):
        student, teacher, labels = logits(8, 0), logits(8, 1), torch.arange(8) % 5
        labels[5:] = IGNORE
        targets = Targets(labels, teacher)
        for name in ("distil", "relabel", "target"):
            info = StepInfo(rows=8, labelled=5, stage=Stage(name))
            given = StudentOut(student), targets, Batch(student), info
            own = SLD(SLDConfig(alpha=0.7)).loss_terms(*given)
            other = (KD(KDConfig(alpha=0.7)) if name != "target" else SLD()).loss_terms(*given)
            assert {key: (term.weight, term.value) for key, term in own.items()} == {
                key: (term.weight, term.value) for key, term in other.items()
            }

    def test_a_weight_for_the_labels_beside_chosen_rows_is_refused(self):
        with pytest.raises(ValueError, match="top_per_class chooses among"):
            SLDConfig(alpha=0.9, top_per_class=3)

    def test_lengths_can_be_set(self):
        assert stage_lengths(self.stages(shares=(1, 0, 3)), 8) == [2, 0, 6]

    @pytest.mark.parametrize("shares", [(0, 0, 0), (1, -1, 1), (1, float("nan"), 1)])
    def test_lengths_that_mean_nothing_are_refused(self, shares):
        with pytest.raises(ValueError, match=r"shares"):
            SLDConfig(shares=shares)

    def test_the_last_one_never_calls_the_teacher_and_its_targets_are_the_small_networks(self):
        seen = []

        class Counts(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.calls = toys.net(16, seed=2), 0

            def forward(self, inputs):
                self.calls += 1
                return self.net(inputs)

        teacher, data = Counts(), toys.splits()
        loop = toys.loop(EVEN, teacher=teacher, data=data, keep=keep, steps=30, cache_teacher=False)
        loop.run(19)
        before = teacher.calls + 1  # of the second stage's last update
        assert before >= 20
        loop.run(1)
        assert (loop.at.stage, loop.at.stage_step) == (2, 0)
        small = copy.deepcopy(loop.model).eval()
        terms = loop.step.plugins.loss_terms
        loop.step.plugins.loss_terms = lambda student_out, teacher_out, targets, batch, info: (
            seen.append((batch, teacher_out.logits)),
            terms(student_out, teacher_out, targets, batch, info),
        )[1]
        loop.run()
        assert teacher.calls == before, "not once"
        assert len(seen) == 10
        for batch, given in seen:
            torch.testing.assert_close(given, small(batch.inputs), rtol=1e-5, atol=1e-6)

    def test_the_teacher_is_called_once_per_sample_where_that_is_cheaper(self):
        loop = toys.loop(EVEN, keep=keep, steps=300)
        loop.run()
        passes = 2  # one forward pass of up to 512 rows for each of the first two stages
        assert loop.step.teacher_calls <= passes + 3 * 2  # and the looks at two rows: determinism, width


class TestLabels:
    KINDS = ("soft", "hard", "actual")

    def terms(self, labels: str, given: torch.Tensor | None, stage: str = "target", mask=None):
        student, teacher = logits(6, 0).float(), logits(6, 1).float()
        method = SLD(SLDConfig(labels=labels, temperature=1.0))
        info = StepInfo(rows=6 if mask is None else float(mask.sum()), stage=Stage(stage))
        made = method.loss_terms(
            StudentOut(student), Targets(given, teacher), Batch(student, given, mask=mask), info
        )
        return {name: float(term.weight * term.value) for name, term in made.items()}, student, teacher

    def test_soft_is_the_divergence_alone(self):
        got, student, teacher = self.terms("soft", torch.zeros(6, dtype=torch.long))
        assert got == {"kl": pytest.approx(softmax_kl(student, teacher).item())}

    def test_hard_is_the_class_that_the_small_network_names(self):
        got, student, teacher = self.terms("hard", torch.zeros(6, dtype=torch.long))
        expected = F.cross_entropy(student, teacher.argmax(-1)).item()
        assert got == {
            "kl": pytest.approx(0.5 * softmax_kl(student, teacher).item()),
            "ce": pytest.approx(0.5 * expected),
        }

    def test_actual_is_the_true_label_where_there_is_one(self):
        true = torch.tensor([4, IGNORE, 3, IGNORE, 0, 1])
        got, student, teacher = self.terms("actual", true)
        mixed = torch.where(true == IGNORE, teacher.argmax(-1), true)
        assert got["ce"] == pytest.approx(0.5 * F.cross_entropy(student, mixed).item())

    def test_actual_takes_probabilities_where_an_earlier_plugin_made_some(self):
        soft = torch.eye(5)[torch.tensor([4, 0, 3, 0, 0, 1])] * torch.tensor([1, 0, 1, 0, 1, 1])[:, None]
        student, teacher = logits(6, 0).float(), logits(6, 1).float()
        made = SLD(SLDConfig(labels="actual")).loss_terms(
            StudentOut(student),
            Targets(None, teacher, soft),
            Batch(student, probabilities=soft),
            StepInfo(rows=6, stage=Stage("target")),
        )
        mixed = torch.where(soft.sum(-1) > 0, soft.argmax(-1), teacher.argmax(-1))
        torch.testing.assert_close(made["ce"].value, F.cross_entropy(student, mixed))

    def test_actual_without_any_label_is_hard(self):
        assert self.terms("actual", None)[0] == self.terms("hard", None)[0]

    def test_masked_rows_count_nowhere(self):
        mask = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
        got, student, teacher = self.terms("hard", None, mask=mask)
        assert got["ce"] == pytest.approx(
            0.5 * F.cross_entropy(student[mask], teacher[mask].argmax(-1)).item()
        )
        assert got["kl"] == pytest.approx(0.5 * softmax_kl(student[mask], teacher[mask]).item())

    @pytest.mark.parametrize("labels", KINDS)
    @pytest.mark.parametrize("stage", ["distil", "relabel"])
    def test_enter_no_earlier_stage(self, labels, stage):
        assert set(self.terms(labels, torch.zeros(6, dtype=torch.long), stage)[0]) == {"kl"}

    def test_true_labels_make_a_difference_in_a_whole_run(self):
        trained = []
        for labels in self.KINDS:
            loop = toys.loop({**EVEN, "labels": labels}, keep=keep, steps=30)
            loop.run()
            trained.append(toys.weights(loop.model))
        assert not toys.same_bits(trained[0], trained[1])
        assert not toys.same_bits(trained[1], trained[2])


class TestData:
    def run(self, data: Splits, **method) -> list[dict[str, float]]:
        loop = toys.loop({**EVEN, **method}, data=data, keep=keep, steps=30, optimizer={"lr": 1e-2})
        loop.run()
        return loop.watcher.metrics

    @pytest.mark.parametrize("labels", TestLabels.KINDS)
    @pytest.mark.parametrize("unlabelled", [0, 64])
    @pytest.mark.parametrize("labelled", [False, True])
    def test_with_and_without_labels_and_an_unlabelled_split(self, labels, unlabelled, labelled):
        metrics = self.run(toys.splits(unlabelled=unlabelled, labels=labelled), labels=labels)
        assert len(metrics) == 30
        assert metrics[19]["sld.kl"] < metrics[0]["sld.kl"]

    def test_labels_do_not_enter_by_default(self):
        data = toys.splits()
        with_labels, without = (
            toys.loop(EVEN, data=given, keep=keep) for given in (data, toys.splits(labels=False))
        )
        for loop in (with_labels, without):
            loop.run()
        assert toys.same_bits(with_labels.model, without.model)

    def test_without_an_unlabelled_split_it_says_what_it_uses_instead(self):
        said = []
        DistillStep(
            "sld",
            student=toys.net(seed=1),
            teacher=toys.net(16, seed=2),
            probe=toys.rows(4),
            splits=toys.splits(unlabelled=0),
            say=said.append,
        )
        assert "sld.unlabelled = the labelled split's inputs (the task has no unlabelled split)" in said

    def test_the_second_stage_sees_unlabelled_rows_and_the_third_all(self):
        seen = {"distil": set(), "relabel": set(), "target": set()}
        data = toys.splits(20, 30)
        loop = toys.loop(EVEN, data=data, keep=keep, steps=60)
        toys.watch_ids(loop, lambda stage, ids: seen[stage].update(ids))
        loop.run()
        assert {name: len(rows) for name, rows in seen.items()} == {"distil": 20, "relabel": 30, "target": 50}

    def test_two_views_each_model_reads_its_own(self):
        x, other = toys.rows(40)[0], toys.rows(40, 5)[0]
        data = Splits(TensorSplit(x, None, teacher_inputs=other))
        loop = toys.loop(EVEN, data=data, keep=keep, steps=300)
        loop.run(1)
        torch.testing.assert_close(
            loop.step.answers._kept.logits, loop.step.teacher(other), rtol=1e-5, atol=1e-6
        )
        read, ids = [], []
        loop.step.run.student.register_forward_pre_hook(lambda module, given: read.append(given[0]))
        toys.watch_ids(loop, lambda stage, given: ids.append(given))
        loop.run(1)
        assert torch.equal(read[0], x[ids[0]])

    def test_per_class_choice_of_unlabelled_rows(self):
        used = set()
        loop = toys.loop({**EVEN, "top_per_class": 3}, keep=keep, steps=60)
        toys.watch_ids(loop, lambda stage, ids: used.update(ids if stage == "relabel" else ()))
        loop.run()
        teacher, x = loop.step.teacher, loop.splits.unlabelled.inputs
        confidence, named = teacher(x).softmax(-1).max(-1)
        expected = set()
        for label in range(toys.CLASSES):
            ids = (named == label).nonzero()[:, 0]
            expected |= set(ids[confidence[ids].argsort(descending=True)[:3]].tolist())
        assert used == expected


class TestChecks:
    def test_a_stochastic_teacher_is_refused_before_anything_is_trained(self):
        class Noise(nn.Module):
            def forward(self, x):
                return x + torch.randn_like(x)

        student = toys.net(seed=1)
        before = toys.weights(student)
        teacher = nn.Sequential(toys.net(16, seed=2), Noise())
        with pytest.raises(ConfigError, match=r"1 \(Noise\) is stochastic"):
            stillhouse.distill(student, teacher, toys.rows(20), method="sld", steps=5)
        assert toys.same_bits(before, student)

    def test_needs_no_setting_and_says_what_it_chose(self):
        assert SLDConfig() == SLD().config
        run = RunContext({"student": toys.net()}, splits=toys.splits(), caller="sld")
        SLD().on_run_start(run)
        assert run.chosen["sld.temperature"] == {"value": 4.0, "why": "default"}
        assert run.chosen["sld.shares"]["value"] == [1.0, 6.0, 2.0]

    def test_what_was_set_is_not_called_chosen(self):
        run = RunContext({"student": toys.net()}, splits=toys.splits())
        SLD(SLDConfig(temperature=2.0, shares=(1, 1, 1))).on_run_start(run)
        assert run.chosen == {}

    def test_rows_of_a_split_can_not_be_chosen_where_there_are_only_batches(self):
        with pytest.raises(ConfigError, match=r"sld\.top_per_class chooses rows of a split"):
            DistillStep(
                {**EVEN, "top_per_class": 3},
                student=toys.net(),
                teacher=toys.net(16, seed=2),
                probe=toys.rows(4),
            )

    def test_positions_can_not_be_chosen_per_class(self):
        class Tokens(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = toys.net()

            def forward(self, inputs):
                return self.net(inputs)

        x = torch.randn(12, 5, toys.FEATURES)
        loop = toys.loop(
            {**EVEN, "top_per_class": 3}, student=Tokens(), teacher=Tokens(), data=Splits(TensorSplit(x))
        )
        with pytest.raises(ConfigError, match=r"chooses samples, and this task has a class a position"):
            loop.run()

    @pytest.mark.parametrize(
        "settings",
        [
            {"temperature": 0},
            {"temperature": float("inf")},
            {"labels": "true"},
            {"top_per_class": 0},
            {"alpha": 0},
            {"weight": 1},
        ],
    )
    def test_settings_without_meaning_are_refused(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            SLDConfig(**settings)


def test_the_warning_where_the_teacher_is_no_better():
    torch.manual_seed(0)
    student, data = toys.net(16, seed=1), {"train": toys.rows(64), "validation": toys.rows(64)}
    stillhouse.distill(
        student, None, data, method="hard_labels", steps=400, optimizer={"lr": 1e-2}, device="cpu"
    )
    made = stillhouse.distill(student, toys.net(seed=9), data, method="sld", steps=3, device="cpu")
    assert "the teacher's validation accuracy" in made.summary["warnings"][0]
    assert "distilling from it may hurt" in made.summary["warnings"][0]


@pytest.mark.parametrize("batch_size", [3, toys.CLASSES, 16], ids=lambda size: f"batches of {size}")
@pytest.mark.parametrize(
    "before", [[], ["label_smoothing"], ["mixup"], ["mixup", "label_smoothing"]], ids=str
)
@pytest.mark.parametrize("labels", ["soft", "hard", "actual"])
def test_runs_behind_every_change_of_labels(labels, before, batch_size):
    """What a label is says the target's field and not its shape: also where a batch has as many rows as classes."""
    made = toys.loop([*before, {**EVEN, "labels": labels}], steps=6, batch_size=batch_size)
    made.run()
    assert len(made.watcher.metrics) == 6
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in made.watcher.metrics)


def test_actual_labels_behind_smoothing_are_the_smoothed_ones_where_a_row_has_one():
    student, teacher = logits(4, 0), logits(4, 1)
    given = torch.zeros(4, 5, dtype=torch.float64)
    given[0], given[2] = 0.02, 0.02
    given[0, 3], given[2, 1] = 0.92, 0.92
    info = StepInfo(rows=4, labelled=2, stage=Stage("target"))
    terms = SLD(SLDConfig(labels="actual")).loss_terms(
        StudentOut(student), Targets(None, teacher, given), Batch(student, probabilities=given), info
    )
    named = F.one_hot(teacher.argmax(-1), 5).double()
    wanted = torch.stack([given[0], named[1], given[2], named[3]])
    assert terms["ce"].value.item() == pytest.approx(F.cross_entropy(student, wanted).item(), rel=1e-12)
