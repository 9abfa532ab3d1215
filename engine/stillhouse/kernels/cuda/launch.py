"""Loads compiled kernels and launches them on torch's current stream, through cuda.core."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.kernels.cuda import build
from stillhouse.kernels.cuda.arguments import DTYPES, constants, flatten, pack, target_kind, widths
from stillhouse.kernels.cuda.plan import Plan, Spec, plan
from stillhouse.kernels.errors import fail, require
from stillhouse.kernels.targets import Labels, Target, TopK

PORTABLE_CLUSTER = 8


@dataclass(frozen=True)
class Loaded:
    """A kernel on one device. ``code`` keeps the module alive."""

    kernel: Any
    code: Any


def run(
    student: Tensor, target: Target, temperature: float, divergence: str, beta: float, mask: Tensor | None,
    scales: tuple[Any, Any], out_grad: Tensor | None, labels: Labels | None,
) -> Tensor:  # fmt: skip
    """See ``stillhouse.kernels.cuda.softmax_kl_fwd_bwd``."""
    dtype = _checked_dtype(student, target)
    assert labels is None or labels.indices is not None, "probabilities are not for these kernels"
    restricted = isinstance(target, TopK) and target.rest == "renormalise" and divergence == "reverse"
    assert not restricted, "the student is to be restricted to the k entries first, which makes dense rows"
    rows, v = student.shape
    losses = torch.empty((1 if labels is None else 2, rows), dtype=torch.float32, device=student.device)
    if rows == 0:
        return losses
    source = student.contiguous()
    grad = out_grad
    if grad is not None and not (grad.is_contiguous() and grad.dtype == source.dtype):
        grad = torch.empty_like(source)  # to copy from
    factors, scaling = _scales(scales, student.device)
    smoothing = 0.0 if labels is None else labels.smoothing
    read = [source, *flatten(target, temperature)]
    others = [
        source if grad is None else grad, losses, None if mask is None else mask.contiguous(),
        None if labels is None or labels.indices is None else labels.indices.contiguous(),
        _constants(temperature, divergence, beta, smoothing, student.device), scaling,
    ]  # fmt: skip
    with torch.cuda.device(student.device):
        cc = torch.cuda.get_device_capability()
        launch = plan(
            rows, widths(v, target, divergence)[0], dtype, divergence, target_kind(target), cc, grad is not None,
            labels is not None,
        )  # fmt: skip
        tensors, more = ([0 if x is None else x.data_ptr() for x in some] for some in (read, others))
        _start(launch, cc, student.device, pack(launch, (rows, v), target, tensors, more, factors))
    if out_grad is not None and grad is not None and grad is not out_grad:
        out_grad.copy_(grad)
    return losses


def _checked_dtype(student: Tensor, target: Target) -> str:
    got, expected = student.dtype, list(DTYPES)
    require(got in DTYPES, "student logits", got, f"one of {expected}", "cast them first")
    if isinstance(target, Tensor) and target.dtype != got:
        raise fail("teacher logits", target.dtype, f"the student's {got}", "cast one of them")
    place = f"a tensor on {student.device}"
    require(student.is_cuda, "student logits", place, "a CUDA device", "use .cuda()")
    return DTYPES[got]


def _scales(scales: tuple[Any, Any], device: torch.device) -> tuple[tuple[float, float], Tensor | None]:
    """(Numbers, and what they are to be multiplied by where that is known on the device alone)."""
    if not any(isinstance(x, Tensor) for x in scales):
        return (float(scales[0]), float(scales[1])), None
    given = [torch.as_tensor(x, dtype=torch.float32, device=device) for x in scales]
    return (1.0, 1.0), torch.stack(given)


@lru_cache(maxsize=64)
def _constants(
    temperature: float, divergence: str, beta: float, smoothing: float, device: torch.device
) -> Tensor:
    """Copied to the device once."""
    return torch.tensor(
        constants(temperature, divergence, beta, smoothing), dtype=torch.float32, device=device
    )


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
    start(stream, config, loaded.kernel, *_typed(spec, values))


def _typed(spec: Spec, values: tuple[int | float, ...]) -> list[Any]:
    """In the widths of the kernel's signature; a plain int would be passed in 64 bits, a float in double."""
    kinds = _kinds(spec.target)
    return [kind(value) for kind, value in zip(kinds, values, strict=True)]


@cache
def _kinds(target: str) -> list[Any]:
    return [getattr(np, str(kind)) for kind in build.module_of(target).SIGNATURE]


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
