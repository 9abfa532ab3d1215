"""What is seen while a study runs: counts, the time left, and on a terminal only what did not work."""

from __future__ import annotations

import io

import pytest
import rich.console
from invented import done, failed, planned

from stillhouse.study.live import Live, Screen
from stillhouse.study.plan import cells


@pytest.fixture
def plan():
    return planned(2, seeds=3)


def listed(plan):
    return cells(plan, {})


class TestLeft:
    def test_it_is_the_mean_of_the_cells_that_ended_for_each_that_is_left_over_the_workers(self, plan):
        live, six = Live(), listed(plan)
        with live.running(plan, {}, workers=2):
            assert live.left() == "time left unknown"
            for one, seconds in zip(six, (100.0, 200.0), strict=False):
                live.started(one)
                live.ended(one, done(one, 0.5, wall_seconds=seconds))
            # four are left, of 150 s each, two at once
            assert live.left() == "about 5 min left"

    def test_cells_that_were_there_before_count_as_done_and_say_nothing_of_time(self, plan):
        live, six = Live(), listed(plan)
        with live.running(plan, {one.digest: done(one, 0.5) for one in six[:4]}, workers=1):
            assert (live.done, live.total, live.left()) == (4, 6, "time left unknown")
            live.started(six[4])
            live.ended(six[4], done(six[4], 0.5, wall_seconds=40.0))
            assert live.left() == "about 40 s left"

    def test_one_that_failed_says_nothing_of_time(self, plan):
        live, six = Live(), listed(plan)
        with live.running(plan, {}, workers=1):
            live.started(six[0])
            live.ended(six[0], failed(six[0]))
            assert (live.done, live.failed, live.left()) == (1, 1, "time left unknown")


def test_a_pipe_has_a_line_for_every_cell(plan, capsys):
    live, six = Live(), listed(plan)
    with live.running(plan, {}, workers=1):
        for one, result in (
            (six[0], done(six[0], 0.5)),
            (six[1], failed(six[1], "loss is not finite\nmore")),
        ):
            live.started(one)
            live.ended(one, result)
    assert capsys.readouterr().out.splitlines() == [
        "[1/6] m0 on digits, seed 0: validation accuracy 0.5000, 3.0 s; about 15 s left",
        "[2/6] m0 on digits, seed 1: failed, loss is not finite; about 12 s left",
    ]


@pytest.mark.parametrize("nothing", ["", " \n"])
def test_an_error_that_says_nothing_is_told_by_its_type(plan, capsys, nothing):
    live, one = Live(), listed(plan)[0]
    with live.running(plan, {}, workers=1):
        live.started(one)
        live.ended(one, failed(one, nothing))
    assert "[1/6] m0 on digits, seed 0: failed, Diverged; " in capsys.readouterr().out


def test_a_cell_without_a_score_is_told_as_one(plan, capsys):
    live, six = Live(), listed(plan)
    with live.running(plan, {}, workers=1):
        live.started(six[0])
        live.ended(six[0], done(six[0], 0.5, scores={}))
    assert "m0 on digits, seed 0: no finite validation accuracy, 3.0 s" in capsys.readouterr().out


class TestScreen:
    @pytest.fixture
    def shown(self, monkeypatch):
        """What a terminal of 100 columns is sent."""
        made = io.StringIO()
        console = rich.console.Console

        def terminal():
            return console(file=made, force_terminal=True, width=100, color_system=None)

        monkeypatch.setattr("rich.console.Console", terminal)
        return made

    def test_what_did_not_work_stays_and_what_did_is_counted(self, plan, shown):
        screen, six = Screen(), listed(plan)
        with screen.running(plan, {}, workers=1):
            screen.started(six[0])
            screen.tick()
            screen.ended(six[0], done(six[0], 0.5))
            screen.started(six[1])
            screen.ended(six[1], failed(six[1]))
            screen.say("a remark")
        told = shown.getvalue()
        assert "0 of at most 6 cells, 1 running, 0 failed" in told
        assert "\n  m0 on digits, seed 0  " in told, "what runs"
        assert "2 of at most 6 cells, 0 running, 1 failed" in told
        assert "[2/6] m0 on digits, seed 1: failed, loss is not finite; about 12 s left" in told
        assert "[1/6]" not in told
        assert "a remark" in told

    def test_after_it_closed_lines_are_printed(self, plan, shown, capsys):
        screen = Screen()
        with screen.running(plan, {}, workers=1):
            pass
        screen.say("done")
        assert capsys.readouterr().out == "done\n"
