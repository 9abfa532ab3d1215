"""Registers, spills and the width of global accesses, from the assembler's report and the machine code."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from stillhouse.kernels.cuda import build
from stillhouse.kernels.cuda.plan import plan

from .harness import ptx_of

REGISTERS = 64  # of 65,536 a multiprocessor has, two blocks of 512 threads can have this many each
REGISTERS_WARP = 85  # of a warp a row, of which a multiprocessor has 24 blocks
REGISTERS_OTHERS = (
    102  # of jsd and with labels, of which it has 640 threads: with 768 a bf16 jsd spilled on 8.0
)
REGISTERS_BOTH = (
    128  # of jsd with labels, and of these in blocks of 512, of which one lives on a multiprocessor
)


def tools() -> Path | None:
    """The folder of ptxas and cuobjdump of the wheels; a system's own may be too old for this PTX."""
    found = find_spec("nvidia")
    for root in found.submodule_search_locations if found else ():
        for folder in Path(root).glob("cu*/bin"):
            if all((folder / name).exists() for name in ("ptxas", "cuobjdump", "nvdisasm")):
                return folder
    return None


needs_tools = pytest.mark.skipif(
    tools() is None,
    reason="needs the wheels nvidia-cuda-nvcc, nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm",
)


@cache
def assembled(spec, cc, folder):
    """(what ptxas reports, the cubin)."""
    source, cubin = Path(folder) / f"{spec.name}.ptx", Path(folder) / f"{spec.name}.cubin"
    source.write_text(ptx_of(spec, cc))
    command = [tools() / "ptxas", "-v", f"-arch=sm_{cc[0]}{cc[1]}", source, "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr, cubin


def resources(report):
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    stack = int(re.search(r"(\d+) bytes stack frame", report)[1])
    local = re.search(r"(\d+) bytes lmem", report)
    return (
        int(re.search(r"Used (\d+) registers", report)[1]),
        sum(spills),
        stack,
        int(local[1]) if local else 0,
    )


def loops_of(cubin):
    """The bodies of the innermost backward branches of the machine code."""
    environment = os.environ | {"PATH": f"{tools()}:{os.environ['PATH']}"}
    command = [tools() / "cuobjdump", "-sass", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    lines = {int(at, 16): code for at, code in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)}
    spans = []
    for at, code in lines.items():
        target = re.search(r"BRA.*?(0x[0-9a-f]+)", code)
        if target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    innermost = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[code for at, code in lines.items() if low <= at <= high] for low, high in innermost]


SHAPES = [
    (4096, "f32", "forward", "dense", (9, 0), False),
    (32000, "bf16", "forward", "dense", (9, 0), False),
    (32000, "bf16", "forward", "dense", (9, 0), True),
    (128256, "bf16", "forward", "dense", (8, 0), False),
    (1000, "bf16", "forward", "dense", (9, 0), True),
    (262144, "bf16", "forward", "dense", (10, 0), False),
    (1000, "f32", "jsd", "dense", (9, 0), False),
    (1000, "bf16", "jsd", "dense", (10, 0), True),
    (50257, "f32", "jsd", "dense", (8, 0), False),
    (32000, "bf16", "forward", "top-k", (9, 0), True),
    (32000, "f32", "forward", "sampled", (9, 0), True),
]
EVERY = [
    (v, dtype, divergence, target, cc, labels)
    for v in (1000, 4096, 32000, 50257, 262144)
    for dtype in ("f32", "bf16", "f16")
    for divergence in ("forward", "reverse", "jsd")
    for target in ("dense", "top-k", "sampled")
    for cc in ((8, 0), (9, 0), (10, 0))
    for labels in (False, True)
    if divergence == "forward" or target != "sampled"
]


def limit(spec):
    costly = (spec.divergence == "jsd") + spec.labels
    if costly == 2 or (costly and spec.threads == 512):
        return REGISTERS_BOTH
    if costly:
        return REGISTERS_OTHERS
    return REGISTERS_WARP if spec.threads == 32 else REGISTERS


def check_resources(v, dtype, divergence, target, cc, labels, folder, figure):
    spec = plan(64, v, dtype, divergence, target, cc, labels=labels).spec
    registers, spills, stack, local = resources(assembled(spec, cc, str(folder))[0])
    figure(
        f"ptxas sm_{cc[0]}{cc[1]} {spec.name}: {registers} registers, {spills} bytes spilled, "
        f"{stack} stack, {local} local"
    )
    assert (spills, stack, local) == (0, 0, 0)
    assert registers <= limit(spec)


@needs_tools
@pytest.mark.parametrize(("v", "dtype", "divergence", "target", "cc", "labels"), SHAPES)
def test_nothing_spills(v, dtype, divergence, target, cc, labels, tmp_path, figure):
    check_resources(v, dtype, divergence, target, cc, labels, tmp_path, figure)


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize(("v", "dtype", "divergence", "target", "cc", "labels"), EVERY)
def test_nothing_spills_in_any_variant(v, dtype, divergence, target, cc, labels, tmp_path, figure):
    check_resources(v, dtype, divergence, target, cc, labels, tmp_path, figure)


@needs_tools
@pytest.mark.parametrize(("v", "dtype"), [(1000, "f32"), (4096, "f32"), (32000, "bf16")])
def test_hot_loops_move_128_bits_at_a_time(v, dtype, tmp_path, figure):
    spec = plan(64, v, dtype, "forward", "dense", (9, 0)).spec
    loops = loops_of(assembled(spec, (9, 0), str(tmp_path))[1])
    hot = [body for body in loops if any(re.search(r"\b(LDG|STG)\S*\.128", c) for c in body)]
    # both passes, and what clears a row; its edges go element by element
    per = 4 if dtype == "f32" else 8
    assert len([body for body in hot if sum("MUFU.EX2" in c for c in body) >= 2 * per]) == 2
    assert len(hot) >= 3
    for body in hot:
        moves = [code for code in body if re.search(r"\b(LDG|STG)\.", code)]
        wide = sum(".128" in code for code in moves)
        figure(f"SASS sm_90 {spec.name}: a loop of {len(body)} instructions for a vector, "
               f"{wide} of {len(moves)} global accesses 128 bits wide")  # fmt: skip
        assert moves
        assert wide == len(moves)
        assert not any(re.search(r"\b(LDL|STL)\b", code) for code in body)


def test_a_second_process_finds_the_cubin_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    spec = plan(64, 4096, "f32", "forward", "dense", (9, 0)).spec
    text = ptx_of(spec, (9, 0))
    monkeypatch.setattr(build, "compile_ptx", lambda spec, cc: text)
    first = build.cubin(spec, (9, 0))
    monkeypatch.setattr(build, "compile_ptx", None)  # not needed again
    assert build.cubin(spec, (9, 0)) == first
    assert first[:4] == b"\x7fELF"
