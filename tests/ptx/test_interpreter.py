"""The interpreter catches what it is there to catch: each test breaks a correct kernel in one place."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

from stillhouse.kernels.cuda.plan import plan

from .harness import logits, ptx_of, run
from .memory import PtxError
from .parse import parse


@cache
def text_for(v, dtype):
    return ptx_of(plan(2, v, dtype, "forward", "dense", (9, 0)).spec, (9, 0))


def broken(v, dtype, pattern, replacement, count=1):
    text = text_for(v, dtype)
    changed = re.sub(pattern, replacement, text, count=count, flags=re.MULTILINE)
    assert changed != text, "the mutation changed nothing"
    student, teacher = logits(2 if v < 10000 else 1, v, dtype)
    return run(student, teacher, program=parse(changed))


BLOCK, CLUSTER = (4096, "f32"), (32000, "bf16")


def test_the_unbroken_kernels_pass():
    for v, dtype in (BLOCK, CLUSTER):
        student, teacher = logits(1, v, dtype)
        run(student, teacher, program=parse(text_for(v, dtype)))


def test_a_removed_block_barrier_is_a_race():
    with pytest.raises(PtxError, match="race"):
        broken(*BLOCK, r"^\s*bar\.sync[^\n]*\n", "\n")


def test_a_removed_barrier_of_a_row_that_a_warp_has_is_a_race():
    """In place, the label's logit is read by one lane, and overwritten by another one."""
    spec = plan(4, 1001, "f32", "forward", "dense", (9, 0), labels=True).spec
    text = re.sub(r"^\s*bar\.sync[^\n]*\n", "\n", ptx_of(spec, (9, 0)), flags=re.MULTILINE)
    with pytest.raises(PtxError, match="race"):
        run(*logits(4, 1001), labels=torch.full((4,), 700), inplace=True, program=parse(text))


def test_a_removed_cluster_barrier_is_found():
    last = r"barrier\.cluster\.arrive\.release\.aligned;(?![\s\S]*barrier\.cluster\.arrive)"
    with pytest.raises(PtxError, match=r"deadlock|race"):
        broken(*CLUSTER, last, "")


def test_a_removed_pair_of_cluster_barriers_is_a_race():
    pair = r"barrier\.cluster\.arrive\.release\.aligned;([^;]*?)barrier\.cluster\.wait\.acquire\.aligned;"
    with pytest.raises(PtxError, match=r"race|nothing wrote"):
        broken(*CLUSTER, pair, r"\1", count=0)


def test_a_remote_store_before_the_first_cluster_barrier_is_found():
    text = text_for(*CLUSTER)
    text = text.replace("barrier.cluster.arrive.release.aligned;", "", 1)
    waits = [m.start() for m in re.finditer(r"barrier\.cluster\.wait", text)]
    # the first arrival is answered by a wait on each of two paths: masked rows, and the others
    for at in reversed(waits[:2]):
        text = text[:at] + re.sub(r"barrier\.cluster\.wait\.acquire\.aligned;", "", text[at:], count=1)
    student, teacher = logits(1, *CLUSTER)
    with pytest.raises(PtxError, match="before the cluster's first barrier"):
        run(student, teacher, program=parse(text))


def test_a_misaligned_vector_is_found():
    with pytest.raises(PtxError, match="misaligned"):
        broken(*BLOCK, r"(ld\.global\.v4\.b32 \{[^}]*\}, \[%rd\d+)\]", r"\1+4]")


def test_a_load_past_the_end_is_found():
    with pytest.raises(PtxError, match="outside of every allocation"):
        broken(*BLOCK, r"(ld\.global\.v4\.b32 \{[^}]*\}, \[%rd\d+)\]", r"\1+65536]")


def test_a_store_past_the_end_is_found():
    with pytest.raises(PtxError, match=r"outside of every allocation|race"):
        broken(*BLOCK, r"(st\.global\.v4\.b32 \[%rd\d+)\]", r"\1+65536]", count=0)


def test_shared_memory_past_the_end_is_found():
    with pytest.raises(PtxError, match="outside of the block's shared memory"):
        broken(*BLOCK, r"(st\.shared\.v4\.u32\s+\[%rd\d+)\]", r"\1+65536]")


def test_shared_memory_that_nothing_wrote_is_found():
    with pytest.raises(PtxError, match="nothing wrote"):
        broken(*BLOCK, r"^\s*st\.shared\.v4[^\n]*\n", "\n", count=0)


def test_a_shuffle_by_part_of_a_warp_is_found():
    with pytest.raises(PtxError, match="only some lanes of a warp"):
        broken(
            *BLOCK, r"^(\s*)(shfl\.sync[^\n]*)", r"\1mov.u32 %r0, %tid.x;\n setp.gt.u32 %p0, %r0, 5;\n @%p0 \2"
        )  # fmt: skip


def test_a_block_that_leaves_before_a_barrier_deadlocks():
    with pytest.raises(PtxError, match=r"deadlock|only some lanes"):
        broken(
            *BLOCK,
            r"^(\s*)bar\.sync",
            r"\1mov.u32 %r0, %tid.x;\n setp.gt.u32 %p0, %r0, 63;\n @%p0 ret;\n bar.sync",
        )


def test_an_output_left_unwritten_is_found():
    with pytest.raises(PtxError, match="unwritten"):
        broken(*BLOCK, r"^\s*st\.global\.v4[^\n]*\n", "\n", count=0)


def test_a_wrong_constant_changes_the_values():
    student, teacher = logits(2, 4096)
    right = run(student, teacher)
    wrong = broken(*BLOCK, r"ex2\.approx\.ftz\.f32", "lg2.approx.ftz.f32")
    assert not (right.loss == wrong.loss).all()


def test_two_runs_give_the_same_bits():
    student, teacher = logits(1, 32000, "bf16")
    first, second = run(student, teacher), run(student, teacher)
    assert (first.loss == second.loss).all()
    assert (first.grad == second.grad).all()
