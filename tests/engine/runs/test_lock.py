"""One run at a time in a directory; what a killed run left behind holds nobody up."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from stillhouse.errors import CheckpointError
from stillhouse.files import lock
from stillhouse.files.lock import LOCK, InUse, Lock, alive, holder

HOLDS = "import sys, time, pathlib\nfrom stillhouse.files.lock import Lock\nheld = Lock(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(600)\n"


@pytest.fixture
def elsewhere(tmp_path):
    """A process that holds the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_one_is_told_who_holds_it(tmp_path, elsewhere):
    with pytest.raises(
        InUse, match=rf"is in use: process {elsewhere.pid} on .*choose another place with out=DIR"
    ):
        Lock(tmp_path / "run")
    assert holder(tmp_path / "run")["pid"] == elsewhere.pid


def test_one_that_was_killed_holds_nothing(tmp_path, elsewhere):
    elsewhere.send_signal(signal.SIGKILL)
    elsewhere.wait()
    assert (tmp_path / "run" / LOCK).is_file(), "it could not clear up"
    assert holder(tmp_path / "run") is None
    with Lock(tmp_path / "run"):
        assert holder(tmp_path / "run")["pid"] == os.getpid()


def test_two_runs_of_one_process_exclude_each_other(tmp_path):
    with Lock(tmp_path / "run"), pytest.raises(InUse):
        Lock(tmp_path / "run")
    Lock(tmp_path / "run").release()


def test_a_directory_that_was_made_for_nothing_is_removed_again(tmp_path):
    with Lock(tmp_path / "a" / "b" / "run"):
        assert (tmp_path / "a" / "b" / "run" / LOCK).is_file()
    assert not (tmp_path / "a").exists()
    with Lock(tmp_path / "a" / "b" / "run"):
        (tmp_path / "a" / "b" / "run" / "x").touch()
    assert [path.name for path in (tmp_path / "a" / "b" / "run").iterdir()] == ["x"]


def test_where_there_are_no_locks_the_file_says_who_runs(tmp_path, monkeypatch, elsewhere):
    import errno
    import fcntl

    def none(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(lock, "_GLANCE", 0.05)
    with pytest.raises(InUse):
        Lock(tmp_path / "run")
    elsewhere.kill()
    elsewhere.wait()
    Lock(tmp_path / "run").release()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"pid": 2**22 + 5}, False),
        ({"boot": "before"}, False),
        ({"host": "another", "pid": 1}, True),
        ({"pid": "x"}, True),
    ],
)
def test_who_may_still_run(change, expected):
    me = {"pid": os.getpid(), "host": socket.gethostname(), "boot": lock._boot()}
    assert alive({**me, **change}) is expected


def test_a_lock_file_that_says_nothing_is_no_error(tmp_path):
    (tmp_path / LOCK).write_text("{" + json.dumps("x"))
    with Lock(tmp_path):
        pass


def test_a_directory_that_was_moved_is_no_longer_held(tmp_path):
    folder = tmp_path / "run"
    with Lock(folder) as lock:
        lock.check()
        folder.rename(tmp_path / "moved")
        with pytest.raises(CheckpointError, match="no longer the directory"):
            lock.check()
        with Lock(folder):  # another run's by now
            with pytest.raises(CheckpointError, match="no longer the directory"):
                lock.check()
            lock.release()
            assert (folder / LOCK).is_file(), "the other's lock stays"
