"""What the executed PTX moves and computes for each element, against the targets."""

from __future__ import annotations

from pathlib import Path

import pytest

from .harness import logits, run
from .test_execute import target_of

ONE_PASS, TWO_PASSES = 3.2, 5.2  # bytes of one element's size, for each element
SPECIAL, INSTRUCTIONS = 4.5, 45


DOCS = Path(__file__).parents[2] / "docs" / "kernels-cuda.md"


def documented(heading):
    """(divergence and dtype, V) -> (bytes, special, instructions) of the table under ``heading``."""
    rows = {}
    for line in DOCS.read_text().partition(heading)[2].splitlines()[2:]:
        if not line.startswith("|"):
            return rows
        name, v, *numbers = (cell.strip(" *b") for cell in line.strip("|").split("|"))
        rows[name.partition(",")[0].partition(" (")[0], int(v.replace(",", ""))] = [float(x) for x in numbers]
    return rows


def cost(rows, v, dtype, divergence, kind="dense", cc=(9, 0), near=None):
    student, teacher = logits(rows, v, dtype, near=near)
    got = run(student, target_of(kind, teacher, 1.0), divergence=divergence, cc=cc)
    elements, size = rows * v, 4 if dtype == "f32" else 2
    c = got.counts
    moved = (c.bytes_read + c.bytes_written) / elements / size
    return (
        moved,
        c.special / elements,
        c.instructions / elements,
        c.narrow_bytes / (c.bytes_read + c.bytes_written),
        got,
    )


def report(figure, v, dtype, divergence, kind, figures):
    moved, special, instructions, narrow, got = figures
    told = documented("| kernel | V |").get((f"{divergence if kind == 'dense' else kind} {dtype}", v))
    assert told or kind == "ghost"
    assert not told or (moved, special, instructions) == pytest.approx(told, abs=0.06)
    figure(
        f"cost {kind:8} {divergence:7} {dtype:4} V={v:6}: {moved:.2f} b/element, special {special:.2f}, "
        f"instructions {instructions:5.1f}, not by 128 bits {narrow:.2%} [{got.plan.spec.name}]"
    )


@pytest.mark.parametrize(
    ("v", "dtype", "divergence"),
    [
        (1000, "f32", "forward"),
        (1000, "bf16", "forward"),
        (4096, "f32", "forward"),
        (32000, "bf16", "forward"),
        (50257, "bf16", "forward"),
        (1000, "f32", "reverse"),
        (50257, "f32", "reverse"),
        (262144, "bf16", "forward"),
    ],
)
def test_one_pass_meets_every_target(v, dtype, divergence, figure):
    figures = cost(16 if v == 1000 else 2, v, dtype, divergence)
    report(figure, v, dtype, divergence, "dense", figures)
    moved, special, instructions, narrow, _ = figures
    assert moved <= ONE_PASS
    assert special <= SPECIAL
    assert instructions <= INSTRUCTIONS
    assert narrow < 0.001


# Measured; targets are missed here, by jsd that of instructions only, and these limits keep the costs from growing
MISSES = [
    (100, "bf16", "forward", 6.1, 109),
    (1000, "f32", "jsd", SPECIAL, 63),
    (128256, "f16", "jsd", SPECIAL, 63),
]


@pytest.mark.parametrize(("v", "dtype", "divergence", "special_limit", "instruction_limit"), MISSES)
def test_the_other_variants_stay_where_they_are(
    v, dtype, divergence, special_limit, instruction_limit, figure
):
    figures = cost(16 if v <= 1000 else 1, v, dtype, divergence)
    report(figure, v, dtype, divergence, "dense", figures)
    moved, special, instructions, _, _ = figures
    assert moved <= ONE_PASS
    assert special <= special_limit
    assert instructions <= instruction_limit


def test_two_passes_move_five_elements(figure):
    figures = cost(1, 128256, "bf16", "forward", cc=(8, 0))
    report(figure, 128256, "bf16", "forward", "dense", figures)
    moved, special, instructions, _, _ = figures
    assert moved <= TWO_PASSES
    assert special <= SPECIAL
    assert instructions <= INSTRUCTIONS


@pytest.mark.parametrize("kind", ["sampled", pytest.param("ghost", marks=pytest.mark.slow)])
def test_sparse_targets_read_the_row_once(kind, figure):
    figures = cost(1, 32000, "bf16", "forward", kind)
    report(figure, 32000, "bf16", "forward", kind, figures)
    assert figures[0] <= 2.3
    assert figures[2] <= INSTRUCTIONS


@pytest.mark.parametrize(("divergence", "dtype", "v"), [
    ("forward", "f32", 1000), ("forward", "bf16", 32000), ("reverse", "f32", 1000), ("jsd", "f32", 1000),
])  # fmt: skip
def test_rows_that_nearly_agree_cost_what_the_documentation_says(divergence, dtype, v, figure):
    """More than the targets; they have loops of their own, see pairs.py."""
    moved, special, instructions, _, got = cost(16 if v == 1000 else 2, v, dtype, divergence, near=0.1)
    expected = documented("| rows that nearly agree | V |")[f"{divergence} {dtype}", v]
    assert (moved, special, instructions) == pytest.approx(expected, abs=0.06)
    figure(f"cost near     {divergence:7} {dtype:4} V={v:6}: special {special:.2f}, instructions {instructions:5.1f} "
           f"[{got.plan.spec.name}]")  # fmt: skip
