"""What is kept of a teacher's answer to one row, and how it comes back.

Log-probabilities are the teacher's own, at temperature 1. A row is what the loss averages over: a sample, or a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import ConfigError, DataError
from stillhouse.kernels import Sampled, TeacherHead, TopK
from stillhouse.softlabels.codes import (
    LARGEST_ID,
    byte_table,
    from_three_bytes,
    one_byte,
    three_bytes,
    whole_numbers,
)

Kind = Literal["dense", "topk", "sampled", "hidden"]
Labels = Tensor | TopK | Sampled | TeacherHead
"""What a lookup gives: logits, or what stands for them."""

DTYPES: Mapping[str, Mapping[str, torch.dtype]] = {
    "dense": {"float16": torch.float16, "float32": torch.float32},
    "topk": {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32},
    "sampled": {"uint8": torch.uint8, "uint16": torch.uint16},
    "hidden": {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32},
}
DENSE_UPTO = 1024
"""Outputs up to which every logit is kept by default."""
ENTRIES, DRAWS = 64, 50
"""Defaults: entries of a top k; draws of sampled labels (those of arXiv:2503.16870)."""
_SMALLEST16 = -65504.0


@dataclass(frozen=True)
class Form:
    """One of the ways to keep a row.

    kind
        ``dense``: every logit. ``topk``: the ``k`` most likely classes with the log of the rest. ``sampled``: ``k`` draws
        (Anshumann et al. 2025, arXiv:2503.16870; unbiased). ``hidden``: the last hidden state, of ``width`` numbers, from
        which the teacher's head, kept once, gives the logits.
    dtype
        Of logits, log-probabilities, counts of draws or hidden states; see ``DTYPES``.
    outputs
        Classes, or the size of the vocabulary.
    packed
        Whether each sample's block is compressed (zstd).
    """

    kind: Kind
    dtype: str
    outputs: int
    k: int = 0
    width: int = 0
    packed: bool = False

    @classmethod
    def choose(
        cls,
        outputs: int,
        kind: str | None = None,
        dtype: str | None = None,
        k: int | None = None,
        *,
        width: int = 0,
        packed: bool = False,
    ) -> Form:
        """A form for so many outputs, with what is None filled in: dense to 1,024 outputs, top 64 above.

        Raises ConfigError for settings that have no meaning together.
        """
        kind = kind or ("dense" if outputs <= DENSE_UPTO else "topk")
        if kind not in DTYPES:
            raise ConfigError(f"form '{kind}'; expected one of {', '.join(DTYPES)}")
        if k is not None and kind not in ("topk", "sampled"):
            raise ConfigError(f"k is for topk and sampled; form {kind} keeps whole rows: leave it out")
        k = k if k is not None else {"topk": min(ENTRIES, outputs), "sampled": DRAWS}.get(kind, 0)
        if kind == "topk" and not 1 <= k <= outputs:
            raise ConfigError(f"k = {k}; expected 1 to {outputs}, the number of the teacher's outputs")
        if kind == "sampled" and not 1 <= k <= 65535:
            raise ConfigError(f"k = {k} draws; expected 1 to 65,535")
        if outputs - 1 > LARGEST_ID:
            raise ConfigError(f"{outputs:,} outputs; expected at most {LARGEST_ID + 1:,}")
        usual = {"dense": "float16", "topk": "uint8", "sampled": "uint8" if k < 256 else "uint16"}
        dtype = dtype or usual.get(kind, "float32")
        if dtype not in DTYPES[kind] or (kind == "sampled" and dtype == "uint8" and k > 255):
            raise ConfigError(
                f"{kind} in {dtype}; expected one of {', '.join(DTYPES[kind])}, wide enough for k"
            )
        if packed and kind not in ("topk", "sampled"):
            raise ConfigError(f"packing gains nothing on {kind} rows; expected topk or sampled")
        return cls(kind, dtype, outputs, k, width, packed)  # type: ignore[arg-type]

    @classmethod
    def read(cls, about: Mapping[str, Any]) -> Form:
        """The form that a manifest describes; ConfigError where it is none."""
        try:
            form = cls(**about)
            chosen = cls.choose(
                form.outputs, form.kind, form.dtype, form.k or None, width=form.width, packed=form.packed
            )
        except TypeError as error:
            raise ConfigError(f"no form of soft labels: {error}") from None
        return chosen

    def about(self) -> dict[str, Any]:
        """As a manifest has it."""
        return asdict(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.kind][self.dtype]

    @property
    def row_bytes(self) -> float:
        """Bytes of a row before packing; of sampled rows the most, as the draws of a row may all differ."""
        size = self.torch_dtype.itemsize
        if self.kind == "dense":
            return size * self.outputs + (4 if self.dtype == "float16" else 0)
        if self.kind == "topk":
            return self.k * (3 + size) + size
        if self.kind == "sampled":
            return min(self.k, self.outputs) * (3 + size) + size
        return size * self.width

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the arrays that are kept, in order."""
        return {
            "dense": ("logits", "shift") if self.dtype == "float16" else ("logits",),
            "topk": ("indices", "log_probs", "log_rest"),
            "sampled": ("indices", "counts", "distinct"),
            "hidden": ("hidden",),
        }[self.kind]

    def __str__(self) -> str:
        what = {
            "dense": f"all {self.outputs:,} logits",
            "topk": f"top {self.k} of {self.outputs:,}",
            "sampled": f"{self.k} draws of {self.outputs:,}",
            "hidden": f"hidden states of {self.width}, {self.outputs:,} outputs",
        }[self.kind]
        return f"{self.kind}: {what}, {self.dtype}{', packed' if self.packed else ''}"


# From answers to arrays.


def encode(form: Form, answer: Labels, draws: Tensor | None = None) -> dict[str, Tensor]:
    """The arrays of the rows of an answer.

    answer
        Logits ``(rows, outputs)``, a TopK of at least k entries ``(rows, >= k)``, or hidden states ``(rows, width)`` for
        that form.
    draws
        Uniform numbers in [0, 1) ``(rows, k)`` float64, for sampled rows.

    Raises DataError for rows that hold NaN, +inf, or no finite number.
    """
    if isinstance(answer, TopK):
        return _top(form, _narrowed(answer, form))
    assert isinstance(answer, Tensor), "a teacher gives logits, a top k or hidden states"
    _finite(answer, form)
    if form.kind == "hidden":
        return {"hidden": answer.to(form.torch_dtype).contiguous()}
    if form.kind == "dense":
        return _dense(form, answer)
    wide = answer if answer.dtype == torch.float64 else answer.float()
    if form.kind == "topk":
        return _top(form, TopK.from_logits(wide, form.k))
    assert draws is not None
    return _draw(form, wide, draws)


def _narrowed(top: TopK, form: Form) -> TopK:
    """The first k entries of what a teacher gave that has no logits to give."""
    if form.kind != "topk":
        raise ConfigError(
            f"this teacher gives the top {top.indices.shape[-1]}; expected form topk, got {form.kind}"
        )
    got = top.indices.shape[-1]
    if got < form.k:
        raise ConfigError(f"this teacher gives the top {got}, and the top {form.k} were asked for; lower k")
    order = torch.sort(top.log_probs, dim=-1, descending=True, stable=True).indices[..., : form.k]
    indices, log_probs = top.indices.gather(-1, order), top.log_probs.gather(-1, order)
    if log_probs.isnan().any() or (log_probs > 1e-4).any():
        raise DataError(
            "this teacher's log-probabilities hold NaN or numbers above 0; expected logs of probabilities"
        )
    rest = top.log_rest if got == form.k else None
    if rest is None:
        rest = torch.log1p(-log_probs.double().exp().sum(-1).clamp(max=1.0)).float()
    return TopK(indices, log_probs.clamp(max=0), log_rest=rest, trusted=True)


def _finite(answer: Tensor, form: Form) -> None:
    wrong = answer.isnan() | (answer == float("inf"))
    if form.kind == "hidden":
        wrong |= answer == float("-inf")
    bad = wrong.any(-1) | (answer == float("-inf")).all(-1)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise DataError(
            f"the teacher's answer holds NaN or infinity, first in row {row} of the batch; mend the teacher"
        )


def _dense(form: Form, logits: Tensor) -> dict[str, Tensor]:
    logits = logits.float()
    if form.dtype == "float32":
        return {"logits": logits.contiguous()}
    # less the row's greatest: half precision is finest near 0, which is then where the mass is
    shift = logits.amax(-1)
    less = logits - shift[:, None]
    kept = less.where(less == float("-inf"), less.clamp(min=_SMALLEST16))
    return {"logits": kept.half(), "shift": shift.contiguous()}


def _top(form: Form, top: TopK) -> dict[str, Tensor]:
    assert top.log_rest is not None
    log_probs, log_rest = top.log_probs, top.log_rest
    if form.dtype == "uint8":
        log_probs, log_rest = one_byte(log_probs), one_byte(log_rest)
    return {
        "indices": three_bytes(top.indices.cpu()),
        "log_probs": log_probs.to(form.torch_dtype).cpu().contiguous(),
        "log_rest": log_rest.to(form.torch_dtype).cpu().contiguous(),
    }


def _draw(form: Form, logits: Tensor, draws: Tensor) -> dict[str, Tensor]:
    """Draws with replacement by inverting the distribution function, summed in float64: of 128,000 terms float32 is off."""
    upto = torch.softmax(logits.double(), -1).cumsum(-1)
    drawn = torch.searchsorted(upto, draws.to(upto.device) * upto[:, -1:], right=True)
    drawn = drawn.clamp(max=logits.shape[-1] - 1).cpu().sort(-1).values
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    starts = first.reshape(-1).nonzero()[:, 0]
    counts = torch.diff(starts, append=torch.tensor([drawn.numel()]))
    return {
        "indices": three_bytes(drawn[first]),
        "counts": counts.to(form.torch_dtype),
        "distinct": first.sum(-1).to(form.torch_dtype),
    }


# From arrays to what a loss takes.


def decode(
    form: Form, arrays: Mapping[str, Tensor], head: tuple[Tensor, Tensor | None] | None = None
) -> Labels:
    """What ``encode`` kept, for all rows of the arrays. Log-probabilities in one or two bytes are scaled to sum to one.

    head
        Weight ``(outputs, width)`` and bias of the teacher's head, for hidden states.
    """
    if form.kind == "sampled":
        indices = from_three_bytes(arrays["indices"])
        return _from_draws(form, indices, arrays["counts"], arrays["distinct"])
    if form.kind == "hidden" and form.dtype == "bfloat16":
        assert head is not None
        return TeacherHead(arrays["hidden"], *head)
    return decoded(form, {name: value.numpy() for name, value in arrays.items()}, head)


def decoded(
    form: Form, arrays: Mapping[str, np.ndarray[Any, Any]], head: tuple[Tensor, Tensor | None] | None = None
) -> Labels:
    """``decode`` of dense, top k and hidden states; rows may stand on several axes, and bfloat16 comes as its bits."""
    if form.kind == "dense":
        logits = torch.from_numpy(arrays["logits"])
        if form.dtype == "float32":
            return logits
        return logits.float().add_(torch.from_numpy(arrays["shift"])[..., None])
    if form.kind == "hidden":
        assert head is not None
        hidden = torch.from_numpy(arrays["hidden"])
        return TeacherHead(hidden.view(torch.bfloat16) if form.dtype == "bfloat16" else hidden, *head)
    return _from_top(form, whole_numbers(arrays["indices"]), arrays["log_probs"], arrays["log_rest"])


_TABLE = byte_table().numpy()
_PAIRS = np.empty(256, np.complex64)
"""Each byte's log-probability and, as the imaginary part, its probability: one look for both."""
_PAIRS.real, _PAIRS.imag = _TABLE, np.exp(_TABLE)


def _from_top(
    form: Form,
    indices: np.ndarray[Any, Any],
    log_probs: np.ndarray[Any, Any],
    log_rest: np.ndarray[Any, Any],
) -> TopK:
    if form.dtype == "uint8":
        both, others = _PAIRS.take(log_probs), _PAIRS.take(log_rest)
        logs, rest = both.real, others.real
        total = np.einsum("...i->...", both.imag) + others.imag
    else:
        logs, rest = log_probs.astype(np.float32), log_rest.astype(np.float32)
        total = np.exp(logs).sum(-1) + np.exp(rest)
    if form.dtype != "float32":
        level = np.log(total)
        logs, rest = logs - level[..., None], rest - level
    given = torch.from_numpy(indices), torch.from_numpy(logs)
    return TopK(*given, trusted=True, log_rest=torch.from_numpy(rest))


def _from_draws(form: Form, indices: Tensor, counts: Tensor, distinct: Tensor) -> Sampled:
    """Rows of the width of the longest; the places beyond a row's own have weight 0 and its first class."""
    distinct = distinct.long()
    width = int(distinct.max()) if len(distinct) else 0
    ends = distinct.cumsum(0)
    place = torch.arange(width)[None, :]
    there = place < distinct[:, None]
    at = (ends - distinct)[:, None] + place.where(there, torch.zeros(()).long())
    weights = (
        counts.float()[at].mul_(there) / form.k if len(indices) else counts.float().reshape(len(distinct), 0)
    )
    return Sampled(indices[at] if len(indices) else indices.reshape(len(distinct), 0), weights, trusted=True)


def multiplied(head: TeacherHead) -> Tensor:
    """The logits that hidden states and the head stand for."""
    return torch.nn.functional.linear(head.hidden.to(head.weight.dtype), head.weight, head.bias)


def spread(labels: Labels, mask: Tensor) -> Labels:
    """Rows at the places where ``mask`` is True, in order; elsewhere something harmless, for losses that mask it.

    labels
        ``(mask.sum(), ...)``; what comes back has the mask's shape in place of that first axis.
    """

    def put(rows: Tensor, filler: Tensor | float) -> Tensor:
        out = rows.new_empty((*mask.shape, *rows.shape[1:]))
        out[...] = filler  # type: ignore[assignment]
        out[mask] = rows
        return out

    if isinstance(labels, Tensor):
        return put(labels, 0.0)
    if isinstance(labels, TeacherHead):
        return replace(labels, hidden=put(labels.hidden, 0.0))
    if isinstance(labels, Sampled):
        weights = torch.zeros(labels.weights.shape[-1])
        weights[:1] = 1.0
        return replace(labels, indices=put(labels.indices, 0), weights=put(labels.weights, weights))
    assert labels.log_rest is not None
    k = labels.indices.shape[-1]
    return replace(
        labels,
        indices=put(labels.indices, torch.arange(k)),
        log_probs=put(labels.log_probs, -math.log(2 * k)),
        log_rest=put(labels.log_rest, -math.log(2)),
    )


def shaped(labels: Labels, lead: tuple[int, ...]) -> Labels:
    """The same rows with ``lead`` in place of their first axis."""

    def to(rows: Tensor) -> Tensor:
        return rows.reshape(*lead, *rows.shape[1:])

    if isinstance(labels, Tensor):
        return to(labels)
    if isinstance(labels, TeacherHead):
        return replace(labels, hidden=to(labels.hidden))
    if isinstance(labels, Sampled):
        return replace(labels, indices=to(labels.indices), weights=to(labels.weights))
    assert labels.log_rest is not None
    return replace(
        labels, indices=to(labels.indices), log_probs=to(labels.log_probs), log_rest=to(labels.log_rest)
    )


def moved(labels: Labels, device: torch.device) -> Labels:
    """The same on ``device``."""
    if isinstance(labels, Tensor):
        return labels.to(device)
    if device.type == "cpu":
        return labels
    if isinstance(labels, TeacherHead):
        bias = None if labels.bias is None else labels.bias.to(device)
        return TeacherHead(labels.hidden.to(device), labels.weight.to(device), bias)
    if isinstance(labels, Sampled):
        return replace(labels, indices=labels.indices.to(device), weights=labels.weights.to(device))
    assert labels.log_rest is not None
    return replace(
        labels,
        indices=labels.indices.to(device),
        log_probs=labels.log_probs.to(device),
        log_rest=labels.log_rest.to(device),
    )
