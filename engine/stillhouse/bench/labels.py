"""What kept soft labels cost: bytes a row, reading beside a bare memory map, training beside hard labels.

stillhouse bench labels

Sizes: 8 samples of 512 tokens over 128,256 classes, drawn as ``teacher_like`` says. Reading: 64 random samples at a time
from a store that the page cache holds, beside numpy's memory map of the same bytes; and beside the forward pass of an
encoder of MiniLM's shape (6 layers of 384) on sentences of 64 tokens. Training: a causal transformer of 4 layers of 256,
V = 32,000, 8 texts of 128 tokens, AdamW, float32; hard labels and stored ones take turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.kernels import softmax_kl
from stillhouse.softlabels import Form, SoftLabels, StoredLabels
from stillhouse.softlabels.fidelity import Fidelity
from stillhouse.softlabels.forms import decode, encode
from stillhouse.softlabels.label import uniform
from stillhouse.softlabels.places import place
from stillhouse.softlabels.shard import Rows, publish
from stillhouse.softlabels.store import describe

VOCABULARY, TOKENS, SAMPLES = 128_256, 512, 8
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
        labels = written(where, form, rows, [TOKENS])
        size = sum(path.stat().st_size for path in where.iterdir())
        seconds = _timed(_each(labels.rows, list(torch.split(torch.arange(SAMPLES), 1))), 16)
        total = SAMPLES * TOKENS
        found.append(
            {"form": str(form), "bytes": size / total, "read_us": seconds / TOKENS * 1e6, **fidelity.means()}
        )
    return found


def written(where: Path, form: Form, rows: Rows, shape: list[int]) -> StoredLabels:
    """A store of one shard."""
    describe(place(where), form, {}, samples=len(rows.ids), row_shape=shape)
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
        ("dense", "float32", 1000, None),
        ("dense", "float16", 1000, None),
        ("topk", "uint8", 32_000, 64),
    ):
        count = 20_000
        form = Form.choose(outputs, kind, dtype, k)
        parts = [_rows(form, start, 1000) for start in range(0, count, 1000)]
        labels = written(folder / f"read-{kind}-{dtype}", form, Rows.joined(parts), [])
        width = int(form.row_bytes)
        bare_path = folder / f"bare-{kind}-{dtype}"
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


def forward_us(batch: int = 64) -> float:
    """Microseconds a sample of an encoder of MiniLM's shape."""
    layer = nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 6).eval()
    with torch.no_grad():
        return _timed(lambda: model(torch.randn(batch, 64, 384)), 5) / batch * 1e6


class Causal(nn.Module):
    """A causal transformer of GPT-2's kind."""

    def __init__(self, vocabulary: int, width: int = 256, layers: int = 4, length: int = 128) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(B, L, V)`` of tokens ``(B, L)``."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        hidden = self.body(self.tokens(ids) + self.places.weight[: ids.shape[1]], mask, is_causal=True)
        return self.head(hidden)  # type: ignore[no-any-return]


def training(folder: Path, steps: int = 12) -> dict[str, float]:
    """Seconds of a step with hard labels and with stored ones (top 64, and 50 draws), in turns; and their ratios."""
    vocabulary, length, batch, samples = 32_000, 128, 8, 64
    stores = {}
    for name, kind, k in (("topk", "topk", 64), ("sampled", "sampled", 50)):
        form = Form.choose(vocabulary, kind, None, k)
        logits = torch.randn(samples * length, vocabulary).mul_(3)
        ids, counts = torch.arange(samples), torch.full((samples,), length)
        rows = Rows(ids, counts, encode(form, logits, uniform(ids, counts, k, 0)))
        stores[name] = written(folder / f"train-{name}", form, rows, [length])
    tokens = torch.randint(vocabulary, (samples, length + 1))
    model = Causal(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(name: str, ids: Tensor) -> None:
        logits = model(tokens[ids, :-1])
        if name == "hard":
            loss = F.cross_entropy(logits.reshape(-1, vocabulary), tokens[ids, 1:].reshape(-1))
        else:
            loss = softmax_kl(logits, stores[name].targets(ids))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    times: dict[str, list[float]] = {"hard": [], **{name: [] for name in stores}}
    for number in range(steps + 1):
        ids = torch.randperm(samples)[:batch]
        for name, taken in times.items():
            start = time.perf_counter()
            step(name, ids)
            if number:
                taken.append(time.perf_counter() - start)
    found = {f"{name}_s": median(taken) for name, taken in times.items()}
    for name in stores:
        ratios = [mine / hard for mine, hard in zip(times[name], times["hard"], strict=True)]
        found[f"{name}_ratio"] = median(ratios)
    return found


def main(options: argparse.Namespace) -> int:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {"reading": reading(folder), "forward_us": forward_us()}
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
    print(f"an encoder of MiniLM's shape: {found['forward_us']:.0f} us a sample")
    for row in found.get("sizes", ()):
        measures = ", ".join(
            f"{key} {row[key]:.3g}" for key in ("kl", "kept_kl", "sampled_kl", "coverage") if key in row
        )
        print(f"{row['form']}: {row['bytes']:.1f} B a row, read in {row['read_us']:.1f} us a row; {measures}")
    for key, value in found.get("training", {}).items():
        print(f"training, {key}: {value:.3f}")
    return 0
