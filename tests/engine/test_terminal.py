"""Printing that training outlives, without control characters."""

from __future__ import annotations

import os
import sys

import pytest

from stillhouse.terminal import Steady, show


@pytest.fixture
def broken():
    """A text stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    yield stream
    stream.close()


def test_a_pipe_that_nobody_reads_takes_all(broken):
    steady = Steady(broken)
    for _ in range(3):
        print("x" * 100_000, file=steady, flush=True)
    broken.write("what was left in the buffer")
    broken.flush()


def test_show_outlives_it_too(broken, monkeypatch):
    monkeypatch.setattr(sys, "stdout", broken)
    for _ in range(3):
        show("x" * 100_000)


def test_a_closed_stream_is_no_error(monkeypatch):
    with open(os.devnull, "w") as stream:
        pass
    Steady(stream).write("x")


def test_control_characters_are_shown_as_escapes(capsys):
    show("a\x1b[2Jb\u202e größe")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\u202e größe\n"


def test_what_it_is_asked_besides_is_the_streams(capsys):
    assert Steady(sys.stdout).encoding == sys.stdout.encoding
    assert Steady(sys.stdout).isatty() is sys.stdout.isatty()
