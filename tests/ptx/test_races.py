"""A proof, by a static verifier, that every order of execution of a block's threads gives the same result.

sentryward cannot tell apart stores to addresses that are given as numbers, so the global stores, whose values nothing
reads back, are left out of what it sees; the interpreter checks those. Of a branch on data it sees one side
(``representative_branches``): arithmetic, and one of the two ways in which a row is compared.
"""

from __future__ import annotations

import json
import re

import pytest

from stillhouse.kernels.cuda import arguments, build
from stillhouse.kernels.cuda.plan import Plan, Spec, plan

from .harness import logits, ptx_of

sentryward = pytest.importorskip("sentryward", reason="needs the package sentryward")
FAR_APART = 1 << 30


def without_global_stores(text):
    text = text.replace('.pragma "nounroll";', "")  # which it takes for no part of an entry point
    return re.sub(r"^\s*(@!?%p\d+\s+)?st\.global[^\n]*\n", "", text, flags=re.MULTILINE)


def verdict(text, launch, v, folder, seconds):
    _, teacher = logits(1, v, launch.spec.dtype)
    tensors, others = (
        [FAR_APART, 2 * FAR_APART],
        [3 * FAR_APART, 4 * FAR_APART, 0, 6 * FAR_APART, 5 * FAR_APART, 0],
    )
    values = arguments.pack(launch, (1, v), teacher, tensors, others, (1.0, 1.0))
    parameters = re.findall(r"\.param \.(\w+) (\w+)", text.split(")")[0])
    dims = {"grid_dim": launch.blocks, "block_dim": launch.spec.threads, "cluster_dim": launch.spec.cluster}
    settings = {
        "schema": "spverify.kernel-input/v1",
        "entry": build.ENTRY,
        "launch": {name: [n, 1, 1] for name, n in dims.items()}
        | {"dynamic_shared_bytes": launch.dynamic_bytes},
        "arguments": [
            {"parameter": name, "type": kind, "value": value}
            for (kind, name), value in zip(parameters, values, strict=True)
        ],
        "assumptions": {"representative_branches": True},
    }
    if launch.spec.cluster == 1:
        del settings["launch"]["cluster_dim"]
    kernel, given = folder / "kernel.ptx", folder / "input.json"
    kernel.write_text(text)
    given.write_text(json.dumps(settings))
    result = sentryward.verify(kernel, input=given, timeout_seconds=seconds)
    return result["result"], result["checks"]


def block_case(labels=False):
    launch = plan(1, 2048, "bf16", "forward", "dense", (9, 0), labels=labels)
    return launch, without_global_stores(ptx_of(launch.spec, (9, 0)))


def cluster_case():
    """As small as a cluster can be: the order of its steps does not depend on V."""
    launch = Plan(Spec("dense", "bf16", "forward", 32, 2), 2, 32 * 2 * 16, 32)
    return launch, without_global_stores(ptx_of(launch.spec, (9, 0)))


@pytest.mark.parametrize("labels", [False, True])
def test_a_block_is_free_of_races(labels, tmp_path, figure):
    launch, text = block_case(labels)
    result, checks = verdict(text, launch, 2048, tmp_path, 120)
    figure(f"sentryward {launch.spec.name}: {result} {checks}")
    assert result == "race_free"


@pytest.mark.slow
def test_a_block_without_its_barrier_is_not(tmp_path):
    launch, text = block_case()
    result, _ = verdict(re.sub(r"\tbar\.sync[^\n]*\n", "", text, count=1), launch, 2048, tmp_path, 120)
    assert result == "potential_race"


def test_a_cluster_is_free_of_races(tmp_path, figure):
    launch, text = cluster_case()
    result, checks = verdict(text, launch, 512, tmp_path, 300)
    figure(f"sentryward {launch.spec.name}: {result} {checks}")
    assert result == "race_free"
