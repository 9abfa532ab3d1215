"""Loads compiled kernels and launches them on torch's current stream, through cuda.core."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.kernels.cuda import build
from stillhouse.kernels.cuda.arguments import DTYPES, FLOATS, flatten, pack, target_kind, widths
from stillhouse.kernels.cuda.plan import Plan, Spec, plan
from stillhouse.kernels.targets import Target

PORTABLE_CLUSTER = 8


@dataclass(frozen=True)
class Loaded:
    """A kernel on one device. ``code`` keeps the module alive."""

    kernel: Any
    code: Any


def run(
    student: Tensor, target: Target, temperature: float, divergence: str, beta: float, mask: Tensor | None,
    scale: Tensor | float, out_grad: Tensor | None,
) -> Tensor:  # fmt: skip
    """See ``stillhouse.kernels.cuda.softmax_kl_fwd_bwd``."""
    dtype = _checked_dtype(student, target)
    rows, v = student.shape
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    if rows == 0:
        return loss
    source = student.contiguous()
    grad = None if out_grad is None else _gradient_buffer(source, out_grad)
    factor, scales = _scales(scale, rows, student)
    tensors = [t.contiguous() for t in flatten(target, temperature)]
    keeps = mask.contiguous() if mask is not None else None
    with torch.cuda.device(student.device):
        cc = torch.cuda.get_device_capability()
        width = widths(v, target, divergence)[0]
        launch = plan(rows, width, dtype, divergence, target_kind(target), cc, gradient=grad is not None)
        values = pack(
            launch, student_shape=(rows, v), target=target, temperature=temperature, divergence=divergence,
            beta=beta, factor=factor, student=source.data_ptr(), tensors=[t.data_ptr() for t in tensors],
            grad=(source if grad is None else grad).data_ptr(), loss=loss.data_ptr(), mask=keeps.data_ptr() if keeps is not None else 0,
            scale=scales.data_ptr() if scales is not None else 0,
        )  # fmt: skip
        _start(launch, cc, student.device, values)
    if out_grad is not None and grad is not None and grad is not out_grad:
        out_grad.copy_(grad)
    return loss


def _checked_dtype(student: Tensor, target: Target) -> str:
    if student.dtype not in DTYPES:
        raise ValueError(
            f"student logits: got {student.dtype}, expected one of {list(DTYPES)}; cast them first"
        )
    if isinstance(target, Tensor) and target.dtype != student.dtype:
        raise ValueError(
            f"teacher logits: got {target.dtype}, expected the student's {student.dtype}; cast one of them"
        )
    if not student.is_cuda:
        raise ValueError(
            f"student logits: got a tensor on {student.device}, expected a CUDA device; use .cuda()"
        )
    return DTYPES[student.dtype]


def _gradient_buffer(source: Tensor, out_grad: Tensor) -> Tensor:
    """Where the kernel writes: ``out_grad`` where it is laid out like the logits, else a tensor to copy from."""
    if out_grad.is_contiguous() and out_grad.dtype == source.dtype:
        return out_grad
    return torch.empty_like(source)


def _scales(scale: Tensor | float, rows: int, student: Tensor) -> tuple[float, Tensor | None]:
    """(one factor, or 1 with a factor for each row)."""
    if not isinstance(scale, Tensor):
        return float(scale), None
    return 1.0, scale.to(device=student.device, dtype=torch.float32).expand(rows).contiguous()


def _start(launch: Plan, cc: tuple[int, int], device: torch.device, values: tuple[int | float, ...]) -> None:
    from cuda.core import LaunchConfig, Stream
    from cuda.core import launch as start

    spec = launch.spec
    loaded = _load(spec, cc, torch.cuda.current_device())
    # with clusters, cuda.core counts the grid in clusters
    config = LaunchConfig(
        grid=launch.blocks // spec.cluster,
        block=spec.threads,
        shmem_size=launch.dynamic_bytes,
        **({"cluster": spec.cluster} if spec.cluster > 1 else {}),
    )
    stream = Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
    start(stream, config, loaded.kernel, *_typed(launch, values))


def _typed(launch: Plan, values: tuple[int | float, ...]) -> list[Any]:
    """In the widths of the kernel's signature; a plain int would be passed in 64 bits, a float in double."""
    addresses = 8 if launch.spec.target == "sparse" else 6
    integers = len(values) - addresses - FLOATS
    kinds = [np.int64] * addresses + [np.int32] * integers + [np.float32] * FLOATS
    return [kind(value) for kind, value in zip(kinds, values, strict=True)]


@cache
def _load(spec: Spec, cc: tuple[int, int], device: int) -> Loaded:
    """Compiled or from the disk, loaded, and allowed the shared memory and the cluster it needs."""
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    Device(device).set_current()
    code = ObjectCode.from_cubin(build.cubin(spec, cc))
    kernel = code.get_kernel(build.ENTRY)
    names = driver.CUfunction_attribute
    handle = driver.CUkernel(int(kernel.handle))
    if spec.family == "rows" or spec.lanes == 32:
        limit = _largest_shared(driver, handle, device)
        _set(driver, names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, limit, handle, device)
    if spec.cluster > PORTABLE_CLUSTER:
        _set(driver, names.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, handle, device)
    return Loaded(kernel, code)


def _largest_shared(driver: Any, handle: Any, device: int) -> int:
    """What a block may have on this device, less what the kernel declares statically."""
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    error, most = driver.cuDeviceGetAttribute(attribute, device)
    _check(error, "asking for the shared memory of a block")
    static = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
    error, used = driver.cuKernelGetAttribute(static, handle, device)
    _check(error, "asking for a kernel's static shared memory")
    return int(most) - int(used)


def _set(driver: Any, attribute: Any, value: int, handle: Any, device: int) -> None:
    (error,) = driver.cuKernelSetAttribute(attribute, value, handle, device)
    _check(error, f"setting {attribute.name} to {value}")


def _check(error: Any, doing: str) -> None:
    if int(error) != 0:
        raise RuntimeError(
            f"{doing}: the CUDA driver answered {error.name}; is the driver as new as the CUDA wheels?"
        )
