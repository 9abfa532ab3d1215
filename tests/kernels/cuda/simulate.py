"""Runs the kernels in Numba's CUDA simulator, one thread for each thread, and prints what is off by how much.

Started by test_simulator.py with NUMBA_ENABLE_CUDASIM=1, which must be set before Numba is first imported.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys

import simulator
import torch
from numba import cuda

sys.modules["stillhouse.kernels.cuda.intrinsics"] = simulator  # what is inline PTX in the kernels
import stillhouse.kernels.cuda

stillhouse.kernels.cuda.intrinsics = simulator
from stillhouse.kernels.cuda import arguments
from stillhouse.kernels.cuda.plan import Plan, Spec
from stillhouse.kernels.reference import softmax_kl_rows
from stillhouse.kernels.targets import Sampled, TopK

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def small_launch(rows, v, dtype, divergence, target):
    """Blocks of 32 threads: a simulated thread is a thread of the operating system."""
    if target == "dense" and v <= 64:
        return Plan(
            Spec("small", target, dtype, divergence, 32, lanes=8), -(-rows // 4), 2 * (4 * v + 16) * 4, 0
        )
    chunks = -(-(v + 512) // 256) * 32
    return Plan(Spec("rows", target, dtype, divergence, 32), rows, chunks * 65, chunks)


def simulate(student, target, divergence, temperature=2.0):
    rows, v = student.shape
    dtype = next(name for name, kind in DTYPES.items() if kind == student.dtype)
    launch = small_launch(rows, v, dtype, divergence, arguments.target_kind(target))
    tensors = arguments.flatten(target, temperature)
    grad, loss = torch.zeros_like(student), torch.zeros(rows)
    values = arguments.pack(
        launch, student_shape=(rows, v), target=target, temperature=temperature, divergence=divergence, beta=0.3,
        factor=0.5, student=student.data_ptr(), tensors=[t.data_ptr() for t in tensors], grad=grad.data_ptr(),
        loss=loss.data_ptr(), mask=0, scale=0,
    )  # fmt: skip
    from stillhouse.kernels.cuda.build import kernel_function

    kernel, _ = kernel_function(launch.spec)
    cuda.jit(kernel)[launch.blocks, launch.spec.threads, 0, launch.dynamic_bytes](*values)
    wide = student.double().requires_grad_()
    expected = softmax_kl_rows(wide, target, temperature, divergence, 0.3)
    expected.sum().backward()
    by_loss = float((loss - expected.detach()).norm() / expected.detach().norm())
    return by_loss, float((grad.double() - 0.5 * wide.grad).norm() / (0.5 * wide.grad).norm())


def main():
    made = torch.Generator().manual_seed(0)
    for v, dtype, divergence, kind in (
        (10, "f32", "forward", "dense"),
        (37, "bf16", "reverse", "dense"),
        (70, "f32", "jsd", "dense"),
        (75, "f16", "forward", "dense"),
        (70, "f32", "forward", "ghost"),
        (70, "f32", "forward", "sampled"),
    ):
        student, teacher = (3 * torch.randn(2, v, generator=made).to(DTYPES[dtype]) for _ in range(2))
        target = teacher
        if kind == "ghost":
            target = TopK.from_logits(teacher, 5, temperature=2.0)
        elif kind == "sampled":
            target = Sampled.from_logits(teacher, 5, temperature=2.0, generator=made)
        print(v, dtype, divergence, kind, *simulate(student, target, divergence), flush=True)


if __name__ == "__main__":
    sys.exit(main())
