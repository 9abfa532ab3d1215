"""Compiled kernels on disk: only what the user's own processes wrote is loaded."""

import os
import stat

import pytest

from stillhouse.kernels import cache

CODE = b"machine code \n with lines"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    cache._say_refused.cache_clear()
    yield cache.folder()
    cache._say_refused.cache_clear()


def test_what_is_written_is_read_by_nobody_else(folder):
    assert cache.read("name") is None
    before = os.umask(0)
    try:
        assert cache.write("name", CODE)
    finally:
        os.umask(before)
    assert cache.read("name") == CODE
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "name").stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["name"]


def test_what_is_being_written_is_read_by_nobody_else_either(folder, monkeypatch):
    modes, replace = [], type(folder).replace

    def looked_at(half, path):
        modes.append(stat.S_IMODE(half.stat().st_mode))
        return replace(half, path)

    monkeypatch.setattr(type(folder), "replace", looked_at)
    before = os.umask(0)
    try:
        assert cache.write("name", CODE)
    finally:
        os.umask(before)
    assert modes == [0o600]


@pytest.mark.parametrize(
    "damage", [b"", b"nonsense", lambda x: x[:-1], lambda x: x[:-1] + b"?", lambda x: x + b"?"]
)
def test_what_is_damaged_is_not_there(folder, damage):
    cache.write("name", CODE)
    path = folder / "name"
    path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)
    assert cache.read("name") is None


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to(folder, mode):
    cache.write("name", CODE)
    folder.chmod(mode)
    with pytest.warns(RuntimeWarning, match=r"can be written to by other users.*STILLHOUSE_CACHE"):
        assert cache.read("name") is None


def test_a_folder_above_whose_entries_others_may_replace(folder):
    cache.write("name", CODE)
    folder.parent.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="can be written to"):
        assert cache.read("name") is None
    folder.parent.chmod(0o1777)  # as /tmp is: each may replace what is their own
    assert cache.read("name") == CODE


@pytest.mark.parametrize("mode", [0o660, 0o606, 0o666])
def test_a_file_that_others_may_write_to(folder, mode):
    cache.write("name", CODE)
    (folder / "name").chmod(mode)
    with pytest.warns(RuntimeWarning, match="can be written to"):
        assert cache.read("name") is None


def test_what_belongs_to_somebody_else(folder, monkeypatch):
    cache.write("name", CODE)
    me = os.geteuid()
    if me == 0:  # root's is anybody's to load, but not the other way round
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert cache.read("name") == CODE
        os.chown(folder / "name", 12346, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert cache.read("name") is None


def test_a_link_in_the_files_place(folder, tmp_path):
    cache.write("name", CODE)
    (folder / "name").rename(tmp_path / "elsewhere")
    (folder / "name").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match="not loaded"):
        assert cache.read("name") is None


def test_code_that_was_kept_under_another_name(folder):
    """It takes other arguments: run as this kernel it is wrong, or ends the process."""
    cache.write("other", CODE)
    (folder / "other").rename(folder / "name")
    assert cache.read("name") is None


def test_a_folder_that_cannot_be_looked_into(folder, monkeypatch):
    cache.write("name", CODE)
    if os.geteuid() == 0:

        def refused(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(type(folder), "lstat", refused)
        monkeypatch.setattr(type(folder), "stat", lambda path, **_: refused(path))
    else:
        folder.chmod(0)
    with pytest.warns(RuntimeWarning, match=r"Permission denied.*STILLHOUSE_CACHE"):
        assert cache.read("name") is None
    folder.chmod(0o700)


def test_a_folder_that_leads_to_itself(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "loop"))
    with pytest.warns(RuntimeWarning, match="STILLHOUSE_CACHE"):
        assert cache.read("name") is None
    assert not cache.write("name", CODE)


def test_the_advice_mends_what_it_is_given_for(folder, tmp_path):
    cache.write("name", CODE)
    (folder / "name").rename(tmp_path / "elsewhere")
    (folder / "name").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match=r"symbolic link.*delete what is there") as said:
        assert cache.read("name") is None
    assert "chmod" not in str(said[0].message)
    assert said[0].filename == __file__
    (folder / "name").unlink()
    assert cache.read("name") is None
    assert cache.write("name", CODE)
    assert cache.read("name") == CODE


def test_what_a_kill_left_is_removed(folder):
    cache.write("name", CODE)
    left = folder / ".other.0123456789ab.part"
    left.write_bytes(CODE)
    cache.write("name", CODE)
    assert left.exists(), "another process may be writing it"
    os.utime(left, (0, 0))
    cache.write("name", CODE)
    assert [path.name for path in folder.iterdir()] == ["name"]


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "file"))
    assert not cache.write("name", CODE)
    assert cache.read("name") is None


def test_numbas_own_folder_is_not_looked_at(tmp_path, monkeypatch):
    """It may be one in a shared temporary folder, from which a file of another user's once ran."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "shared"))
    assert tmp_path / "shared" not in (cache.folder(), *cache.folder().parents)
