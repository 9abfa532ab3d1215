"""Files: whole or not there, as they were written or refused, and nobody else's."""

from __future__ import annotations

import errno
import json
import os
import random
import time
from pathlib import Path

import pytest
import torch

from stillhouse.errors import DamagedFile, NotPrivate, StillhouseError, WriteFailed, printable
from stillhouse.files import (
    digest,
    read_bytes,
    read_json,
    read_text,
    sweep,
    write_bytes,
    write_json,
    write_text,
    writing,
)
from stillhouse.files.private import not_private, private_folder
from stillhouse.files.tensors import read_tensors, tensor_bytes, write_tensors

TENSORS = {"x": torch.arange(6.0).view(2, 3), "nothing": torch.empty(0, 4), "n": torch.tensor([3, 1])}


class TestWriting:
    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_keeps_the_umask(self, tmp_path, umask, mode):
        before = os.umask(umask)
        try:
            write_text(tmp_path / "a", "x")
        finally:
            os.umask(before)
        assert (tmp_path / "a").stat().st_mode & 0o777 == mode

    @pytest.mark.parametrize("fails", ["fsync", "open"])
    @pytest.mark.parametrize(
        ("number", "remedy"),
        [(errno.ENOSPC, "free some space"), (errno.EFBIG, "ulimit"), (errno.EACCES, "permissions")],
    )
    def test_a_failure_names_the_file_and_the_remedy_and_leaves_the_old_one(
        self, tmp_path, monkeypatch, fails, number, remedy
    ):
        write_text(tmp_path / "a", "before")

        def full(*given):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patched:
            patched.setattr(writing.os, fails, full)
            with pytest.raises(WriteFailed, match=remedy) as caught:
                write_text(tmp_path / "a", "after")
        assert str(tmp_path / "a") in str(caught.value)
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == number
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert read_text(tmp_path / "a") == "before"

    def test_works_where_the_system_has_no_fchmod(self, tmp_path, monkeypatch):
        monkeypatch.delattr(os, "fchmod")
        write_text(tmp_path / "a", "x")

    def test_json_has_no_word_for_nan(self, tmp_path):
        write_json(tmp_path / "a", {"x": float("nan"), "y": [float("inf"), 1.5], "z": {"w": -float("inf")}})

        def none(word):
            raise AssertionError(word)

        found = json.loads((tmp_path / "a").read_text(), parse_constant=none)
        assert found == {"x": None, "y": [None, 1.5], "z": {"w": None}}

    def test_what_a_kill_left_is_swept_and_nothing_else(self, tmp_path):
        for name in (".a.0123456789ab.part", ".git", "a", ".a.part", "x.0123456789ab.part"):
            (tmp_path / name).touch()
        sweep(tmp_path, older=3600)
        assert len(list(tmp_path.iterdir())) == 5, "it may still be being written"
        old = time.time() - 7200
        os.utime(tmp_path / ".a.0123456789ab.part", (old, old))
        sweep(tmp_path, older=3600)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            ".a.part",
            ".git",
            "a",
            "x.0123456789ab.part",
        ]
        sweep(tmp_path / "nowhere")


class TestReading:
    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda path: None, "it is missing"),
            (lambda path: path.mkdir(), "Is a directory"),
            (lambda path: os.mkfifo(path), "it is no regular file"),
            (lambda path: path.write_bytes(b"\xff\xfe"), "it is no text in UTF-8"),
            (lambda path: path.write_bytes(b"x" * 20), "it has 20 bytes, expected at most 9"),
        ],
    )
    def test_says_what_is_wrong(self, tmp_path, make, said):
        make(tmp_path / "a")
        with pytest.raises(DamagedFile, match=said) as caught:
            read_text(tmp_path / "a", what="the notes", mend="write them again", limit=9)
        assert str(caught.value).startswith(f"the notes {tmp_path / 'a'} can't be read: ")
        assert str(caught.value).endswith("; write them again")

    def test_a_nul_in_a_name_is_told(self):
        with pytest.raises(DamagedFile, match="null byte"):
            read_bytes(Path("a\0b"))

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("{", "it is no JSON"),
            ("[" * 99999, "it is no JSON"),
            ("[1]", "it holds list, expected an object"),
        ],
    )
    def test_json_that_is_none(self, tmp_path, content, said):
        (tmp_path / "a").write_text(content)
        with pytest.raises(DamagedFile, match=said):
            read_json(tmp_path / "a")

    def test_the_digest_is_that_of_the_content(self, tmp_path):
        import hashlib

        content = random.Random(0).randbytes(3_000_000)
        write_bytes(tmp_path / "a", content)
        assert digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()
        with pytest.raises(DamagedFile, match="missing"):
            digest(tmp_path / "b")


class TestSeals:
    """One bit anywhere, one byte less or more: refused."""

    def kinds(self, folder: Path):
        write_json(folder / "a.json", {"x": 1, "name": "größe"}, sealed=True)
        yield folder / "a.json", lambda path: read_json(path, sealed=True)
        write_tensors(folder / "a.safetensors", TENSORS, {"made_from": "this"})
        yield folder / "a.safetensors", read_tensors

    def test_a_flipped_bit_in_any_byte_is_found(self, tmp_path):
        for path, read in self.kinds(tmp_path):
            whole = path.read_bytes()
            read(path)
            for place in range(len(whole)):
                changed = bytearray(whole)
                changed[place] ^= 1 << place % 8
                path.write_bytes(changed)
                with pytest.raises(DamagedFile):
                    read(path)

    @pytest.mark.parametrize(
        "damage", [lambda c: c[:-1], lambda c: c + b"\n", lambda c: b"", lambda c: c[:40]]
    )
    def test_other_damage_is_found(self, tmp_path, damage):
        for path, read in self.kinds(tmp_path):
            path.write_bytes(damage(path.read_bytes()))
            with pytest.raises(DamagedFile):
                read(path)


class TestTensors:
    def test_come_back_as_they_were_with_what_was_said_of_them(self, tmp_path):
        write_tensors(tmp_path / "a", TENSORS, {"made_from": "this"})
        found, about = read_tensors(tmp_path / "a")
        assert about == {"made_from": "this"}
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert torch.equal(found[name], tensor)

    def test_that_share_memory_are_each_there(self, tmp_path):
        tied = torch.arange(6.0)
        write_bytes(tmp_path / "a", tensor_bytes({"a": tied, "b": tied, "c": tied[2:], "d": tied[:0]}))
        found, _ = read_tensors(tmp_path / "a", sealed=False)
        assert {name: tensor.tolist() for name, tensor in found.items()} == {
            "a": [0, 1, 2, 3, 4, 5], "b": [0, 1, 2, 3, 4, 5], "c": [2, 3, 4, 5], "d": []
        }  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no such bits")
class TestPrivate:
    def test_a_folder_of_ones_own_is_made_for_oneself(self, tmp_path):
        made = private_folder(tmp_path / "a" / "b")
        assert made.stat().st_mode & 0o777 == 0o700
        assert not not_private(made)
        assert private_folder(made) == made

    @pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
    def test_one_that_others_may_write_to_is_refused(self, tmp_path, mode):
        (tmp_path / "a").mkdir()
        (tmp_path / "a").chmod(mode)
        with pytest.raises(NotPrivate, match="may be written to by others"):
            private_folder(tmp_path / "a")

    def test_a_file_is_as_private_as_its_folders(self, tmp_path):
        folder = private_folder(tmp_path / "a")
        (folder / "x").touch(0o644)
        assert not not_private(folder / "x")
        (folder / "x").chmod(0o666)
        assert "may be written to by others" in not_private(folder / "x")
        (folder / "x").chmod(0o644)
        folder.chmod(0o1777)
        assert "may be written to by others" in not_private(folder / "x"), "anyone may have put it there"
        folder.chmod(0o700)
        link = tmp_path / "open"
        link.mkdir()
        link.chmod(0o777)
        (link / "to").symlink_to(folder)
        assert not not_private(link / "to" / "x"), "what a link leads to is what counts"

    @pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="giving a file away needs root")
    def test_another_users_is_refused(self, tmp_path):
        (tmp_path / "x").touch()
        os.chown(tmp_path / "x", 12345, 12345)
        assert "belongs to another user (12345)" in not_private(tmp_path / "x")

    def test_what_is_not_there_is_not_private(self, tmp_path):
        assert "No such file" in not_private(tmp_path / "x")


def test_errors_are_printed_without_control_characters():
    said = str(StillhouseError("name \x1b[2J\u202e\x9b and größe\n\tx"))
    assert said == "name \\x1b[2J\\u202e\\x9b and größe\n\tx"
    assert printable("größe 模型") == "größe 模型"
