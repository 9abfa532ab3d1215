"""Random calls of ``softmax_kl``: the value and the gradient of the specification, or refused in words."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from attacks.lab import Figures, Lab
from stillhouse.kernels import TopK, reference, softmax_kl

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def _logits(chance: random.Random, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    made = (chance.choice([0.1, 3.0, 30.0]) * torch.randn(rows, width, generator=generator)).to(dtype)
    if chance.random() < 0.3:  # another layout of the same numbers
        return torch.stack([made, made], -1)[..., 0]
    return made


def _call(chance: random.Random) -> tuple[torch.Tensor, Any, dict[str, Any]]:
    rows, width = chance.choice([1, 2, 3, 8, 17, 64]), chance.choice([1, 2, 3, 7, 10, 16, 33, 100, 257, 1000])
    dtype = chance.choice(list(TOLERANCE))
    student = _logits(chance, rows, width, dtype)
    if chance.random() < 0.6:
        target: Any = _logits(
            chance, rows, chance.choice([width, width, width + 3, max(1, width - 2)]), dtype
        )
    else:
        k = chance.randrange(1, min(width, 9) + 1)
        values, indices = _logits(chance, rows, width, torch.float32).log_softmax(-1).topk(k)
        target = TopK(indices, values, chance.choice(["renormalise", "tail"]))
    settings: dict[str, Any] = {
        "temperature": chance.choice([0.05, 0.5, 1.0, 2.0, 4.0, 100.0]),
        "divergence": chance.choice(["forward", "reverse", "jsd"]),
        "beta": chance.choice([0.01, 0.3, 0.5, 0.99]),
    }
    if chance.random() < 0.4:
        settings["mask"] = torch.tensor([chance.random() < 0.7 for _ in range(rows)])
    return student, target, settings


def _spoiled(
    chance: random.Random, student: torch.Tensor, target: Any, settings: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """The same call with something in it that is wrong."""
    kind = chance.randrange(7)
    if kind == 0:
        settings["temperature"] = chance.choice([0, -1.0, math.nan, math.inf, 1e-30, "2", None, 1e300])
    elif kind == 1:
        settings["divergence"] = chance.choice(["foward", None, 3, "KL"])
    elif kind == 2:
        settings["mask"] = chance.choice(
            [torch.ones(len(student) + 1, dtype=torch.bool), torch.ones(len(student)), "all", [True]]
        )
    elif kind == 3:
        student = chance.choice([student.long(), student[0, 0], student[:, :0], student.tolist(), None])
    elif kind == 4:
        target = chance.choice([student[:-1], None, "teacher", student.long(), 3.0])
    elif kind == 5:
        settings["beta"], settings["divergence"] = chance.choice([-1.0, 2.0, math.nan, "x"]), "jsd"
    else:
        indices = torch.full((len(student), 2), student.shape[-1] + chance.choice([0, 5, 2**40]))
        target = TopK(indices, torch.full((len(student), 2), -1.0), "renormalise")
    return student, target, settings


def kernel_calls(lab: Lab | None, count: int, chance: random.Random) -> Figures:
    """One in four calls has something wrong in it."""
    figures = Figures()
    for _ in range(count):
        student, target, settings = _call(chance)
        wrong = chance.random() < 0.25
        try:
            if wrong:
                student, target, settings = _spoiled(chance, student, target, settings)
            figures.judged(_judged(student, target, settings))
        except (ValueError, TypeError) as error:
            figures.judged("told" if str(error).strip() else "an error without a word")
        except Exception as error:
            what = f"{getattr(student, 'shape', student)} {getattr(student, 'dtype', '')} {type(target).__name__} {settings}"
            figures.judged(f"{type(error).__name__}: {str(error)[:160]} for {what}")
    return figures


def _judged(student: torch.Tensor, target: Any, settings: dict[str, Any]) -> str:
    if not isinstance(student, torch.Tensor) or not student.is_floating_point():
        softmax_kl(student, target, **settings)
        return "taken, whatever it is"
    given = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = softmax_kl(given, target, **settings)
    (gradient,) = torch.autograd.grad(loss, given)
    exact = student.detach().double().requires_grad_()
    wide = (
        target.double()
        if isinstance(target, torch.Tensor)
        else TopK(target.indices, target.log_probs.double(), target.rest)
    )
    mask = settings.get("mask")
    rows = reference.softmax_kl_rows(
        exact, wide, settings["temperature"], settings["divergence"], settings.get("beta", 0.5), mask
    )
    count = rows.numel() if mask is None else max(int(mask.sum()), 1)
    (expected,) = torch.autograd.grad(rows.sum() / count, exact)
    # Entries below the type's smallest number can't be told from 0.
    floor = max(1e-6, torch.finfo(student.dtype).smallest_normal / 1024 / TOLERANCE[student.dtype])
    away = (gradient.double() - expected).norm() / max(expected.norm().item(), floor * student.numel() ** 0.5)
    # What a teacher's top k holds is float32, whatever the student's logits are.
    kept = torch.float32 if isinstance(target, TopK) else student.dtype
    if not bool(away <= 4 * max(TOLERANCE[student.dtype], TOLERANCE[kept])):
        return f"gradient {away:.2e} away, {student.dtype} {tuple(student.shape)} {type(target).__name__} {settings}"
    return "same"
