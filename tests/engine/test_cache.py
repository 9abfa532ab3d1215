"""Tensors made once: read back whole, and made anew where anything they depend on changed."""

from __future__ import annotations

import pytest
import torch

from stillhouse import cache
from stillhouse.cache import CACHE, made_once
from stillhouse.errors import StillhouseWarning
from stillhouse.files.tensors import read_tensors, write_tensors

FROM = {"seed": 1, "library": "2.0"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self):
        self.asked += 1
        return {"x": torch.arange(6.0).view(2, 3), "nothing": torch.empty(0, 4), "y": torch.tensor([3, 1])}


def test_made_once_and_read_back():
    make = Maker()
    first, second = (made_once("data", FROM, make) for _ in range(2))
    assert make.asked == 1
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype
        assert torch.equal(second[name], tensor)
        assert second[name].data_ptr() % 64 == 0, (
            "aligned as a fresh tensor, whose products it shares to the bit"
        )


@pytest.mark.parametrize("other", [{"seed": 2, "library": "2.0"}, {"seed": 1, "library": "2.1"}, {"seed": 1}])
def test_what_depends_on_something_else_is_made_anew(other):
    make = Maker()
    made_once("data", FROM, make)
    made_once("data", other, make)
    assert make.asked == 2


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-3], lambda content: b"", lambda content: b"x" * 40]
)
def test_a_damaged_file_is_made_anew(damage, folder):
    make = Maker()
    made_once("data", FROM, make)
    (path,) = folder.rglob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(StillhouseWarning, match="it is made anew"):
        assert torch.equal(made_once("data", FROM, make)["y"], torch.tensor([3, 1]))
    made_once("data", FROM, make)
    assert make.asked == 2


def test_a_file_of_another_key_under_the_same_name_is_not_taken(folder):
    make = Maker()
    made_once("data", FROM, make)
    (path,) = folder.rglob("*.safetensors")
    tensors, _ = read_tensors(path)
    write_tensors(path, tensors, {"made_from": "another"})
    made_once("data", FROM, make)
    assert make.asked == 2


def test_a_folder_that_cannot_be_written_costs_only_time(folder):
    folder.write_text("a file stands where the folder would")
    with pytest.warns(
        StillhouseWarning, match=r"not kept for the next time: .*\$STILLHOUSE_CACHE names the folder"
    ):
        assert torch.equal(made_once("data", FROM, Maker())["y"], torch.tensor([3, 1]))


@pytest.mark.parametrize("place", [0, 9, 60, 200, -1])
def test_a_flipped_bit_is_found(place, folder):
    made_once("data", FROM, Maker())
    (path,) = folder.rglob("*.safetensors")
    changed = bytearray(path.read_bytes())
    changed[place] ^= 4
    path.write_bytes(changed)
    make = Maker()
    with pytest.warns(StillhouseWarning, match="it is made anew"):
        made_once("data", FROM, make)
    assert make.asked == 1
    made_once("data", FROM, make)
    assert make.asked == 1


def test_versions_of_torch_and_stillhouse_are_part_of_the_key(monkeypatch):
    make = Maker()
    made_once("data", FROM, make)
    monkeypatch.setattr(cache, "version", lambda name: "99")
    made_once("data", FROM, make)
    assert make.asked == 2
