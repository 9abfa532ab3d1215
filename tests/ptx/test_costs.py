"""What the executed PTX moves and computes for each element, against the targets and the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .harness import logits, run
from .test_execute import target_of

ONE_PASS, TWO_PASSES, SPARSE = 3.2, 5.2, 2.3  # bytes of one element's size, for each element
SPECIAL, INSTRUCTIONS = 4.5, 45
DOCS = Path(__file__).parents[2] / "docs" / "kernels-cuda.md"

# kernel, with labels or not, V, what it may move; the targets of arithmetic that are missed stand in the documentation
CASES = [
    ("forward f32", False, 1000, ONE_PASS),
    ("forward f32", True, 4096, ONE_PASS),
    ("forward bf16", False, 32000, ONE_PASS),
    ("forward bf16", True, 32000, ONE_PASS),
    ("forward bf16 (8.0)", False, 128256, TWO_PASSES),
    ("forward bf16", False, 100, ONE_PASS),
    ("reverse f32", False, 4096, ONE_PASS),
    ("jsd f32", False, 1000, ONE_PASS),
    ("ghost bf16", True, 32000, SPARSE),
    ("sampled bf16", False, 32000, SPARSE),
]


def documented():
    """(kernel, with labels or not, V) -> (bytes, special, instructions) of the page's table."""
    rows = {}
    for line in DOCS.read_text().partition("| kernel | labels | V |")[2].splitlines()[2:]:
        if not line.startswith("|"):
            return rows
        name, labels, v, *numbers = (cell.strip(" *b") for cell in line.strip("|").split("|"))
        rows[name, labels == "yes", int(v.replace(",", ""))] = [float(x) for x in numbers]
    return rows


def cost(kernel, labels, v):
    """(bytes of an element's size, special, instructions for each element, part of the bytes that goes by less than 128 bits)."""
    name, dtype, *older = kernel.split()
    kind, divergence = (name, "forward") if name in {"ghost", "sampled"} else ("dense", name)
    rows = 16 if v <= 1000 else 2 if v <= 32000 else 1
    student, teacher = logits(rows, v, dtype)
    y = torch.arange(rows) if labels else None
    cc = (8, 0) if older else (9, 0)
    c = run(student, target_of(kind, teacher, 1.0), divergence=divergence, labels=y, cc=cc).counts
    elements, moved = rows * v, c.bytes_read + c.bytes_written
    size = 4 if dtype == "f32" else 2
    return moved / elements / size, c.special / elements, c.instructions / elements, c.narrow_bytes / moved


@pytest.mark.parametrize(("kernel", "labels", "v", "most"), CASES)
def test_a_kernel_moves_and_computes_what_the_documentation_says(kernel, labels, v, most, figure):
    moved, special, instructions, narrow = cost(kernel, labels, v)
    figure(
        f"cost {kernel:18} {'labels' if labels else '':6} V={v:6}: {moved:.2f} b/element, special {special:.2f}, "
        f"instructions {instructions:5.1f}, not by 128 bits {narrow:.2%}"
    )
    assert moved <= most
    assert narrow < 0.02 or v < 1000
    assert (moved, special, instructions) == pytest.approx(documented()[kernel, labels, v], abs=0.06)


def test_what_misses_its_target_stands_out_in_the_documentation():
    text = DOCS.read_text()
    for (kernel, _, v), (_, special, instructions) in documented().items():
        for number, target in ((special, SPECIAL), (instructions, INSTRUCTIONS)):
            line = next(x for x in text.splitlines() if x.startswith(f"| {kernel} |") and f"| {v:,} |" in x)
            assert number <= target or "**" in line
