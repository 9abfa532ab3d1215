"""Compiles a kernel as a launch would, runs its PTX in the interpreter, and compares with float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from stillhouse.kernels.cuda import arguments, build
from stillhouse.kernels.cuda.plan import Plan, plan
from stillhouse.kernels.reference import label_rows, softmax_kl_rows
from stillhouse.kernels.targets import Labels

from .machine import Counts, Machine
from .parse import parse

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
MEMORY_SLACK = 1 << 16


@cache
def ptx_of(spec, cc):
    return build.compile_ptx(spec, cc)


@cache
def program_of(spec, cc):
    return parse(ptx_of(spec, cc))


def bits(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    return (
        tensor.view(torch.uint16).numpy()
        if tensor.dtype in (torch.bfloat16, torch.float16)
        else tensor.numpy()
    )


def from_bits(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return (
        torch.from_numpy(array.copy()).view(dtype)
        if array.dtype == np.uint16
        else torch.from_numpy(array.copy())
    )


@dataclass
class Result:
    loss: torch.Tensor
    grad: torch.Tensor
    counts: Counts
    plan: Plan
    label: torch.Tensor | None = None


def run(student, target, *, temperature=1.0, divergence="forward", beta=0.5, mask=None, scales=None, factors=(1.0, 1.0),
        labels=None, smoothing=0.0, cc=(9, 0), inplace=False, shift=(0, 0, 0), jitter=False, program=None, gradient=True) -> Result:  # fmt: skip
    """The kernel on these tensors; ``shift`` moves student, teacher and gradient off a 256-byte boundary.

    Without ``gradient`` the result's is the student as the kernel left it.
    """
    dtype = {v: k for k, v in TORCH.items()}[student.dtype]
    rows, v = student.shape
    kind, tensors = arguments.target_kind(target), arguments.flatten(target, temperature)
    width = arguments.widths(v, target, divergence)[0]
    launch = plan(rows, width, dtype, divergence, kind, cc, gradient, labels is not None)
    spec = launch.spec
    size = sum(x.nbytes + 1024 for x in (student, student, *tensors)) + rows * 32 + MEMORY_SLACK
    machine = Machine(program or program_of(spec, cc), launch.blocks, spec.threads, cluster=spec.cluster,
                      dynamic_bytes=launch.dynamic_bytes, memory_bytes=size, jitter=jitter)  # fmt: skip
    memory = machine.memory
    s = memory.add(bits(student), shift[0])
    addresses = [memory.add(bits(x), shift[1] if kind == "dense" else 0) for x in tensors]
    g = s if inplace or not gradient else memory.add(np.zeros_like(bits(student)), shift[2], output=True)
    losses = np.zeros((1 if labels is None else 2, rows), np.float32)
    loss = memory.add(losses, output=True)
    numbers = np.array(arguments.constants(temperature, divergence, beta, smoothing), np.float32)
    given = [memory.add(x) if x is not None else 0 for x in (
        None if mask is None else mask.numpy(), None if labels is None else labels.numpy(), numbers,
        None if scales is None else scales.numpy())]  # fmt: skip
    counts = machine.run(
        *arguments.pack(launch, (rows, v), target, [s, *addresses], [g, loss, *given], factors)
    )
    losses = torch.from_numpy(memory.read_back(loss, losses))
    grad = from_bits(memory.read_back(g, bits(student)), student.dtype)
    return Result(losses[0], grad, counts, launch, None if labels is None else losses[1])


def expected(
    student, target, *, temperature=1.0, divergence="forward", beta=0.5, mask=None, scales=(1.0, 1.0), labels=None, smoothing=0.0
):  # fmt: skip
    """Loss per row and the student's gradient in float64, by the specification; with labels also their loss, between the two."""
    wide = student.double().requires_grad_()
    target = target.double() if isinstance(target, torch.Tensor) else target
    loss = softmax_kl_rows(wide, target, temperature, divergence, beta, mask)
    (grad,) = torch.autograd.grad(loss, wide, torch.full_like(loss, float(scales[0])))
    if labels is None:
        return loss.detach(), grad
    label = label_rows(wide, Labels(labels, None, smoothing), mask)
    (more,) = torch.autograd.grad(label, wide, torch.full_like(label, float(scales[1])))
    return loss.detach(), label.detach(), grad + more


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-300))


def logits(rows, v, dtype="f32", seed=0, spread=3.0, near=None):
    """A student and a teacher; ``near`` makes the teacher the student plus that much noise."""
    made = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, v, generator=made) * spread
    other = torch.randn(rows, v, generator=made)
    teacher = other * spread if near is None else student + near * other
    return student.to(TORCH[dtype]), teacher.to(TORCH[dtype])


def ideal_bytes(rows, v, dtype, sides=3):
    return rows * v * sides * (4 if dtype == "f32" else 2)


def log2e_over(temperature):
    return math.log2(math.e) / temperature
