"""The engine's step beside the same step written by hand.

stillhouse bench overhead

MNIST-1D's shapes, an MLP student, KD against a CNN teacher, batch 128, float32, CPU. The two take turns, a
block of updates each; the figure is the median of the blocks' ratios. Both must end with the same weights,
bit for bit. Hook dispatch is measured apart: the time of all hook calls of a step, with five plugins.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.api import Batch, LossTerm, Method, StepInfo, StudentOut, Targets, hookimpl
from stillhouse.config import OptimizerConfig, Training
from stillhouse.contract.splits import Split, Splits, TensorSplit
from stillhouse.kernels import softmax_kl
from stillhouse.models.integrity import freeze
from stillhouse.plugin.dispatch import Plugin, Plugins
from stillhouse.softlabels import SoftLabels
from stillhouse.training.loop import Loop
from stillhouse.training.optim import make_optimizer
from stillhouse.training.order import Order
from stillhouse.training.step import DistillStep

ROWS, BATCH, INPUTS, CLASSES, TEMPERATURE = 4000, 128, 40, 10, 4.0


def student() -> nn.Module:
    """The student, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(INPUTS, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, CLASSES)
    )


def teacher() -> nn.Module:
    """A small convolutional teacher."""
    torch.manual_seed(1)
    unflatten, conv = nn.Unflatten(1, (1, INPUTS)), nn.Conv1d(1, 25, 5, stride=2)
    return freeze(nn.Sequential(unflatten, conv, nn.ReLU(), nn.Flatten(), nn.Linear(25 * 18, CLASSES)))


def data() -> TensorSplit:
    """Random inputs of MNIST-1D's shape."""
    return TensorSplit(torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(2)))


class Quiet:
    """A watcher that keeps nothing, so that the teacher is called at each step, as by hand."""

    def updated(self, loop: Loop, metrics: Any) -> None: ...

    def stage_ended(self, loop: Loop) -> None: ...

    def keep(self, loop: Loop, split: Split) -> SoftLabels | None:
        return None


class KLOnly(Method):
    """``T^2 KL(teacher || student)``."""

    api_version: ClassVar[int] = 1

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        kl = softmax_kl(student_out.logits, targets.soft, temperature=TEMPERATURE, count=info.rows)
        return {"kl": LossTerm(kl)}


def engine(steps: int) -> tuple[Callable[[int], object], nn.Module]:
    """The engine's loop: call it with a number of updates."""
    model, split = student(), data()
    settings = Training(steps=steps, batch_size=BATCH)
    probe = split.batch(torch.arange(2))
    step = DistillStep(KLOnly(), student=model, teacher=teacher(), probe=probe, steps=steps)
    return Loop(step, Splits(split), settings, torch.device("cpu"), Quiet()).run, model


def by_hand(steps: int) -> tuple[Callable[[int], object], nn.Module]:
    """The same, as one would write it."""
    model, split, source = student(), data(), teacher()
    optimizer = make_optimizer([{"params": list(model.parameters())}], OptimizerConfig())  # type: ignore[call-arg]
    order = Order(ROWS, BATCH, 0, 0)
    made = 0

    def run(updates: int) -> None:
        nonlocal made
        for _ in range(updates):
            inputs = split.inputs[order.batch(made)]
            with torch.no_grad():
                target = source(inputs)
            loss = softmax_kl(model(inputs), target, temperature=TEMPERATURE, count=BATCH)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            made += 1

    return run, model


class _Hooked(Method):
    """A plugin that implements every hook of a step and does nothing in them."""

    api_version: ClassVar[int] = 1
    requires: ClassVar[frozenset[str]] = frozenset()
    zero: ClassVar[Tensor] = torch.zeros(())

    @hookimpl
    def batch_transform(self, batch: Batch, info: StepInfo) -> None:
        return None

    @hookimpl
    def label_transform(self, targets: Targets, batch: Batch, info: StepInfo) -> None:
        return None

    @hookimpl
    def loss_terms(self, student_out: StudentOut, targets: Targets, info: StepInfo) -> dict[str, LossTerm]:
        return {"zero": LossTerm(self.zero)}

    @hookimpl
    def on_update_end(self, info: StepInfo) -> None:
        return None


def dispatch_seconds(plugins: int = 5, calls: int = 2000) -> float:
    """Median seconds that the hooks of one step cost with that many plugins."""
    loaded = Plugins([Plugin(f"p{number}", "bench", _Hooked()) for number in range(plugins)])
    batch, step = Batch(torch.zeros(1, 1)), StepInfo()
    out, targets = StudentOut(torch.zeros(1, 1)), Targets()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        loaded.batch_transform(batch, step)
        loaded.teacher_forward(None, batch, step)
        loaded.label_transform(targets, batch, None, step)
        loaded.combine_terms(loaded.loss_terms(out, None, targets, batch, step), step)
        loaded.on_update_end(step, {})
        times.append(time.perf_counter() - start)
    return median(times)


def measure(steps: int, blocks: int) -> dict[str, Any]:
    """Times and ratios of interleaved blocks, and whether the weights are equal after the first."""
    total = steps * (blocks + 1)
    sides = {"engine": engine(total), "by_hand": by_hand(total)}
    times: dict[str, list[float]] = {"engine": [], "by_hand": []}
    equal = False
    for block in range(blocks + 1):
        # Whoever comes second finds warmer caches: take turns.
        for name in sorted(sides, reverse=block % 2 == 1):
            start = time.perf_counter()
            sides[name][0](steps)
            if block:  # the first block warms up
                times[name].append((time.perf_counter() - start) / steps)
        if not block:
            pairs = zip(sides["engine"][1].parameters(), sides["by_hand"][1].parameters(), strict=True)
            equal = all(torch.equal(mine, its) for mine, its in pairs)
    ratios = [mine / its for mine, its in zip(times["engine"], times["by_hand"], strict=True)]
    return {
        "engine_us": median(times["engine"]) * 1e6,
        "by_hand_us": median(times["by_hand"]) * 1e6,
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "weights_equal": equal,
        "dispatch_us_five_plugins": dispatch_seconds() * 1e6,
        "steps": steps,
        "blocks": blocks,
        "threads": torch.get_num_threads(),
    }


def main(options: argparse.Namespace) -> int:
    """Print the figures; 1 if the results differ."""
    found = measure(options.steps, options.blocks)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0 if found["weights_equal"] else 1
    low, high = found["ratio_range"]
    blocks, steps = found["blocks"], found["steps"]
    print(f"engine   {found['engine_us']:8.1f} us a step (median of {blocks} blocks of {steps})")
    print(f"by hand  {found['by_hand_us']:8.1f} us a step")
    print(f"ratio    {found['ratio']:8.3f} (blocks from {low:.3f} to {high:.3f})")
    print(f"hooks    {found['dispatch_us_five_plugins']:8.1f} us a step with five plugins")
    print(f"weights  {'equal bit for bit' if found['weights_equal'] else 'DIFFER'} after {steps} updates")
    return 0 if found["weights_equal"] else 1
