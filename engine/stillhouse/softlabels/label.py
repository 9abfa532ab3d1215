"""Asking a teacher for the rows of some samples, in the form that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.contract.batch import Batch
from stillhouse.contract.context import TEACHER
from stillhouse.contract.kinds import TaskKind
from stillhouse.contract.splits import Split
from stillhouse.errors import ConfigError, DataError
from stillhouse.kernels import TopK
from stillhouse.models.calling import DEFAULT, call, evaluating
from stillhouse.models.captures import Captures
from stillhouse.models.integrity import digest
from stillhouse.models.served import Served
from stillhouse.softlabels.forms import Form, Labels, encode
from stillhouse.softlabels.shard import Rows

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Recipe:
    """How rows are made; one that differs in any of it makes other bytes.

    features
        Modules whose outputs are kept too, in ``feature_dtype``.
    head
        The module that makes logits of hidden states, for that form.
    """

    form: Form
    batch_size: int = 64
    seed: int = 0
    features: tuple[str, ...] = ()
    feature_dtype: str = "float16"
    head: str = ""

    def about(self) -> dict[str, Any]:
        """What bytes depend on beside the form and the features' names, as manifests have it."""
        return {"batch_size": self.batch_size, "seed": self.seed, "feature_dtype": self.feature_dtype}


@dataclass(frozen=True)
class Answered:
    """A teacher's answer to a batch, its valid rows one behind the other.

    answer
        Logits ``(rows, outputs)`` or a TopK.
    counts
        Rows of each sample ``(B,)``.
    shape
        The shape of each sample's rows, ``()`` for one; None where they differ.
    """

    answer: Tensor | TopK
    counts: Tensor
    shape: tuple[int, ...] | None
    hidden: Tensor | None
    per_row: dict[str, Tensor]
    per_sample: dict[str, Tensor]


class Asking:
    """A frozen teacher and what is kept of it. Use ``with``: it leaves no hook on the model."""

    def __init__(
        self,
        teacher: nn.Module,
        device: torch.device,
        features: Sequence[str] = (),
        head: str = "",
        kind: TaskKind = DEFAULT,
    ) -> None:
        """Raises ConfigError for a module that is not there, or features of a teacher elsewhere."""
        self.teacher, self.device, self.head, self.kind = teacher, device, head, kind
        self._captures = Captures({TEACHER: teacher})
        if isinstance(teacher, Served) and (features or head):
            raise ConfigError(
                "a teacher elsewhere gives no hidden states and no features; expected form topk, without them"
            )
        for name in (*features, *([f"{head}:input"] if head else [])):
            self._captures.add(TEACHER, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._captures.close()

    def ask(self, batch: Batch) -> Answered:
        """The teacher's answer to a batch."""
        batch = batch.to(self.device)
        with evaluating(self.teacher):
            if isinstance(self.teacher, Served):
                top = self.teacher.answer(batch)
                answer: Tensor | TopK = top
                found: dict[str, Tensor] = {}
                lead = top.indices.shape[:-1]
            else:
                asks = self._captures.asks(TEACHER)
                with self._captures.collecting(TEACHER):
                    out = call(self.teacher, batch.for_teacher, self.kind, asks)
                answer, lead = out.logits, out.logits.shape[:-1]
                found = self._captures.take(TEACHER, out)
        mask = batch.mask
        if mask is not None and tuple(mask.shape) != tuple(lead):
            raise DataError(
                f"the mask has shape {tuple(mask.shape)}, the teacher's answer {tuple(lead)} without its last axis; expected "
                "the same"
            )
        ragged = mask is not None and len(lead) > 1
        keep = mask if ragged and mask is not None else torch.ones(lead, dtype=torch.bool, device=self.device)
        hidden = found.pop(f"{self.head}:input", None)
        per_row = {
            name: value for name, value in found.items() if len(lead) > 1 and value.shape[: len(lead)] == lead
        }
        return Answered(
            _rows(answer, keep),
            keep.reshape(len(keep), -1).sum(-1).cpu(),
            None if ragged else tuple(lead[1:]),
            None if hidden is None else hidden[keep],
            {name: value[keep] for name, value in per_row.items()},
            {name: value for name, value in found.items() if name not in per_row},
        )

    def rows(
        self,
        split: Split,
        ids: Tensor,
        recipe: Recipe,
        shape: tuple[int, ...] | None,
        look: Callable[[Tensor, Answered], None] | None = None,
    ) -> Rows:
        """The rows of these samples, batch by batch from the first of them.

        shape
            What each sample's rows must have; None: whatever the mask leaves.
        look
            Is shown each batch's ids and exact answer.

        Raises DataError for rows of another shape, or that hold NaN or infinity, naming the samples.
        """
        parts = []
        for some in torch.split(ids, recipe.batch_size):
            answered = self.ask(split.batch(some))
            if answered.shape != shape:
                raise DataError(
                    f"samples {int(some[0])} to {int(some[-1])} have rows of shape {answered.shape}, the first ones {shape}; "
                    "expected the same, or a mask in every batch that says which rows count"
                )
            if look is not None:
                look(some, answered)
            parts.append(_encoded(some, answered, recipe))
        return Rows.joined(parts)


def _rows(answer: Tensor | TopK, keep: Tensor) -> Tensor | TopK:
    if isinstance(answer, Tensor):
        return answer[keep]
    rest = None if answer.log_rest is None else answer.log_rest[keep]
    return TopK(answer.indices[keep], answer.log_probs[keep], log_rest=rest)


def _encoded(ids: Tensor, answered: Answered, recipe: Recipe) -> Rows:
    form = recipe.form
    answer: Labels = answered.answer
    draws = None
    if isinstance(answer, TopK) and answer.indices.numel() and int(answer.indices.max()) >= form.outputs:
        raise DataError(
            f"samples {int(ids[0])} to {int(ids[-1])}: the teacher answers with class {int(answer.indices.max())}; expected "
            f"less than {form.outputs}, the form's outputs"
        )
    if form.kind == "hidden":
        assert answered.hidden is not None
        answer = answered.hidden
    if form.kind == "sampled":
        draws = uniform(ids, answered.counts, form.k, recipe.seed)
    try:
        arrays = encode(form, answer, draws)
    except DataError as error:
        raise DataError(f"samples {int(ids[0])} to {int(ids[-1])}: {error}") from None
    kept = {name: value.detach().cpu() for name, value in arrays.items()}
    dtype = getattr(torch, recipe.feature_dtype)
    return Rows(
        ids,
        answered.counts,
        kept,
        {name: value.to(dtype).cpu() for name, value in answered.per_row.items()},
        {name: value.to(dtype).cpu() for name, value in answered.per_sample.items()},
    )


def uniform(ids: Tensor, counts: Tensor, k: int, seed: int) -> Tensor:
    """Numbers in [0, 1) ``(rows, k)`` that depend on the seed, the sample and the row's place in it, and on nothing else."""
    made = [
        np.random.Generator(np.random.Philox(key=[seed, sample])).random((rows, k))
        for sample, rows in zip(ids.tolist(), counts.tolist(), strict=True)
    ]
    return torch.from_numpy(np.concatenate(made))


def origin(teacher: nn.Module) -> str:
    """The teacher's place in a fingerprint: a digest of its weights, or the name of one elsewhere."""
    return teacher.origin() if isinstance(teacher, Served) else digest(teacher)


def find_head(teacher: nn.Module, name: str = "") -> tuple[str, nn.Linear]:
    """The linear module that makes logits of hidden states: the one named, a transformer's output layer, or the last.

    Raises ConfigError where there is none.
    """
    linear = {
        path: module for path, module in teacher.named_modules() if isinstance(module, nn.Linear) and path
    }
    if name and name not in linear:
        raise ConfigError(
            f"head '{name}' is no linear module of {type(teacher).__name__}; known: {', '.join(linear)}"
        )
    if not name:
        outputs = getattr(teacher, "get_output_embeddings", lambda: None)()
        name = next((path for path, module in linear.items() if module is outputs), "")
    if not name and not linear:
        raise ConfigError(
            f"{type(teacher).__name__} has no linear module; expected one that gives the logits"
        )
    name = name or list(linear)[-1]
    return name, linear[name]


def check_head(answered: Answered, head: nn.Linear, name: str) -> None:
    """Raise ConfigError unless the head alone makes this answer from the hidden states: then they keep all of it."""
    assert isinstance(answered.answer, Tensor)
    if answered.hidden is not None:
        with torch.no_grad():
            again = head(answered.hidden)
        if again.shape == answered.answer.shape and torch.allclose(
            again, answered.answer, rtol=1e-3, atol=1e-4
        ):
            return
    raise ConfigError(
        f"the logits are not what the module '{name}' makes of its input; name the right one with --head, or keep another form"
    )
