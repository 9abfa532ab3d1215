"""The correctness check behind ``stillhouse doctor --kernels``: small cases against the specification in float64."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stillhouse.kernels import backends, reference
from stillhouse.kernels import loss as kernels
from stillhouse.kernels.checks import DIVERGENCES
from stillhouse.kernels.series import NO_LABEL
from stillhouse.kernels.targets import Labels, Sampled, Target, TopK

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check(device: str | torch.device, backend: str | None = None) -> list[tuple[str, bool, str]]:
    """A quick correctness check on ``device`` against float64: (name, passed, detail) for each case; by default of the backend in use.

    First comes whether that is the device's kernel: torch, which computes where there is none, passes the cases too.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    rows, width = 12, 1003  # more than small.MOST
    student, teacher = (3 * torch.randn(rows, width, generator=generator) for _ in range(2))
    cases = [(kind, d) for kind in ("dense", "top-k") for d in DIVERGENCES] + [("sampled", "forward")]
    results = []
    if backend is None and device.type == "cpu":
        in_use, why = backends.explain(device, certain=True)
        results.append(("kernel", in_use == "numba", why))
    for dtype in TOLERANCE:
        s, t = student.to(dtype), teacher.to(dtype)
        for kind, divergence in cases:
            name = f"{kind} {divergence} {str(dtype).removeprefix('torch.')}"
            results.append(_check_case(name, s, _target(kind, t), divergence, device, backend))
        for kind in ("dense", "top-k", "sampled"):
            name = f"{kind} with labels {str(dtype).removeprefix('torch.')}"
            results.append(_check_labels(name, s, _target(kind, t), device, backend))
    return results


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


def _check_case(
    name: str, student: Tensor, target: Target, divergence: Any, device: torch.device, backend: str | None
) -> tuple[str, bool, str]:
    exact = student.double().requires_grad_()
    expected = reference.softmax_kl_rows(
        exact, _converted(target, dtype=torch.float64), 2.0, divergence, 0.5
    ).mean()
    expected.backward()

    def loss(mine: Tensor) -> Tensor:
        where = _converted(target, device=device)
        return kernels.softmax_kl(mine, where, temperature=2.0, divergence=divergence, backend=backend)

    return _compare(name, student, device, loss, expected, exact.grad)


def _check_labels(
    name: str, student: Tensor, target: Target, device: torch.device, backend: str | None
) -> tuple[str, bool, str]:
    """Of 0.75 times the divergence and 0.25 times the cross-entropy with labels."""
    exact, y = student.double().requires_grad_(), torch.arange(student.shape[0])
    y[3] = NO_LABEL
    soft = reference.softmax_kl_rows(
        exact, _converted(target, dtype=torch.float64), 2.0, "forward", 0.5
    ).mean()
    expected = 0.75 * soft + 0.25 * reference.label_rows(exact, Labels(y, None, 0.0)).sum() / (len(y) - 1)
    expected.backward()

    def loss(mine: Tensor) -> Tensor:
        terms = kernels.distillation_loss(
            mine,
            _converted(target, device=device),
            y.to(device),
            temperature=2.0,
            weights=(0.75, 0.25),
            backend=backend,
        )
        return 0.75 * terms.soft + 0.25 * terms.label

    return _compare(name, student, device, loss, expected, exact.grad)


def _compare(
    name: str, student: Tensor, device: torch.device, loss: Callable[[Tensor], Tensor], expected: Tensor,
    gradient: Tensor | None,
) -> tuple[str, bool, str]:  # fmt: skip
    mine = student.to(device, copy=True).requires_grad_()
    try:
        got = loss(mine)
        got.backward()
    except Exception as error:  # noqa: BLE001 a check reports, whatever the backend throws
        return name, False, f"{type(error).__name__}: {error}"
    assert mine.grad is not None
    assert gradient is not None
    value = abs(got.item() / expected.item() - 1)
    off = ((mine.grad.double().cpu() - gradient).norm() / gradient.norm()).item()
    passed = value <= 2e-6 and off <= TOLERANCE[student.dtype]
    return name, passed, f"relative error: loss {value:.1e}, gradient {off:.1e}"
