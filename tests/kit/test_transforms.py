"""Label smoothing, label correction, mixup and augmentation: their formulas, and their order with any method."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import toys

from stillhouse.api import IGNORE, SUPPORTS, Batch, LossTerm, Method, StepInfo, Targets, hookimpl
from stillhouse.errors import ConfigError
from stillhouse.plugin import catalog
from stillhouse.plugin.load import loaded
from stillhouse.training.loop import Loop
from stillhouse.training.step import DistillStep
from stillhouse_tcmd import TCMD


class Seen(Method):
    """Keeps what reaches the losses."""

    api_version = 1
    requires = frozenset()
    supports = SUPPORTS

    @hookimpl
    def loss_terms(self, student_out, teacher_out, targets, batch, info):
        self.targets, self.batch = targets, batch
        return {"zero": LossTerm(student_out.logits.sum() * 0)}


def seen(*methods: object, batch: Batch | None = None, teacher: object = None, data: object = None) -> Seen:
    last = Seen()
    teacher = teacher if teacher is not None else toys.net(16, seed=2)
    data = data or toys.splits()
    step = DistillStep(
        [*methods, last],
        student=toys.net(8, seed=1),
        teacher=teacher,
        splits=data,
        probe=data.train.batch(torch.arange(4)),
    )
    torch.manual_seed(0)
    step(step.run.student, batch if batch is not None else data.train.batch(torch.arange(8)))
    return last


def test_smoothing_shares_out_its_amount():
    targets = seen({"name": "label_smoothing", "amount": 0.2}).targets
    expected = 0.8 * F.one_hot(toys.splits().train.labels[:8], toys.CLASSES) + 0.2 / toys.CLASSES
    torch.testing.assert_close(targets.probabilities, expected)
    assert targets.labels is None, "one form, not both"


def test_the_loss_on_smoothed_labels_is_torchs_own():
    made = toys.loop(["label_smoothing", "hard_labels"], teacher=None, steps=1)
    inputs, labels = toys.rows(8, 5)
    loss, _ = made.step(made.step.run.student, Batch(inputs, labels))
    torch.testing.assert_close(
        loss, F.cross_entropy(made.step.run.student(inputs), labels, label_smoothing=0.1)
    )


def test_rows_without_a_label_stay_without_and_the_mean_is_over_the_others():
    made = toys.loop([{"name": "label_smoothing", "amount": 0.0}, "hard_labels"], teacher=None, steps=1)
    inputs, labels = toys.rows(8, 5)
    labels[3:] = -100
    loss, _ = made.step(made.step.run.student, Batch(inputs, labels))
    torch.testing.assert_close(loss, F.cross_entropy(made.step.run.student(inputs), labels))


class Confused(torch.nn.Module):
    """Says class 1 where the first input is positive, class 0 elsewhere, and is quite sure."""

    def forward(self, inputs):
        return 12 * F.one_hot((inputs[:, 0] > 0).long(), toys.CLASSES).float()


def swapped() -> object:
    """Data on which the teacher's 0 means 1, and its 1 means 0."""
    data = toys.splits()
    data.validation.labels = (data.validation.inputs[:, 0] <= 0).long()
    return data


def test_a_teacher_that_swaps_two_classes_is_set_right_on_unlabelled_rows():
    data = swapped()
    batch = data.unlabelled.batch(torch.arange(8))
    found = seen({"name": "label_correction", "prior": 0.01}, batch=batch, teacher=Confused(), data=data)
    expected = (batch.inputs[:, 0] <= 0).long()
    assert torch.equal(found.targets.soft.argmax(-1), expected)
    assert float(found.targets.soft.softmax(-1).max(-1).values.min()) > 0.9


def test_labelled_rows_keep_the_teachers_word_unless_all_are_asked_for():
    data = swapped()
    batch = data.train.batch(torch.arange(8))
    raw = Confused()(batch.inputs)
    kept = seen("label_correction", teacher=Confused(), data=data).targets.soft
    assert torch.equal(kept, raw)
    everywhere = seen({"name": "label_correction", "rows": "all"}, teacher=Confused(), data=data).targets.soft
    assert not torch.allclose(everywhere.softmax(-1), raw.softmax(-1))


def test_a_teacher_that_is_right_is_left_as_it_is():
    data = swapped()
    data.validation.labels = 1 - data.validation.labels
    batch = data.unlabelled.batch(torch.arange(8))
    found = seen("label_correction", batch=batch, teacher=Confused(), data=data)
    torch.testing.assert_close(
        found.targets.soft.softmax(-1), Confused()(batch.inputs).softmax(-1), atol=1e-3, rtol=0
    )


def test_correction_without_trusted_labels_is_refused_before_step_0():
    data = toys.splits()
    data.validation = None
    with pytest.raises(ConfigError, match="no labelled rows in the validation split"):
        seen("label_correction", data=data)


def test_mixup_mixes_inputs_and_labels_with_one_share_and_asks_the_teacher_anew():
    data = toys.splits()
    found = seen({"name": "mixup", "alpha": 1.0}, data=data)
    inputs, labels = data.train.inputs[:8], F.one_hot(data.train.labels[:8], toys.CLASSES).float()
    for row in range(8):
        fits = []
        for other in range(8):
            gap = inputs[row] - inputs[other]
            share = ((found.batch.inputs[row] - inputs[other]) @ gap / (gap @ gap)).nan_to_num(1.0)
            same = torch.allclose(
                share * inputs[row] + (1 - share) * inputs[other], found.batch.inputs[row], atol=1e-4
            )
            label = share * labels[row] + (1 - share) * labels[other]
            fits.append(same and torch.allclose(label, found.batch.probabilities[row], atol=1e-3))
        assert any(fits)
    assert found.batch.labels is None
    assert not torch.equal(found.batch.inputs, inputs)
    torch.testing.assert_close(found.targets.soft, toys.net(16, seed=2)(found.batch.inputs).detach())


def test_masked_rows_are_not_mixed_in():
    data = toys.splits()
    batch = data.train.batch(torch.arange(8))
    mask = torch.arange(8) != 2
    inputs = batch.inputs.clone()
    inputs[2] = torch.inf
    found = seen("mixup", batch=Batch(inputs, batch.labels, batch.ids, mask=mask))
    assert torch.isfinite(found.batch.inputs[mask]).all()


def test_a_run_with_mixup_never_reads_kept_soft_labels():
    from stillhouse.training.labels import keep

    mixed = toys.loop(["mixup", "kd"], keep=keep, steps=12)
    plain = toys.loop("kd", keep=keep, steps=12)
    for made in (mixed, plain):
        made.run()
    assert mixed.step.teacher_calls >= 12
    assert plain.step.teacher_calls < 12


def test_augment_without_amounts_changes_nothing_and_both_models_see_one_change():
    still = {"name": "augment", "noise": 0.0}
    data = toys.splits()
    assert torch.equal(seen(still, data=data).batch.inputs, data.train.inputs[:8])
    batch = data.train.batch(torch.arange(8))
    twice = Batch(batch.inputs, batch.labels, batch.ids, teacher_inputs=batch.inputs * 2)
    found = seen({"name": "augment", "noise": 0.0, "shift": 3, "scale": 0.3}, batch=twice)
    torch.testing.assert_close(found.batch.teacher_inputs, 2 * found.batch.inputs)
    assert not torch.equal(found.batch.inputs, batch.inputs)


@pytest.mark.parametrize("name", ["mixup", "augment"])
def test_token_ids_are_refused_with_the_reason(name):
    tokens = Batch(torch.zeros(8, toys.FEATURES, dtype=torch.long), toys.rows(8)[1])
    with pytest.raises(ConfigError, match="expected real numbers"):
        seen(name, batch=tokens)


METHODS = [
    entry
    for entry in catalog.entries("method")
    if entry.distribution == catalog.OWN
    and not entry.value.startswith("stillhouse_transforms")
    and entry.name not in ("at", "minilm")  # want feature maps and self-attention, which toys have not
    and entry.name != "dkd"  # refuses class probabilities: see below
]
CHAIN = ["augment", "mixup", "label_correction", "label_smoothing"]


def behind(entry: catalog.Entry, *transforms: object) -> Loop:
    """A method behind transforms, with the settings of its conformance checks."""
    settings = dict(loaded(entry).conformance.settings)
    if entry.name == "tcmd":
        settings |= {"tasks": [[0, 1], [2, 3]], "alpha": 0.5}
    torch.manual_seed(0)  # of what the method makes beside the student
    return toys.loop([*transforms, {"name": entry.name, **settings}])


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_the_whole_chain_stands_before_any_method(entry):
    made = behind(entry, *CHAIN)
    before = toys.weights(made.step.run.target)
    made.run()
    rows = made.watcher.metrics
    assert len(rows) >= 12
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert not toys.same_bits(before, made.step.run.target)


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_a_transform_of_nothing_leaves_any_method_as_it_is(entry):
    alone, other = behind(entry), behind(entry, {"name": "label_smoothing", "amount": 0.0})
    for made in (alone, other):
        made.run()
    assert len(alone.watcher.metrics) == len(other.watcher.metrics)
    for mine, its in zip(alone.watcher.metrics, other.watcher.metrics, strict=True):
        assert its == pytest.approx(mine, rel=1e-4, abs=1e-6)


def test_class_probabilities_are_refused_by_tasks_with_heads_of_their_own():
    method = TCMD()
    with pytest.raises(ConfigError, match="leave out mixup and label_smoothing"):
        method._asked(torch.zeros(2, 4), Targets(probabilities=torch.full((2, 4), 0.25)), StepInfo())


def test_class_probabilities_are_refused_where_the_label_class_is_parted_from_the_others():
    with pytest.raises(ConfigError, match="leave out mixup and label smoothing"):
        toys.loop(["label_smoothing", "dkd"]).run()


def test_order_is_the_configs():
    smooth, mix = {"name": "label_smoothing", "amount": 0.3}, {"name": "mixup", "alpha": 1.0}
    one, other = (seen(*order).targets.probabilities for order in ((smooth, mix), (mix, smooth)))
    torch.testing.assert_close(
        one, other
    )  # batch hooks come before label hooks, in whatever order they are named

    class Sharpen(Method):
        api_version = 1
        requires = frozenset()
        supports = SUPPORTS

        @hookimpl
        def label_transform(self, targets):
            return Targets(targets.probabilities.argmax(-1), targets.soft)

    after, before = seen(smooth, Sharpen()).targets, seen(mix, Sharpen(), smooth).targets
    assert (after.labels.dtype, after.probabilities) == (torch.long, None)
    assert (before.labels, before.probabilities.dtype) == (None, torch.float32)


@pytest.mark.parametrize("name", ["label_smoothing", "label_correction", "mixup"])
def test_numbers_as_labels_have_no_classes_to_share_out(name):
    inputs = toys.rows(8)[0]
    with pytest.raises(ConfigError, match=rf"'{name}' .* has no meaning for regression"):
        DistillStep(
            [name, Seen()], student=toys.net(), teacher=toys.net(16, seed=2), probe=(inputs, inputs[:, :4])
        )


def test_mixup_mixes_rows_with_a_label_among_themselves():
    """Half a label would count as a whole labelled row."""
    labels = torch.where(torch.arange(16) % 2 == 0, torch.arange(16) % toys.CLASSES, IGNORE)
    made = toys.loop([{"name": "mixup", "alpha": 1.0}, "kd"], steps=1)
    batch = made.step.plugins.batch_transform(Batch(torch.randn(16, toys.FEATURES), labels), made.step.info)
    torch.testing.assert_close(batch.probabilities.sum(-1), (labels != IGNORE).float())
