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
from stillhouse.kernels.cuda import arguments, build
from stillhouse.kernels.cuda.plan import Plan, Spec
from stillhouse.kernels.reference import label_rows, softmax_kl_rows
from stillhouse.kernels.targets import Labels, Sampled, TopK

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def small_launch(rows, v, dtype, divergence, target, labels):
    """Blocks of a warp: a simulated thread is a thread of the operating system."""
    span = -(-(v + 14) // 128) * 32
    return Plan(Spec(target, dtype, divergence, 32, labels=labels), rows, span * 33, span)


def simulate(student, target, divergence, labels=None, temperature=2.0):
    rows, v = student.shape
    dtype = next(name for name, kind in DTYPES.items() if kind == student.dtype)
    launch = small_launch(rows, v, dtype, divergence, arguments.target_kind(target), labels is not None)
    tensors = [student, *arguments.flatten(target, temperature)]
    grad, loss = torch.zeros_like(student), torch.zeros(2, rows)
    numbers = torch.tensor(arguments.constants(temperature, divergence, 0.3, 0.1))
    others = [grad, loss, None, labels, numbers, None]
    addresses = [[0 if x is None else x.data_ptr() for x in some] for some in (tensors, others)]
    values = arguments.pack(launch, (rows, v), target, *addresses, (0.5, 0.3))
    cuda.jit(build.module_of(launch.spec.target).kernel_of(launch.spec))[
        launch.blocks, launch.spec.threads, 0, launch.dynamic_bytes
    ](*values)  # fmt: skip
    wide = student.double().requires_grad_()
    expected = softmax_kl_rows(wide, target, temperature, divergence, 0.3)
    whole = 0.5 * expected.sum()
    if labels is not None:
        rows = label_rows(wide, Labels(labels, None, 0.1))
        whole = whole + 0.3 * rows.sum()
        assert torch.allclose(loss[1].double(), rows, rtol=2e-6), "the label term"
    whole.backward()
    by_loss = float((loss[0] - expected.detach()).norm() / expected.detach().norm())
    return by_loss, float((grad.double() - wide.grad).norm() / wide.grad.norm())


def main():
    made = torch.Generator().manual_seed(0)
    for v, dtype, divergence, kind, labels in (
        (10, "f32", "forward", "dense", None),
        (37, "bf16", "reverse", "dense", torch.tensor([3, -100])),
        (70, "f32", "jsd", "dense", None),
        (75, "f16", "forward", "dense", torch.tensor([74, 0])),
        (70, "f32", "forward", "ghost", torch.tensor([5, 69])),
        (70, "f32", "forward", "sampled", torch.tensor([-100, 1])),
    ):
        student, teacher = (3 * torch.randn(2, v, generator=made).to(DTYPES[dtype]) for _ in range(2))
        target = teacher
        if kind == "ghost":
            target = TopK.from_logits(teacher, 5, temperature=2.0)
        elif kind == "sampled":
            target = Sampled.from_logits(teacher, 5, temperature=2.0, generator=made)
        print(v, dtype, divergence, kind, *simulate(student, target, divergence, labels), flush=True)


if __name__ == "__main__":
    sys.exit(main())
