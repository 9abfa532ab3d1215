"""The correctness check behind ``stillhouse doctor --kernels``: small cases against the specification in float64."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.kernels import backends, reference
from stillhouse.kernels import loss as kernels
from stillhouse.kernels.checks import DIVERGENCES
from stillhouse.kernels.series import NO_LABEL
from stillhouse.kernels.targets import Labels, Sampled, Target, TopK

KINDS = ("dense", "top-k", "sampled")
MEASURED = (
    "relative error"  # what the detail of a case that was computed begins with: another one's is an exception
)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check(device: str | torch.device, backend: str | None = None) -> list[tuple[str, bool, str]]:
    """A quick correctness check on ``device`` against float64: (name, passed, detail) for each case; by default of the backend in use.

    First comes whether that is the device's kernel: torch, which computes where there is none, passes the cases too.
    """
    device = torch.device(device)
    # whatever the caller is in the middle of: the first call for a device, of a run that evaluates, asks for the check
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        return _cases(device, backend)


def _cases(device: torch.device, backend: str | None) -> list[tuple[str, bool, str]]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(12, 1003, generator=generator) for _ in range(2))  # no small call
    alone = [(kind, d, False) for kind in ("dense", "top-k") for d in DIVERGENCES]
    cases = [*alone, ("sampled", "forward", False), *((kind, "forward", True) for kind in KINDS)]
    results = []
    if backend is None and device.type == "cpu":
        in_use, why = backends.explain(device, certain=True)
        results.append(("kernel", in_use == "numba", why))
    elif backend is None and device.type == "cuda" and backends.cuda_available()[0]:
        backend = "cuda"  # by default one that has failed its check would have torch checked in its place
    return results + [
        _check(kind, divergence, labelled, student.to(dtype), teacher.to(dtype), device, backend)
        for dtype in TOLERANCE
        for kind, divergence, labelled in cases
    ]


def _target(kind: str, teacher: Tensor) -> Target:
    if kind == "top-k":
        return TopK.from_logits(teacher, 16, temperature=2.0)
    if kind == "sampled":
        return Sampled.from_logits(teacher, 16, temperature=2.0, generator=torch.Generator().manual_seed(0))
    return teacher


def _converted(target: Target, **how: Any) -> Target:
    """On another device, or in another floating type."""
    if isinstance(target, Tensor):
        return target.to(**how)
    values: dict[str, Any] = {
        name: x for name, x in vars(target).items() if isinstance(x, Tensor) and x.is_floating_point()
    }
    indices = target.indices.to(device=how.get("device"))
    return replace(target, indices=indices, **{name: x.to(**how) for name, x in values.items()})


def _check(
    kind: str, divergence: Any, labelled: bool, student: Tensor, teacher: Tensor, device: torch.device, backend: str | None
) -> tuple[str, bool, str]:  # fmt: skip
    """Of a divergence; with labels of 0.75 times that and 0.25 times the cross-entropy."""
    name = f"{kind} {'with labels' if labelled else divergence} {str(student.dtype).removeprefix('torch.')}"
    target, exact, y = _target(kind, teacher), student.double().requires_grad_(), torch.arange(len(student))
    y[3] = NO_LABEL
    wide = _converted(target, dtype=torch.float64)
    expected = reference.softmax_kl_rows(exact, wide, 2.0, divergence, 0.5).mean()
    if labelled:
        label = reference.label_rows(exact, Labels(y, None, 0.0)).sum() / (len(y) - 1)
        expected = 0.75 * expected + 0.25 * label
    expected.backward()
    mine = student.to(device, copy=True).requires_grad_()
    settings: dict[str, Any] = {"temperature": 2.0, "divergence": divergence, "backend": backend}
    try:
        here = _converted(target, device=device)
        if labelled:
            terms = kernels.distillation_loss(mine, here, y.to(device), weights=(0.75, 0.25), **settings)
            got = 0.75 * terms.soft + 0.25 * terms.label
        else:
            got = kernels.softmax_kl(mine, here, **settings)
        got.backward()
    except Exception as error:  # noqa: BLE001 a check reports, whatever the backend throws
        return name, False, f"{type(error).__name__}: {error}"
    assert mine.grad is not None
    assert exact.grad is not None
    value = abs(got.item() / expected.item() - 1)
    off = ((mine.grad.double().cpu() - exact.grad).norm() / exact.grad.norm()).item()
    passed = value <= 2e-6 and off <= TOLERANCE[student.dtype]
    return name, passed, f"{MEASURED}: loss {value:.1e}, gradient {off:.1e}"
