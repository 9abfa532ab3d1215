"""``stillhouse bench kernels``: what it prints and writes, not how fast anything is."""

import json

import pytest


def test_writes_every_time_and_a_plot(cli, tmp_path):
    said = cli(
        "bench", "kernels", "--quick", "--shapes", "8x10", "--rounds", "2", "--no-compile", "--no-linear",
        "--json", tmp_path / "times.json", "--plot", tmp_path / "times.png",
    )  # fmt: skip
    assert said.code == 0
    (result,) = json.loads((tmp_path / "times.json").read_text())["results"]
    assert result["shape"] == "8x10"
    assert (
        result["ms"].keys()
        == result["peak_mib"].keys()
        >= {"floor", "floor top-k", "eager", "fused", "fused in place", "fused top-k"}
    )
    assert all(len(times) == 2 and min(times) > 0 for times in result["ms"].values())
    assert all(name in said.out for name in result["ms"])
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words",
    [
        ("--shapes", "10"),
        ("--shapes", "0x10"),
        ("--shapes", "8x10", "axb"),
        ("--rounds", "0"),
        ("--rounds=-1",),
        ("--json", "no/such/folder/times.json"),
        ("--plot", "."),
        ("--plot", "times.foo"),
        ("--plot", "no/times.png"),
        ("--shapes", "99999999999999x10"),
    ],
)
def test_refuses_what_it_cannot_measure_or_write_before_it_starts(cli, words):
    said = cli("bench", "kernels", *words)
    assert said.code == 2
    assert all(part in said.err for part in ("got", "expected", "Fix:"))
    assert "backend" not in said.out


def test_refuses_a_device_that_is_not_there(cli, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = cli("--debug", "bench", "kernels", "--device", "cuda")
    assert said.code == 2
    assert "Fix: --device cpu" in said.out
