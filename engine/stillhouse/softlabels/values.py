"""Values that no teacher's answer has: in a file by another writer, or by somebody who means harm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from stillhouse.softlabels.codes import byte_table, from_three_bytes
from stillhouse.softlabels.forms import Form

TOO_MUCH: Mapping[str, float] = {"uint8": 0.1, "float16": 1e-2, "float32": 1e-2}
"""By how much a row's probabilities may exceed 1. A byte is off by at most sqrt(24 d) / 254 of a probability e^-d: 0.095 at
the deepest; half precision by 0.004; logs that a server rounds to two places by 0.005."""
_AT_ONCE = 2**22
"""Entries."""


def holds_nan(value: Tensor) -> bool:
    """Whether a tensor holds NaN, read in stretches."""
    if not value.is_floating_point():
        return False
    flat = value.reshape(-1)
    return any(bool(flat[start : start + _AT_ONCE].isnan().any()) for start in range(0, len(flat), _AT_ONCE))


def value_problems(form: Form, arrays: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, str]]:
    """For each thing that can be wrong: which rows have it, bool ``(rows,)``, and what to call it.

    arrays
        The form's arrays of some rows, not packed.
    """
    if form.kind == "hidden":
        yield ~arrays["hidden"].isfinite().all(-1), "holds NaN or infinity in its hidden states"
    elif form.kind == "dense":
        logits = arrays["logits"]
        wrong = logits.isnan() | (logits == float("inf"))
        yield wrong.any(-1) | (logits == float("-inf")).all(-1), "holds NaN or infinity in its logits"
        if "shift" in arrays:
            yield ~arrays["shift"].isfinite(), "holds NaN or infinity in its shift"
    elif form.kind == "topk":
        yield from _of_top(form, arrays)
    else:
        yield from _of_draws(form, arrays)


def _of_top(form: Form, arrays: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, str]]:
    logs, rest = arrays["log_probs"], arrays["log_rest"]
    if form.dtype == "uint8":
        table = byte_table()
        logs, rest = table[logs.int()], table[rest.int()]
    logs, rest = logs.float(), rest.float()
    for name, value in (("log_probs", logs), ("log_rest", rest[:, None])):
        yield (value.isnan() | (value == float("inf"))).any(-1), f"holds NaN or infinity in {name}"
    mass = logs.exp().sum(-1) + rest.exp()
    most = 1 + TOO_MUCH[form.dtype]
    yield mass > most, f"has probabilities that sum to more than {most:g}"
    yield mass == 0, "has no probability above 0"
    classes = from_three_bytes(arrays["indices"]).sort(-1).values
    yield (classes.diff(dim=-1) == 0).any(-1), "has one class twice in a row"


def _of_draws(form: Form, arrays: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, str]]:
    distinct = arrays["distinct"].long()
    row = torch.repeat_interleave(torch.arange(len(distinct)), distinct)
    drawn = torch.zeros(len(distinct), dtype=torch.long).index_add_(0, row, arrays["counts"].long())
    yield drawn != form.k, f"has counts that do not sum to the {form.k} draws"
    both = (row * form.outputs + from_three_bytes(arrays["indices"])).sort().values
    twice = torch.zeros(len(distinct), dtype=torch.bool)
    twice[both[1:][both.diff() == 0] // form.outputs] = True
    yield twice, "has one class twice in a row"
