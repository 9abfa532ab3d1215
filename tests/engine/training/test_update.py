"""An update: announced, counted after transforms and over ranks, filled part by part, closed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toys
from torch import nn

from stillhouse.api import IGNORE, Batch, LossTerm, hookimpl
from stillhouse.errors import ConfigError
from stillhouse.training.step import DistillStep


def micros(*sizes: int) -> list[Batch]:
    """Micro-batches of these sizes; the first sample of each has no label, the last is masked."""
    found = []
    for number, size in enumerate(sizes):
        x, y = toys.rows(size, number)
        y[0] = IGNORE
        found.append(Batch(x, y, mask=torch.arange(size) < size - 1))
    return found


def step_of(*methods: object, **given: object) -> DistillStep:
    given = {"student": toys.net(), "probe": toys.rows(4), **given}
    return DistillStep(list(methods) or [toys.Squares()], **given)


class Halves(toys.Squares):
    """Leaves every other sample out, and says how many it saw."""

    @hookimpl
    def batch_transform(self, batch, info):
        info.log("seen", float(len(batch)))
        return replace(batch, inputs=batch.inputs[::2], labels=batch.labels[::2], mask=batch.mask[::2])


class TestAnnounced:
    def test_rows_of_all_parts_are_counted_together(self):
        step = step_of()
        step.begin_update(micros(3, 5))
        info = step.info
        assert (info.rows, info.labelled, info.micros, step.update.open) == (6, 4, 2, 2)

    def test_parts_come_out_in_order_each_with_its_share(self):
        step, given = step_of(), micros(3, 5)
        step.begin_update(given)
        seen = []
        for batch in given:
            part = step.update.part(batch)
            seen.append((len(part), step.info.micro, step.info.share, step.info.last))
            step.update.made({})
        assert seen == [(3, 0, 2 / 6, False), (5, 1, 4 / 6, True)]
        assert step.update.open == 0

    def test_rows_are_counted_after_batch_transforms(self):
        step, given = step_of(Halves()), micros(3, 5)
        step.begin_update(given)
        assert (step.info.rows, step.info.labelled) == (1 + 2, 0 + 1)
        assert len(step.update.part(given[0])) == 2

    def test_a_batch_with_no_valid_row_counts_as_one(self):
        """So that a mean over nothing is 0 and not NaN."""
        step = step_of()
        step.begin_update([replace(micros(3)[0], mask=torch.zeros(3, dtype=torch.bool))])
        assert (step.info.rows, step.info.labelled) == (1.0, 0.0)

    def test_rows_are_summed_over_ranks_by_the_hosts_reduce(self):
        told = []

        def reduce(counts: torch.Tensor) -> torch.Tensor:
            told.append((counts.tolist(), counts.dtype))
            return counts + torch.tensor([10.0, 7.0])

        step = step_of(reduce=reduce)
        (batch,) = given = micros(5)
        step.begin_update(given)
        step.update.part(batch)
        assert told == [([4.0, 3.0], torch.float64)]
        assert (step.info.rows, step.info.labelled, step.info.share) == (14, 10, 4 / 14)

    @pytest.mark.parametrize("given", [micros(4)[0], toys.rows(4), {"inputs": toys.rows(4)[0]}], ids=str)
    def test_another_part_than_was_announced_is_refused(self, given):
        class Named(nn.Module):
            def forward(self, inputs):
                return inputs[:, :4]

        announced = {"inputs": toys.rows(3)[0]} if isinstance(given, dict) else micros(3)[0]
        step = step_of(
            student=Named(), probe={"inputs": toys.rows(3)[0]} if isinstance(given, dict) else toys.rows(3)
        )
        step.begin_update([announced])
        with pytest.raises(ConfigError, match=r"inputs\S* of shape \(3, 6\), and one of \(4, 6\) came"):
            step.update.part(given)

    @pytest.mark.parametrize("transformed", [False, True])
    def test_announced_parts_in_another_order_are_refused(self, transformed):
        step = step_of(Halves() if transformed else toys.Squares())
        first, second = micros(5, 5)
        step.begin_update([first, second])
        with pytest.raises(
            ConfigError, match=r"one with other inputs came; expected the micro-batches in the order"
        ):
            step.update.part(second)

    def test_a_part_that_was_copied_on_its_way_is_the_announced_one(self):
        step = step_of()
        first, second = micros(5, 5)
        step.begin_update([first, second])
        assert step.update.part(replace(first, inputs=first.inputs.clone())) is first

    def test_another_kind_of_batch_than_was_announced_is_refused(self):
        step = step_of()
        step.begin_update(micros(5))
        with pytest.raises(
            ConfigError, match=r"told of a micro-batch with inputs, and one with inputs.x came"
        ):
            step.update.part({"x": toys.rows(5)[0]})


class TestCountedByTheTrainer:
    def test_rows_are_the_trainers(self):
        step = step_of()
        step.begin_update(rows=10, labelled=3, micros=2)
        batch = micros(5)[0]
        step.update.part(batch)
        assert (step.info.rows, step.info.labelled, step.info.micros, step.info.share) == (10, 3, 2, 0.4)
        step.begin_update(rows=10)
        assert (step.info.labelled, step.info.micros) == (10, 1)

    def test_rows_without_a_word_of_labels_are_all_labelled_or_none(self):
        step = step_of()
        x, y = toys.rows(5)
        for batch, labelled in ((Batch(x, y), 10), (Batch(x), 0), (Batch(x, torch.full_like(y, IGNORE)), 0)):
            step.begin_update(rows=10, micros=2)
            for _ in range(2):
                step.update.part(batch)
                assert step.info.labelled == labelled
                step.update.made({})

    @pytest.mark.parametrize("unlabelled", [(0, 1), (1, 0), (0.5, 0.5)])
    def test_partly_labelled_rows_without_a_word_of_labels_are_refused(self, unlabelled):
        """Else the cross-entropy would be divided by rows that have no label."""
        step = step_of()
        x, y = toys.rows(4)
        step.begin_update(rows=8, micros=2)
        found = [Batch(x, torch.where(torch.arange(4) < 4 * part, IGNORE, y)) for part in unlabelled]
        if unlabelled[0] in (0, 1):
            step.update.part(found[0])
            step.update.made({})
        with pytest.raises(
            ConfigError, match=r"came without labelled=.*expected labelled=, the update's rows with one"
        ):
            step.update.part(found[1])

    @pytest.mark.parametrize(
        "given",
        [{"rows": 0}, {"rows": 4, "labelled": 5}, {"rows": 4, "labelled": -1}, {"rows": 4, "micros": 0}],
        ids=str,
    )
    def test_counts_that_cannot_be_are_refused(self, given):
        with pytest.raises(ConfigError, match=r"begin_update got rows=.*expected rows above 0"):
            step_of().begin_update(**given)

    def test_a_transform_that_changes_their_number_is_refused(self):
        step = step_of(Halves())
        step.begin_update(rows=4)
        with pytest.raises(ConfigError, match=r"made 2 rows of 4, and they had been counted before it"):
            step.update.part(micros(5)[0])

    def test_nothing_told_is_refused(self):
        with pytest.raises(ConfigError, match=r"neither batches nor rows"):
            step_of().begin_update()

    def test_an_update_of_no_batch_is_refused(self):
        with pytest.raises(ConfigError, match=r"expected"):
            step_of().begin_update([])


class TestMetrics:
    def test_are_summed_over_the_parts_and_handed_out_once(self):
        step = step_of()
        step.begin_update(micros(3, 5))
        for value in (1.0, 2.5):
            step.update.made({"a": torch.tensor(value), f"only{value}": torch.tensor(1.0)})
        assert {name: float(value) for name, value in step.update.close().items()} == {
            "a": 3.5,
            "only1.0": 1.0,
            "only2.5": 1.0,
        }
        assert step.update.close() == {}

    def test_what_hooks_log_stands_beside_the_terms_and_adds_nothing_to_the_loss(self):
        class Logs(toys.Squares):
            @hookimpl
            def loss_terms(self, student_out, batch, info):
                info.log("share", info.share)
                return {"one": LossTerm(student_out.logits.sum() * 0 + info.share)}

        step, given = step_of(Logs()), micros(3, 5)
        step.begin_update(given)
        for batch in given:
            step(step.run.student, batch)
        made = {name: float(value) for name, value in step.end_update().items()}
        assert made == pytest.approx({"logs.one": 1.0, "logs.share": 1.0, "loss": 1.0})

    def test_what_a_batch_transform_logs_is_shown_too(self):
        step, given = step_of(Halves()), micros(6, 8)
        step.begin_update(given)
        for batch in given:
            step(step.run.student, batch)
        assert float(step.end_update()["halves.seen"]) == 14.0

    def test_parts_that_never_came_are_forgotten_with_their_update(self):
        step, given = step_of(), micros(3, 5)
        step.begin_update(given)
        step.begin_update(rows=4, labelled=3)
        (batch,) = micros(5)
        assert step.update.part(batch) is batch

    def test_an_update_that_failed_is_forgotten(self):
        step, given = step_of(), micros(3, 5)
        given[1] = replace(given[1], inputs=torch.zeros(5, 9))
        step.begin_update(given)
        step(step.run.student, given[0])
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            step(step.run.student, given[1])
        assert step.update.open == 0
        assert step.end_update() == {}
        assert step.info.index == 0, "it was none"
        step(step.run.student, given[0])
        assert step.info.rows == 2
