"""Compiles a kernel as a launch would, runs its PTX in the interpreter, and compares with float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from stillhouse.kernels.cuda import arguments, build
from stillhouse.kernels.cuda.plan import Plan, plan
from stillhouse.kernels.reference import softmax_kl_rows

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


def run(student, target, *, temperature=1.0, divergence="forward", beta=0.5, mask=None, scale=None, factor=1.0,
        cc=(9, 0), inplace=False, shift=(0, 0, 0), jitter=False, program=None, gradient=True) -> Result:  # fmt: skip
    """The kernel on these tensors; ``shift`` moves student, teacher and gradient off a 256-byte boundary.

    Without ``gradient`` the result's is the student as the kernel left it.
    """
    dtype = {v: k for k, v in TORCH.items()}[student.dtype]
    rows, v = student.shape
    kind, tensors = arguments.target_kind(target), arguments.flatten(target, temperature)
    launch = plan(rows, arguments.widths(v, target, divergence)[0], dtype, divergence, kind, cc, gradient)
    spec = launch.spec
    size = sum(x.nbytes + 1024 for x in (student, student, *tensors)) + rows * 16 + MEMORY_SLACK
    machine = Machine(program or program_of(spec, cc), launch.blocks, spec.threads, cluster=spec.cluster,
                      dynamic_bytes=launch.dynamic_bytes, memory_bytes=size, jitter=jitter)  # fmt: skip
    memory = machine.memory
    s = memory.add(bits(student), shift[0])
    addresses = [memory.add(bits(x), shift[1] if kind == "dense" else 0) for x in tensors]
    g = s if inplace or not gradient else memory.add(np.zeros_like(bits(student)), shift[2], output=True)
    loss = memory.add(np.zeros(rows, np.float32), output=True)
    masks = memory.add(mask.numpy()) if mask is not None else 0
    scales = memory.add(scale.numpy()) if scale is not None else 0
    values = arguments.pack(
        launch, student_shape=(rows, v), target=target, temperature=temperature, divergence=divergence, beta=beta,
        factor=factor, student=s, tensors=addresses, grad=g, loss=loss, mask=masks, scale=scales,
    )  # fmt: skip
    counts = machine.run(*values)
    return Result(
        torch.from_numpy(memory.read_back(loss, np.zeros(rows, np.float32))),
        from_bits(memory.read_back(g, bits(student)), student.dtype),
        counts,
        launch,
    )


def expected(
    student, target, *, temperature=1.0, divergence="forward", beta=0.5, mask=None, scale=None, factor=1.0
):
    """Loss per row and the student's gradient in float64, by the specification."""
    wide = student.double().requires_grad_()
    target = target.double() if isinstance(target, torch.Tensor) else target
    loss = softmax_kl_rows(wide, target, temperature, divergence, beta, mask)
    weights = torch.full_like(loss, factor) if scale is None else scale.double() * factor
    loss.backward(weights)
    return loss.detach(), wide.grad


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
