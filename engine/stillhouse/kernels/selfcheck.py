"""The correctness check behind ``stillhouse doctor --kernels``: small cases against the specification in float64."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.kernels import loss as kernels
from stillhouse.kernels import reference
from stillhouse.kernels.checks import DIVERGENCES
from stillhouse.kernels.targets import Sampled, Target, TopK

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check(device: str | torch.device, backend: str | None = None) -> list[tuple[str, bool, str]]:
    """A quick correctness check on ``device`` against float64: (name, passed, detail) for each case; by default of the backend in use."""
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    rows, width = 12, 1003  # more than small.MOST
    student, teacher = (3 * torch.randn(rows, width, generator=generator) for _ in range(2))
    cases = [(kind, d) for kind in ("dense", "top-k") for d in DIVERGENCES] + [("sampled", "forward")]
    results = []
    for dtype in TOLERANCE:
        s, t = student.to(dtype), teacher.to(dtype)
        for kind, divergence in cases:
            name = f"{kind} {divergence} {str(dtype).removeprefix('torch.')}"
            results.append(_check_case(name, s, _target(kind, t), divergence, device, backend))
    return results


def _target(kind: str, teacher: Tensor) -> Target:
    if kind == "top-k":
        return TopK.from_logits(teacher, 16, temperature=2.0)
    if kind == "sampled":
        return Sampled.from_logits(teacher, 16, temperature=2.0, generator=torch.Generator().manual_seed(0))
    return teacher


def _to(target: Target, device: torch.device) -> Target:
    if isinstance(target, TopK):
        rest = None if target.log_rest is None else target.log_rest.to(device)
        indices, log_probs = target.indices.to(device), target.log_probs.to(device)
        return replace(target, indices=indices, log_probs=log_probs, log_rest=rest)
    if isinstance(target, Sampled):
        return Sampled(target.indices.to(device), target.weights.to(device), target.temperature, True)
    return target.to(device)


def _wide(target: Target) -> Target:
    if isinstance(target, TopK):
        rest = None if target.log_rest is None else target.log_rest.double()
        return replace(target, log_probs=target.log_probs.double(), log_rest=rest)
    if isinstance(target, Sampled):
        return Sampled(target.indices, target.weights.double(), target.temperature)
    return target.double()


def _check_case(
    name: str, student: Tensor, target: Target, divergence: Any, device: torch.device, backend: str | None
) -> tuple[str, bool, str]:
    exact = student.double().requires_grad_()
    expected = reference.softmax_kl_rows(exact, _wide(target), 2.0, divergence, 0.5).mean()
    expected.backward()
    mine = student.to(device, copy=True).requires_grad_()
    try:
        got = kernels.softmax_kl(
            mine, _to(target, device), temperature=2.0, divergence=divergence, backend=backend
        )
        got.backward()
    except Exception as error:  # noqa: BLE001 a check reports, whatever the backend throws
        return name, False, f"{type(error).__name__}: {error}"
    assert mine.grad is not None
    assert exact.grad is not None
    value = abs(got.item() / expected.item() - 1)
    gradient = ((mine.grad.double().cpu() - exact.grad).norm() / exact.grad.norm()).item()
    passed = value <= 2e-6 and gradient <= TOLERANCE[student.dtype]
    return name, passed, f"relative error: loss {value:.1e}, gradient {gradient:.1e}"
