"""The schedule of stages: lengths, the position, and the spans that share an optimizer."""

from __future__ import annotations

import warnings

import pytest
import toys

from stillhouse import Distillation
from stillhouse.api import Stage
from stillhouse.errors import StillhouseWarning
from stillhouse.training.stages import StageSchedule, stage_lengths

A, B, C = Stage("a", 1), Stage("b", 2), Stage("c", steps=4)
TRAINED = {"a": ("student",), "b": ("student",), "c": ("student", "kd.head")}


def schedule(*stages: Stage, steps: int | None = 9) -> StageSchedule:
    return StageSchedule(stages or (A, B, C), steps, lambda stage: TRAINED[stage.name])


def walk(made: StageSchedule) -> list[tuple[str, int, int]]:
    """Every update: the stage, those made in it before, and in the whole run."""
    seen = []
    while not made.over:
        while not made.stage_done:
            seen.append((made.stage.name, made.at.stage_step, made.at.step))
            made.advance()
        made.leave()
    return seen


@pytest.mark.parametrize(
    ("shares", "steps", "lengths"),
    [
        ((1, 6, 2), 9000, [1000, 6000, 2000]),
        ((1, 1, 1), 10, [3, 4, 3]),
        ((0, 1), 5, [0, 5]),
        ((1, 1, 1), 1, [0, 1, 0]),
    ],
)
def test_lengths_share_the_updates_out_to_the_last_one(shares, steps, lengths):
    got = stage_lengths([Stage(str(n), share) for n, share in enumerate(shares)], steps)
    assert sum(got) == steps
    assert got == lengths


def test_a_stage_with_a_length_of_its_own_is_on_top():
    assert stage_lengths([Stage("a"), Stage("b", steps=7), Stage("c")], 10) == [5, 7, 5]
    assert stage_lengths([Stage("b", steps=7)], 10) == [7]


def test_walks_through_the_stages_to_the_end():
    made = schedule(steps=3)
    assert made.lengths == [1, 2, 4]
    seen = walk(made)
    assert [stage for stage, _, _ in seen] == ["a", "b", "b", "c", "c", "c", "c"]
    assert [step for _, step, _ in seen] == [0, 0, 1, 0, 1, 2, 3]
    assert [step for _, _, step in seen] == list(range(7))
    assert (made.stage.name, made.length, made.span) == ("c", 4, 1), "the last one when all have ended"


def test_an_empty_stage_is_passed_without_an_update():
    assert [stage for stage, _, _ in walk(schedule(Stage("a", 0), B, steps=2))] == ["b", "b"]


def test_neighbours_that_train_the_same_share_a_span():
    made = schedule()
    assert [(span.trained, span.updates) for span in made.spans] == [
        (("student",), 9),
        (("student", "kd.head"), 4),
    ]
    spans = []
    while not made.over:
        spans.append(made.span)
        made.leave()
    assert spans == [0, 0, 1]


def test_stages_that_train_the_same_apart_have_spans_of_their_own():
    made = schedule(A, C, B)
    assert [span.updates for span in made.spans] == [3, 4, 6]


def test_without_a_length_a_stage_has_no_end():
    made = schedule(A, steps=None)
    for _ in range(100):
        made.advance()
    assert not made.stage_done
    assert (made.known, made.length, made.at.step) == (False, 0, 100)


def test_jumps_to_a_stages_beginning_and_counts_the_run_on():
    made = schedule()
    for _ in range(2):
        made.advance()
    made.jump(B)
    assert (made.stage, made.at.stage_step, made.at.step) == (B, 0, 2)


def test_the_position_comes_back():
    made = schedule()
    for _ in range(3):
        made.advance()
    made.leave()
    made.advance()
    state = made.state_dict()
    assert state == {"stage": 1, "stage_step": 1, "step": 4}
    made.advance()
    again = schedule()
    again.load_state_dict(state)
    assert (again.stage, again.at.stage_step, again.at.step) == (B, 1, 4), "a state is a copy"
    assert walk(again) == [("b", done, 3 + done) for done in range(1, 6)] + [
        ("c", n, 9 + n) for n in range(4)
    ]


class TestALoopOfAnotherLength:
    """Methods share ``steps`` out between stages and schedules: a loop that makes fewer or more is told."""

    @staticmethod
    def attach(steps: int | None, method: str = "pddm"):
        return Distillation(method, teacher=toys.net(12, seed=1)).attach(
            toys.net(), probe=toys.rows(4), steps=steps
        )

    def run(self, steps: int | None, made: int, method: str = "kd") -> None:
        with self.attach(steps, method) as step:
            for _ in range(made):
                step(step.run.student, toys.rows(4)).loss.backward()
                step.zero_grad()

    def test_a_shorter_one_is_told_at_its_end(self):
        with pytest.warns(
            StillhouseWarning,
            match=r"ended after 3 updates, of 5 that the stages have; expected steps= as many",
        ):
            self.run(5, 3)

    def test_stages_that_never_began_are_named(self):
        with pytest.warns(
            StillhouseWarning,
            match=r"ended after 1 updates, of 6 that the stages have, and the stages \w+.* never began",
        ):
            self.run(6, 1, "sld")

    def test_a_longer_one_is_told_once_at_its_first_update_too_many(self):
        with pytest.warns(
            StillhouseWarning, match=r"update 3 begins, of 2 that the stages have: the last one goes on"
        ) as told:
            self.run(2, 6)
        assert len(told) == 1

    @pytest.mark.parametrize(("steps", "made"), [(3, 3), (None, 2), (4, 0)])
    def test_one_as_long_as_it_said_is_not(self, steps, made):
        with warnings.catch_warnings():
            warnings.simplefilter("error", StillhouseWarning)
            self.run(steps, made)
