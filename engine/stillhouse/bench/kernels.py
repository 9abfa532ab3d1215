"""``stillhouse bench kernels``: softmax-KL forward and backward beside torch, torch.compile and the memory floor.

Every contender of a shape runs once in each round, so that a busy moment of the machine falls on all of them, and in
another order each time; what is compared are the medians, and the medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.kernels import (
    Sampled,
    TopK,
    distillation_loss,
    explain,
    linear_distillation_loss,
    linear_softmax_kl,
    softmax_kl,
)
from stillhouse.runs.compression import peak_bytes

SHAPES = ("128x10", "4096x1000", "1024x32000", "256x151936")
QUICK = ("128x10", "512x1000", "64x32000")
LINEAR = (8192, 32000, 512)
QUICK_LINEAR = (512, 4000, 128)
TEMPERATURE = 2.0
KD_TEMPERATURE, KD_WEIGHTS = 4.0, (0.9, 0.1)  # the defaults of the method kd
NOISE = 0.1  # of logits, beside those of a student that has learnt
SHORT = 1 << 22  # logits of a shape whose times are mostly what the caches and the allocator happen to hold
MOST = 1 << 34  # logits of a shape: some 1 TB for all contenders together
# whose floor is that of a top k; draws are as many as its entries
AGAINST_TOP_K = ("fused top-k", "top-k in place", "fused sampled", "KD top-k")
PICTURES = (".png", ".svg", ".pdf")
Step = Callable[[], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to measure, default cpu"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        metavar="NxV",
        help=f"rows x vocabulary, default {' '.join(SHAPES)}",
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument(
        "--rounds",
        type=_rounds,
        help="rounds of each shape, default 9 (3 with --quick), five times that where they are short",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-linear", action="store_true", help="leave the fused linear layer out")
    parser.add_argument("--json", type=_file, metavar="PATH", help="also write every measured time here")
    parser.add_argument("--plot", type=_picture, metavar="PATH", help="also draw the medians here")


def _shape(text: str) -> tuple[int, int]:
    rows, _, width = text.lower().partition("x")
    if not (rows.isdecimal() and width.isdecimal() and int(rows) and int(width)):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected rows x vocabulary. Fix: such as 1024x32000")
    if int(rows) * int(width) > MOST:
        raise argparse.ArgumentTypeError(
            f"got {int(rows) * int(width):.1e} logits; expected {MOST:.1e} at most. Fix: fewer rows"
        )
    return int(rows), int(width)


def _rounds(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number from 1 on. Fix: such as 9")
    return int(text)


def _file(text: str) -> Path:
    """Looked at before minutes are spent on what is to be written there."""
    path = Path(text)
    place = path if path.exists() else path.parent
    if path.is_dir() or not path.parent.is_dir() or not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected a file that can be written. Fix: one in a folder that exists"
        )
    return path


def _picture(text: str) -> Path:
    if Path(text).suffix.lower() not in PICTURES:
        expected = " or ".join(PICTURES)
        raise argparse.ArgumentTypeError(f"got {text!r}; expected {expected}. Fix: such as times.png")
    return _file(text)


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = argparse.ArgumentParser(prog="stillhouse bench kernels", description=__doc__)
    add_arguments(made)
    return made


def main(args: argparse.Namespace) -> int:
    """Measure, print a table, and write what was asked for."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("device: got cuda; expected a CUDA device that torch sees. Fix: --device cpu.")
        return 2
    rounds = args.rounds or (3 if args.quick else 9)
    backend, why = explain(device)
    print(_machine(device))
    print(
        f"backend {backend} ({why}); torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    )
    results = []
    for rows, width in args.shapes or map(_shape, QUICK if args.quick else SHAPES):
        many = args.rounds or (rounds * 5 if rows * width <= SHORT else rounds)
        results.append(_dense(rows, width, device, many, compiled=not args.no_compile))
        _print(results[-1])
    if not args.no_linear:
        results.append(_linear(*(QUICK_LINEAR if args.quick else LINEAR), device, max(2, rounds // 3)))
        _print(results[-1])
    if args.json:
        args.json.write_text(
            json.dumps({"backend": backend, "torch": torch.__version__, "results": results}, indent=1),
            encoding="utf-8",
        )
    if args.plot:
        _plot(results, args.plot)
    return 0


def _machine(device: torch.device) -> str:
    """The device's name, as it names itself; of a processor with what torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    family = f"family {facts['cpu family']} model {facts['model']}, " if "cpu family" in facts else ""
    return f"{name} ({family}{torch.backends.cpu.get_cpu_capability()})"


def _eager(student: Tensor, teacher: Tensor) -> Tensor:
    log_s = torch.log_softmax(student / TEMPERATURE, -1)
    log_t = torch.log_softmax(teacher / TEMPERATURE, -1)
    return torch.nn.functional.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * TEMPERATURE**2


def _kd_eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KD whole, as it is written by hand."""
    log_s = torch.log_softmax(student / KD_TEMPERATURE, -1)
    log_t = torch.log_softmax(teacher / KD_TEMPERATURE, -1)
    kl = torch.nn.functional.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * KD_TEMPERATURE**2
    return KD_WEIGHTS[0] * kl + KD_WEIGHTS[1] * torch.nn.functional.cross_entropy(student, labels)


def _kd(student: Tensor, target: Any, labels: Tensor, **settings: Any) -> Tensor:
    soft, label = distillation_loss(
        student, target, labels, temperature=KD_TEMPERATURE, weights=KD_WEIGHTS, **settings
    )
    return KD_WEIGHTS[0] * soft + KD_WEIGHTS[1] * label


def _kd_apart(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The fused divergence, and torch's cross-entropy beside it."""
    kl = softmax_kl(student, teacher, temperature=KD_TEMPERATURE)
    return KD_WEIGHTS[0] * kl + KD_WEIGHTS[1] * torch.nn.functional.cross_entropy(student, labels)


def _step(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Step:
    """Forward and backward; a loss in place leaves its gradient in ``logits``, which costs the next round the same."""
    leaf = logits.detach().requires_grad_()
    # logits as a layer gives them to every loss: no leaf, and no view of one; nothing is copied
    out = torch.ops.aten._unsafe_view.default(leaf, leaf.shape)  # noqa: SLF001

    def step() -> None:
        loss(out).backward()  # type: ignore[no-untyped-call]
        leaf.grad = None

    return step


def _dense(rows: int, width: int, device: torch.device, rounds: int, *, compiled: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = ((3 * torch.randn(rows, width, generator=generator)).to(device) for _ in range(2))
    scratch, other = student.clone(), torch.empty_like(student)
    # a student that has learnt: its rows take the formulas that do not cancel, and longer
    close = teacher + NOISE * student
    labels = torch.randint(width, (rows,), generator=generator).to(device)
    kd_scratch, kd_top_k = (
        student.clone(),
        TopK.from_logits(teacher, min(64, width), temperature=KD_TEMPERATURE),
    )
    half, half_teacher, half_scratch = student.bfloat16(), teacher.bfloat16(), student.bfloat16()
    k = min(64, width)
    top_k = TopK.from_logits(teacher, k, temperature=TEMPERATURE)
    sampled = Sampled.from_logits(teacher, k, temperature=TEMPERATURE)

    def kernel(target: Any, **settings: Any) -> Callable[[Tensor], Tensor]:
        return lambda s: softmax_kl(s, target, temperature=TEMPERATURE, **settings)

    contenders: dict[str, Step] = {
        "floor": lambda: (other.copy_(teacher), student.sum()),
        "floor top-k": lambda: (other.copy_(student), top_k.indices.sum(), top_k.log_probs.sum()),
        "eager": _step(lambda s: _eager(s, teacher), student),
        "fused": _step(kernel(teacher), student),
        "fused in place": _step(kernel(teacher, inplace=True), scratch),
        "fused reverse": _step(kernel(teacher, divergence="reverse"), student),
        "fused jsd": _step(kernel(teacher, divergence="jsd"), student),
        "close": _step(kernel(teacher), close),
        "close jsd": _step(kernel(teacher, divergence="jsd"), close),
        "fused top-k": _step(kernel(top_k), student),
        "top-k in place": _step(kernel(top_k, inplace=True), scratch),
        "fused sampled": _step(kernel(sampled), student),
        "KD eager": _step(lambda s: _kd_eager(s, teacher, labels), student),
        "KD apart": _step(lambda s: _kd_apart(s, teacher, labels), student),
        "KD": _step(lambda s: _kd(s, teacher, labels), student),
        "KD in place": _step(lambda s: _kd(s, teacher, labels, inplace=True), kd_scratch),
        "KD top-k": _step(lambda s: _kd(s, kd_top_k, labels), student),
        "eager bf16": _step(lambda s: _eager(s, half_teacher), half),
        "fused bf16": _step(kernel(half_teacher), half),
        "bf16 in place": _step(kernel(half_teacher, inplace=True), half_scratch),
    }
    if compiled:
        program = torch.compile(_eager)
        contenders["compile"] = _step(lambda s: program(s, teacher), student)
        whole = torch.compile(_kd_eager)
        contenders["KD compile"] = _step(lambda s: whole(s, teacher, labels), student)
    liger = _liger(device)
    if liger is not None:
        contenders["liger"] = _step(lambda s: liger[0](s, teacher), student)
        contenders["KD liger"] = _step(lambda s: liger[1](s, teacher, labels), student)
    return _measure(f"{rows}x{width}", contenders, device, rounds, inner=50 if rows * width < 10_000 else 1)


def _liger(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """Its divergence, and that with its cross-entropy; it runs on GPUs alone."""
    if device.type != "cuda":
        return None
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss
    except ImportError:
        return None
    divergence, cross_entropy = (
        LigerKLDIVLoss(reduction="batchmean", log_target=True),
        LigerCrossEntropyLoss(),
    )

    def soft(student: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
        log_s, log_t = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
        kl: Tensor = divergence(log_s, log_t) * temperature**2
        return kl

    def both(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        kl = soft(student, teacher, KD_TEMPERATURE)
        whole: Tensor = KD_WEIGHTS[0] * kl + KD_WEIGHTS[1] * cross_entropy(student, labels)
        return whole

    return soft, both


def _linear(rows: int, width: int, hidden: int, device: torch.device, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(width, hidden, generator=generator) / hidden**0.5).to(device).requires_grad_()
    teacher = torch.randn(rows, width, generator=generator).to(device)
    labels = torch.randint(width, (rows,), generator=generator).to(device)

    def step(loss: Callable[[], Tensor]) -> Step:
        def run() -> None:
            loss().backward()  # type: ignore[no-untyped-call]
            # at the end, not at the start: whether the profiler sees the last step's go is a matter of luck
            states.grad = weight.grad = None

        return run

    contenders = {
        "eager": step(lambda: _eager(states @ weight.t(), teacher)),
        "fused": step(lambda: softmax_kl(states @ weight.t(), teacher, temperature=TEMPERATURE)),
        "linear fused": step(lambda: linear_softmax_kl(states, weight, teacher, temperature=TEMPERATURE)),
        "KD eager": step(lambda: _kd_eager(states @ weight.t(), teacher, labels)),
        "KD linear fused": step(lambda: _kd_linear(states, weight, teacher, labels)),
    }
    return _measure(f"linear {rows}x{width}x{hidden}", contenders, device, rounds, inner=1)


def _kd_linear(states: Tensor, weight: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    soft, label = linear_distillation_loss(
        states, weight, teacher, labels, temperature=KD_TEMPERATURE, weights=KD_WEIGHTS
    )
    whole: Tensor = KD_WEIGHTS[0] * soft + KD_WEIGHTS[1] * label
    return whole


def _measure(
    name: str, contenders: dict[str, Step], device: torch.device, rounds: int, *, inner: int
) -> dict[str, Any]:
    memory = {key: _peak(step, device) for key, step in contenders.items()}  # also warms up
    times: dict[str, list[float]] = {key: [] for key in contenders}
    order, shuffler = list(contenders.items()), random.Random(0)  # noqa: S311
    for _ in range(rounds):
        shuffler.shuffle(order)  # who comes next pays for memory that was given back, and finds other caches
        for key, step in order:
            times[key].append(_time(step, device, inner))
    return {"shape": name, "ms": times, "peak_mib": memory}


def _time(step: Step, device: torch.device, inner: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(inner):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / inner * 1e3


def _peak(step: Step, device: torch.device) -> float:
    """Largest sum of tensor memory taken during one step, beyond what was there, in MiB."""
    step()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return peak_bytes(step) / 2**20


def _ratio(result: dict[str, Any], numerator: str, denominator: str) -> float | None:
    times = result["ms"]
    if numerator not in times or denominator not in times:
        return None
    pairs = zip(times[numerator], times[denominator], strict=True)
    return float(statistics.median(above / below for above, below in pairs))


def _print(result: dict[str, Any]) -> None:
    print(
        f"\n{result['shape']:<24}{'ms':>10}{'eager / it':>12}{'compile / it':>14}{'it / floor':>12}{'peak MiB':>10}"
    )
    for key, times in result["ms"].items():
        kind = "KD " if key.startswith("KD") else ""
        against = "eager bf16" if "bf16" in key else f"{kind}eager"
        floor = "floor top-k" if key in AGAINST_TOP_K else "floor"
        cells = (
            _ratio(result, against, key),
            None if "bf16" in key else _ratio(result, f"{kind}compile", key),
            None if "bf16" in key else _ratio(result, key, floor),
        )
        shown = "".join(
            f"{'' if cell is None else f'{cell:.2f}':>{size}}"
            for cell, size in zip(cells, (12, 14, 12), strict=True)
        )
        print(
            f"  {key:<22}{statistics.median(times):>10.3f}{shown}{result['peak_mib'][key]:>10.1f}", flush=True
        )


def _plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 4), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        names = list(result["ms"])
        medians = [statistics.median(result["ms"][name]) for name in names]
        axis.plot(medians, names, "o")  # no bars: on a logarithmic axis their length means nothing
        for name, median in zip(names, medians, strict=True):
            axis.annotate(f"{median:.3g}", (median, name), (6, -3), textcoords="offset points", fontsize=8)
        axis.set_title(result["shape"])
        axis.set_xlabel("ms, forward + backward")
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())  # labels that would overlap
        axis.margins(x=0.25)
        axis.grid(axis="x", alpha=0.3)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
