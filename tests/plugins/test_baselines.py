"""Hard labels and KD against torch's own functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import toys

from stillhouse.api import IGNORE, KINDS, Batch, ConfigError, StepInfo, StudentOut, Targets, TensorSplit
from stillhouse.training.labels import keep
from stillhouse.training.step import DistillStep
from stillhouse_baselines.hard_labels import HardLabels
from stillhouse_baselines.kd import KD, KDConfig


def total(method, student, labels, teacher=None, mask=None):
    rows = len(student) if mask is None else float(mask.sum())
    known = (
        0
        if labels is None
        else float(((labels != IGNORE) if mask is None else (labels != IGNORE) & mask).sum())
    )
    step = StepInfo(rows=rows, labelled=known)
    terms = method.loss_terms(
        StudentOut(student), Targets(labels, teacher), Batch(student, labels, mask=mask), step
    )
    return sum(term.weight * term.value for term in terms.values())


def given(rows: int = 8):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.arange(rows) % 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_kd_is_the_papers_formula_in_value_and_gradient(alpha, temperature):
    student, teacher, labels = given()
    ours = total(KD(KDConfig(alpha=alpha, temperature=temperature)), student, labels, teacher)
    kl = F.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean"
    )
    theirs = alpha * temperature**2 * kl + (1 - alpha) * F.cross_entropy(student.float(), labels)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-7)
    grads = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


def test_kd_with_a_one_hot_teacher_is_cross_entropy():
    student, _, labels = given()
    sure = torch.where(F.one_hot(labels, 5).bool(), 0.0, -torch.inf).double()
    ours = total(KD(KDConfig(alpha=1.0, temperature=1.0)), student, labels, sure)
    torch.testing.assert_close(ours, F.cross_entropy(student, labels), rtol=1e-9, atol=0)


def test_kd_gives_rows_without_a_label_the_teacher_alone():
    student, teacher, labels = given()
    labels[2:5] = IGNORE
    ours = total(KD(KDConfig(alpha=0.5, temperature=2.0)), student, labels, teacher)
    kl = 4 * F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
    known = labels != IGNORE
    expected = 0.5 * kl + 0.5 * F.cross_entropy(student[known], labels[known])
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-7)


def test_kd_needs_no_labels_and_no_cross_entropy_where_alpha_is_one():
    student, teacher, labels = given()
    method = KD(KDConfig(alpha=1.0))
    assert torch.equal(total(method, student, None, teacher), total(method, student, labels, teacher))


def test_kd_counts_masked_rows_nowhere():
    student, teacher, labels = given()
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).bool()
    ours = total(KD(), student, labels, teacher, mask)
    expected = total(KD(), student[mask], labels[mask], teacher[mask])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_hard_labels_is_cross_entropy():
    student, _, labels = given()
    torch.testing.assert_close(
        total(HardLabels(), student, labels).double(), F.cross_entropy(student, labels)
    )


def test_hard_labels_calls_no_teacher_and_has_no_temperature():
    loop = toys.loop("hard_labels", teacher=toys.net(16, seed=2))
    loop.run()
    assert loop.step.teacher_calls == 0
    assert list(HardLabels.Config.model_fields) == []


def test_hard_labels_takes_float_targets_for_a_regression():
    student = torch.randn(8, 1)
    labels = torch.randn(8)
    info = StepInfo(rows=8, labelled=8, kind=KINDS["regression"])
    made = HardLabels().loss_terms(StudentOut(student), Targets(labels), Batch(student, labels), info)
    got = made["ce"].value
    torch.testing.assert_close(got, F.mse_loss(student[:, 0], labels))


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"alpha": 1.5}, {"T": 3}])
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        KDConfig(**settings)


@pytest.mark.parametrize("cache", [True, False])
def test_kept_teacher_outputs_change_nothing_that_matters(cache):
    loops = [toys.loop("kd", keep=keep if kept else None, steps=40) for kept in (True, False)]
    for loop in loops:
        loop.run()
    for mine, its in zip(loops[0].model.parameters(), loops[1].model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    assert loops[0].step.teacher_calls < 10 < 40 <= loops[1].step.teacher_calls


def test_kd_distils():
    teacher, student = toys.net(32, seed=2), toys.net(16, seed=1)
    data = toys.splits(train=200)

    def disagreement():
        x = data.test.inputs
        return (teacher(x).argmax(-1) != student(x).argmax(-1)).float().mean()

    before = disagreement()
    toys.loop(
        {"name": "kd", "alpha": 1.0},
        teacher=teacher,
        student=student,
        data=data,
        steps=300,
        optimizer={"lr": 1e-2},
    ).run()
    assert disagreement() < before


def test_kd_of_several_labels_at_once_is_that_of_each_classs_yes_and_no():
    student, teacher, labels = given()
    flags = F.one_hot(labels, 5).double()
    info = StepInfo(rows=8, labelled=8, kind=KINDS["multi_label"])
    made = KD(KDConfig(temperature=2.0, alpha=0.3)).loss_terms(
        StudentOut(student), Targets(flags, teacher), Batch(student, flags), info
    )
    p, q = (teacher / 2).sigmoid(), (student / 2).sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(made["kl"].value.double(), 4 * kl.mean(), rtol=1e-5, atol=1e-7)
    bce = F.binary_cross_entropy_with_logits(student, flags)
    torch.testing.assert_close(made["ce"].value.double(), bce, rtol=1e-5, atol=1e-7)
    assert (made["kl"].weight, made["ce"].weight) == (0.3, 0.7)


def test_different_numbers_of_outputs_train():
    student = toys.net(outputs=9)
    before = toys.weights(student)
    loop = toys.loop("kd", student=student)
    loop.run()
    assert loop.step.run.chosen["outputs"]["value"] == "4 shared"
    assert not toys.same_bits(before, student)


# KD on all inputs.


def test_kd_on_all_inputs_sees_the_unlabelled_rows_where_the_teacher_alone_speaks():
    loop = toys.loop({"name": "kd", "data": "all", "alpha": 0.5}, steps=14)
    (stage,) = loop.step.stages
    assert (stage.data, stage.model, stage.teacher) == ("all", "student", "teacher")
    seen = []
    loop.step.run.student.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    loop.run()
    assert sum(seen) >= len(loop.splits.train) + len(loop.splits.unlabelled), (
        "14 updates of 8 are one pass over 112"
    )
    student, teacher, labels = given()
    method = KD(KDConfig(data="all", alpha=0.5))
    labels[3:] = IGNORE
    kl = 16 * F.kl_div((student / 4).log_softmax(-1), (teacher / 4).softmax(-1), reduction="batchmean")
    expected = 0.5 * kl + 0.5 * F.cross_entropy(student[:3], labels[:3])
    torch.testing.assert_close(
        total(method, student, labels, teacher).double(), expected, rtol=1e-6, atol=1e-7
    )


def test_kd_trains_on_the_labelled_rows_unless_told_otherwise():
    (stage,) = toys.loop("kd").step.stages
    assert stage.data == "labelled"
    (alone,) = toys.loop({"name": "kd", "data": "all"}, data=toys.splits(unlabelled=0)).step.stages
    assert alone.data == "all"


def test_kd_on_all_inputs_with_labels_that_cannot_be_missing_is_refused_before_it_begins():
    data = toys.splits()
    flags = F.one_hot(data.train.labels, toys.CLASSES).float()
    data.train = TensorSplit(data.train.inputs, flags)
    with pytest.raises(
        ConfigError, match=r"k\.data is all, and multi_label has labels that can't be missing"
    ):
        DistillStep(
            {"name": "kd", "as": "k", "data": "all"},
            student=toys.net(),
            teacher=toys.net(seed=2),
            probe=data.train.batch(torch.arange(4)),
            splits=data,
            task="multi_label",
        )


# Several of one kind, and other names.


def test_two_of_one_method_under_names_of_their_own_each_give_their_terms():
    loop = toys.loop(
        [{"name": "kd", "as": "a", "temperature": 1.0}, {"name": "kd", "as": "b", "temperature": 8.0}]
    )
    loop.run()
    last = loop.watcher.metrics[-1]
    assert set(last) == {"a.kl", "a.ce", "b.kl", "b.ce", "loss"}
    assert last["a.kl"] != last["b.kl"]
    assert last["a.ce"] == last["b.ce"]
    assert last["loss"] == pytest.approx(
        0.9 * (last["a.kl"] + last["b.kl"]) + 0.1 * 2 * last["a.ce"], rel=1e-5
    )


def test_fitnets_twice_guides_two_layers_with_a_regressor_each():
    hints = [
        {"name": "fitnets", "as": name, "layers": {layer: layer}}
        for name, layer in (("low", "0"), ("high", "3"))
    ]
    loop = toys.loop(["kd", *hints])
    before = {name: toys.weights(loop.step.run.models[f"{name}.regressor"]) for name in ("low", "high")}
    loop.run()
    assert {"low.hint", "high.hint"} <= set(loop.watcher.metrics[-1])
    for name, weights in before.items():
        assert not toys.same_bits(weights, toys.weights(loop.step.run.models[f"{name}.regressor"]))
    regressor = loop.step.run.models["high.regressor"][0].map
    assert (regressor.in_features, regressor.out_features) == (toys.CLASSES, toys.CLASSES)


@pytest.mark.parametrize(
    ("method", "modules"),
    [
        ({"name": "pddm", "points": 2, "pdnet_steps": 2}, {"small1", "small2", "pdnet", "path"}),
        ({"name": "tcmd", "tasks": [[0, 1], [2, 3]]}, {"specialist0", "specialist1", "network"}),
        ({"name": "takd"}, {"assistant1"}),
        ({"name": "ibmd"}, {"teacher_encoder", "student_encoder", "decoder"}),
    ],
)
def test_a_method_under_another_name_trains_as_under_its_own(method, modules):
    own, other = toys.loop(method, steps=8), toys.loop({**method, "as": "mine"}, steps=8)
    for loop in (own, other):
        loop.run()
    assert set(other.step.auxiliary) == {f"mine.{name}" for name in modules}
    assert set(own.step.auxiliary) == {f"{method['name']}.{name}" for name in modules}
    renamed = {
        name.replace(f"{method['name']}.", "mine.", 1): value
        for name, value in own.watcher.metrics[-1].items()
    }
    assert renamed.keys() == other.watcher.metrics[-1].keys()
    if method["name"] == "takd":
        assert renamed == other.watcher.metrics[-1]


def test_a_refusal_names_the_method_as_it_is_called():
    with pytest.raises(ConfigError, match=r"mine\.gate is merge"):
        toys.loop({"name": "tcmd", "as": "mine", "gate": "merge"})
    with pytest.raises(ConfigError, match=r"mine\.networks names models"):
        toys.loop({"name": "pddm", "as": "mine", "networks": [{"name": "a"}, {"name": "b"}]})


# Teacher assistants.


def test_each_assistant_is_taught_by_the_one_before_and_the_teacher_teaches_the_first_alone():
    made = []

    def build(spec):
        made.append(spec)
        return toys.net(spec["hidden"], seed=spec["hidden"])

    data = toys.splits()
    step = DistillStep(
        {
            "name": "takd",
            "assistants": [{"name": "net", "hidden": 12}, {"name": "net", "hidden": 10}],
            "share": 2.0,
        },
        student=toys.net(8, seed=1),
        teacher=toys.net(16, seed=2),
        probe=data.train.batch(torch.arange(4)),
        splits=data,
        steps=10,
        build=build,
    )
    assert [spec["hidden"] for spec in made] == [12, 10]
    assert [(stage.name, stage.model, stage.teacher) for stage in step.stages] == [
        ("assistant-1", "takd.assistant1", "teacher"),
        ("assistant-2", "takd.assistant2", "takd.assistant1"),
        ("student", "student", "takd.assistant2"),
    ]
    assert step.schedule.lengths == [4, 4, 2]


def test_without_names_the_assistant_is_one_like_the_student_and_only_the_first_stage_calls_the_teacher():
    loop = toys.loop("takd", steps=12)
    loop.run(6)
    assert loop.step.teacher_calls > 0
    calls = loop.step.teacher_calls
    student = toys.weights(toys.net(8, seed=1))
    assert toys.same_bits(student, loop.step.run.student), "it is not trained yet"
    loop.run()
    assert loop.step.teacher_calls == calls
    assert not toys.same_bits(student, loop.step.run.student)


def test_named_assistants_are_refused_where_nothing_can_build_them():
    with pytest.raises(
        ConfigError, match=r"takd\.assistants names models, and this trainer knows models as objects"
    ):
        toys.loop({"name": "takd", "assistants": [{"name": "net"}]})
