"""The package without its extra, without a device, and the mapping of shapes to kernels."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
import torch

from stillhouse.kernels import TopK, cuda
from stillhouse.kernels.cuda import arguments
from stillhouse.kernels.cuda.plan import opt_in_bytes, plan


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    usable, why = cuda.available()
    assert not usable
    assert "stillhouse[cuda]" in why
    with pytest.raises(ImportError, match=r"stillhouse\[cuda\]"):
        cuda.softmax_kl_fwd_bwd(
            torch.zeros(1, 2), torch.zeros(1, 2), temperature=1.0, divergence="forward", beta=0.5
        )


def test_says_why_it_cannot_run_without_a_device(monkeypatch):
    pytest.importorskip("numba_cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.available() == (False, "torch sees no CUDA device")


def test_refuses_tensors_that_are_not_on_a_device():
    pytest.importorskip("numba_cuda")
    with pytest.raises(ValueError, match=r"got a tensor on cpu; expected a CUDA device"):
        cuda.softmax_kl_fwd_bwd(
            torch.zeros(1, 2), torch.zeros(1, 2), temperature=1.0, divergence="forward", beta=0.5
        )


@pytest.mark.parametrize("v", [10, 1000, 4096])
@pytest.mark.parametrize("kind", ["dense", "top-k"])
@pytest.mark.parametrize("divergence", ["forward", "jsd"])
def test_a_launch_passes_what_the_kernel_takes(divergence, kind, v):
    """By number and width: the driver looks at neither."""
    pytest.importorskip("numba_cuda")
    from stillhouse.kernels.cuda import build, launch

    teacher = torch.zeros(3, v)
    target = teacher if kind == "dense" else TopK.from_logits(teacher, 4)
    chosen = plan(3, v, "f32", divergence, kind, (9, 0))
    tensors = [0] * (1 + len(arguments.flatten(target, 1.0)))
    values = arguments.pack(chosen, (3, v), target, tensors, [0] * 6, (1.0, 0.0))
    passed = [type(value).__name__ for value in launch._typed(chosen.spec, values)]
    module = build.module_of(kind)
    assert passed == [str(kind) for kind in module.SIGNATURE]
    assert len(passed) == len(inspect.signature(module.kernel_of(chosen.spec)).parameters)


@pytest.mark.parametrize(
    ("v", "dtype", "cc", "threads", "cluster", "staged"),
    [
        (2, "f32", (9, 0), 32, 1, True),
        (1024, "bf16", (9, 0), 32, 1, True),
        (1025, "bf16", (9, 0), 128, 1, True),
        (28000, "bf16", (9, 0), 512, 1, True),
        (13000, "f32", (9, 0), 256, 1, True),
        (32000, "bf16", (9, 0), 256, 2, True),
        (128256, "bf16", (9, 0), 256, 8, True),
        (262144, "bf16", (10, 0), 512, 8, True),
        (262144, "f32", (9, 0), 256, 16, True),
        (262144, "bf16", (8, 0), 512, 1, False),
    ],
)
def test_the_mapping_table(v, dtype, cc, threads, cluster, staged):
    spec = plan(64, v, dtype, "forward", "dense", cc).spec
    assert (spec.threads, spec.cluster, spec.staged) == (threads, cluster, staged)


@pytest.mark.parametrize("cc", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("target", ["dense", "top-k"])
def test_every_width_fits_the_device(cc, dtype, target):
    for divergence in ("forward", "reverse", "jsd"):
        for v in (2, 63, 64, 65, 1024, 1025, 4096, 28000, 50257, 113000, 151936, 262144):
            launch = plan(3, v, dtype, divergence, target, cc)
            assert launch.dynamic_bytes <= opt_in_bytes(cc)
            assert launch.blocks % launch.spec.cluster == 0
            assert launch.spec.cluster == 1 or cc >= (9, 0)
