"""An update of a language model beside the same update written by hand, and beside TRL's.

stillhouse bench trainers

A GPT-2 student and teacher of random weights, V = 32,000, 8 x 128 tokens of which a quarter is masked, forward KL at T = 1,
AdamW, float32, CPU. The candidates take turns; times are medians, and ratios to the hand-written loop are medians of the
rounds' ratios. Memory is the peak over what was resident before the first update, of a process of its own each.
All candidates must give the same loss and, where they train, the same gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.errors import MissingExtra

VOCABULARY, SAMPLES, LENGTH, MASKED = 32_000, 8, 128, 0.25

Loss = Callable[[], Tensor]


def models() -> tuple[nn.Module, nn.Module]:
    """Student (2 layers, 128 wide) and frozen teacher (4 layers, 256 wide), the same at every call."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise MissingExtra("stillhouse bench trainers", "transformers", "hf") from None
    none = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    made = []
    for seed, (layers, width) in enumerate(((2, 128), (4, 256))):
        torch.manual_seed(seed)
        sizes = {
            "vocab_size": VOCABULARY,
            "n_positions": LENGTH,
            "n_embd": width,
            "n_layer": layers,
            "n_head": 4,
        }
        made.append(GPT2LMHeadModel(GPT2Config(**sizes, **none)))
    return made[0].train(), made[1].eval().requires_grad_(False)


def batch(samples: int = SAMPLES) -> dict[str, Tensor]:
    """Rows whose last quarter is padding; labels are the tokens."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (samples, LENGTH), generator=draw)
    real = torch.ones_like(ids)
    real[:, round(LENGTH * (1 - MASKED)) :] = 0
    return {"input_ids": ids, "attention_mask": real, "labels": ids.where(real.bool(), -100)}


def _inputs(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}


def by_hand(student: nn.Module, teacher: nn.Module, rows: Mapping[str, Tensor]) -> Loss:
    """``F.kl_div`` on the rows that count."""
    kept = rows["labels"][:, 1:] != -100

    def loss() -> Tensor:
        with torch.no_grad():
            target = teacher(**_inputs(rows)).logits[:, :-1][kept]
        own = student(**_inputs(rows)).logits[:, :-1][kept]
        return F.kl_div(own.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)

    return loss


def gkd(student: nn.Module, teacher: nn.Module, rows: Mapping[str, Tensor]) -> Loss:
    """The loss of TRL's GKDTrainer, forward KL."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        raise MissingExtra("stillhouse bench trainers", "trl", "rl") from None
    trainer: Any = GKDTrainer
    host = SimpleNamespace(teacher_model=teacher, beta=0.0, generalized_jsd_loss=trainer.generalized_jsd_loss)
    return lambda: trainer.compute_loss(host, student, dict(rows))


def step(student: nn.Module, teacher: nn.Module, rows: Mapping[str, Tensor]) -> Loss:
    """The engine's step."""
    from stillhouse.training.distillation import Distillation

    distillation = Distillation("kd", teacher=teacher, task="causal_lm", temperature=1.0, alpha=1.0)
    made = distillation.attach(student, probe={name: value[:2, :8] for name, value in rows.items()})

    def loss() -> Tensor:
        found: Tensor = made(student, rows).loss
        return found

    return loss


def twice(student: nn.Module, teacher: nn.Module, rows: Mapping[str, Tensor]) -> Loss:
    """The obvious wiring of a fused layer: the models make their logits, and the loss multiplies them out again."""
    from stillhouse.kernels import TeacherHead, linear_softmax_kl

    mask = rows["labels"][:, 1:] != -100
    own, given = (model.get_output_embeddings().weight for model in (student, teacher))  # type: ignore[operator]

    def loss() -> Tensor:
        with torch.no_grad():
            target = teacher(**_inputs(rows), output_hidden_states=True).hidden_states[-1][:, :-1]
        hidden = student(**_inputs(rows), output_hidden_states=True).hidden_states[-1][:, :-1]
        found: Tensor = linear_softmax_kl(hidden, own, TeacherHead(target, given), mask=mask)
        return found

    return loss


CANDIDATES: dict[str, Callable[[nn.Module, nn.Module, Mapping[str, Tensor]], Loss]] = {
    "by hand": by_hand,
    "trl gkd": gkd,
    "twice": twice,
    "stillhouse": step,
}


class Trained:
    """A candidate with a student and an optimizer of its own."""

    def __init__(self, name: str, samples: int = SAMPLES) -> None:
        self.student, teacher = models()
        self.loss = CANDIDATES[name](self.student, teacher, batch(samples))
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)

    def update(self) -> float:
        """One update; seconds."""
        start = time.perf_counter()
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def difference(name: str) -> float:
    """How far loss and gradient are from the hand-written loop's, relative."""
    found = []
    for which in ("by hand", name):
        trained = Trained(which)
        loss = trained.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = torch.cat([p.grad.flatten() for p in trained.student.parameters() if p.grad is not None])
        found.append((loss.detach(), gradient))
    (loss, gradient), (own, its) = found
    return max(float((own - loss).abs() / loss.abs()), float((its - gradient).norm() / gradient.norm()))


def peak_mib(name: str, updates: int = 2) -> float:
    """Peak memory over what was resident before, in MiB: for a process of its own."""
    Trained(name, samples=1).update()  # what is compiled, is compiled here
    trained = Trained(name)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew here
    before = _resident("VmRSS")
    for _ in range(updates):
        trained.update()
    return _resident("VmHWM") - before


def _resident(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def _peak_outside(name: str) -> float:
    code = f"from stillhouse.bench.trainers import peak_mib; print(peak_mib({name!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure(rounds: int, *, memory: bool = True) -> dict[str, dict[str, float]]:
    """For each candidate: seconds of an update, its ratio to the hand-written loop, peak memory, and the difference."""
    every = {name: Trained(name) for name in CANDIDATES}
    times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for turn in range(rounds + 1):
        for name in sorted(every, reverse=turn % 2 == 1):  # whoever comes second finds warmer caches
            seconds = every[name].update()
            if turn:  # the first round warms up
                times[name].append(seconds)
    del every
    base = times["by hand"]
    found = {
        name: {
            "seconds": median(own),
            "ratio": median(mine / its for mine, its in zip(own, base, strict=True)),
            "difference": difference(name),
        }
        for name, own in times.items()
    }
    if memory and Path("/proc/self/clear_refs").exists():
        for name, figures in found.items():
            figures["peak_mib"] = _peak_outside(name)
    return found


def main(options: argparse.Namespace) -> int:
    """Print the figures; 1 where a loss or a gradient differs by more than 1e-4."""
    found = measure(options.rounds, memory=not options.no_memory)
    right = all(figures["difference"] <= 1e-4 for figures in found.values())
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "rounds": options.rounds, **found}, indent=2))
        return 0 if right else 1
    print(f"{'':12} {'ms':>8} {'ratio':>7} {'MiB':>7} {'difference':>11}")
    for name, figures in found.items():
        peak = f"{figures['peak_mib']:7.0f}" if "peak_mib" in figures else "      -"
        print(
            f"{name:12} {figures['seconds'] * 1e3:8.1f} {figures['ratio']:7.3f} {peak} {figures['difference']:11.1e}"
        )
    return 0 if right else 1
