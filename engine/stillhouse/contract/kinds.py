"""What a batch means: its rows, its labels, its mask. Said by a task kind, never guessed from shapes.

Everything that enters the engine passes ``TaskKind.read`` once: there the labels of a causal model are shifted, and
the mask is made. From then on ``labels[i]`` and ``mask[i]`` belong to ``logits[i]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from stillhouse.contract.batch import IGNORE, Batch, tensors_in
from stillhouse.contract.positions import (
    attention_of,
    check_attention,
    next_token,
    shifted,
    without_packing_mask,
)
from stillhouse.errors import ConfigError, DataError, nearest

LABEL_NAMES = ("labels", "label")
"""Keys of a mapping that hold its labels."""
_FLOATS = "floats are task='regression', 0 or 1 for each class is task='multi_label'"
ID_NAMES = ("ids", "sample_id")
"""Keys of a mapping that hold its samples' numbers."""
_OURS = (*LABEL_NAMES, *ID_NAMES, "mask", "teacher_inputs")
_TRANSFORMERS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "decoder_input_ids")


@dataclass(frozen=True)
class TaskKind:
    """One meaning of a batch.

    name
        As configs and ``task=`` name it.
    labels
        ``classes``: class numbers, one a row; ``flags``: 0 or 1 for each class; ``numbers``: floats; ``none``.
    positions
        Whether a row is a position (token, pixel) rather than a sample. None: as the logits have it.
    class_axis
        Which axis of the model's output the classes are on; losses see them on the last.
    shifted
        Whether a given batch's label i is what position i - 1 predicts, as in transformers' causal models.
    about
        A line for people.
    """

    name: str
    labels: Literal["classes", "flags", "numbers", "none"]
    positions: bool | None
    about: str
    class_axis: int = -1
    shifted: bool = False

    def __str__(self) -> str:
        return self.name

    # Where data enter.

    def read(self, given: Any) -> Batch:
        """A Batch from what a loader gives. A Batch is taken as it is.

        given
            ``(inputs, labels)``, ``(inputs,)``, inputs, or a mapping: its ``labels`` (or ``label``), ``sample_id`` (or
            ``ids``), ``mask`` and ``teacher_inputs`` are taken out, the rest is what the models get by name.

        Raises DataError for labels or masks that don't fit the kind, and for a tuple of other length.
        """
        if isinstance(given, Batch):
            labels = self._labels(given.labels)
            return given if labels is given.labels else replace(given, labels=labels)
        found: dict[str, Any] = {}
        if isinstance(given, tuple | list):
            if len(given) not in (1, 2):
                raise DataError(
                    f"got a batch of {len(given)} parts ({', '.join(type(part).__name__ for part in given)}); expected "
                    "(inputs, labels): say which is which by a mapping, as in {'input_ids': ..., 'attention_mask': "
                    "..., 'labels': ...}, or by a stillhouse.Batch"
                )
            given, found = given[0], {"labels": given[1] if len(given) == 2 else None}
        if isinstance(given, Mapping):
            named = dict(given)
            for name in _OURS:
                value = named.pop(name, None)
                if value is not None and found.get(_field(name)) is not None:
                    twice = (
                        f"beside the inputs and as '{name}' among them"
                        if name in LABEL_NAMES
                        else f"'{name}' too"
                    )
                    raise DataError(f"got {_field(name)} twice: {twice}; expected one")
                found[_field(name)] = value if value is not None else found.get(_field(name))
            given = named
        return self._made(given, found)

    def _made(self, inputs: Any, found: Mapping[str, Any]) -> Batch:
        labels = self._labels(found.get("labels"))
        if self.shifted and labels is not None:
            if labels.dim() != 2:
                raise DataError(
                    f"labels are {tuple(labels.shape)}; expected (B, L), a label for each token of {self}"
                )
            labels = shifted(labels, IGNORE)
        mask = found.get("mask")
        check_attention(inputs)
        inputs = without_packing_mask(inputs)
        if not tensors_in(inputs):
            raise DataError(
                f"got a batch of {type(inputs).__name__} without a tensor; expected inputs as tensors (B, ...)"
            )
        if mask is None:
            mask = self._mask(inputs, labels)
        elif self.shifted and isinstance(mask, Tensor) and mask.dim() == 2 and mask.dtype == torch.bool:
            # It says which tokens count, as the labels do: position i counts if the token that it predicts does.
            mask = shifted(mask, False) & next_token(inputs, attention_of(inputs, decoder=False))
        batch = Batch(inputs, labels, _numbers(found.get("ids")), found.get("teacher_inputs"), mask)
        if batch.ids is not None and len(batch.ids) != len(batch):
            raise DataError(
                f"{len(batch.ids)} sample ids for a batch of {len(batch)} samples; expected one for each sample"
            )
        return batch

    def _mask(self, inputs: Any, labels: Tensor | None) -> Tensor | None:
        """Which rows count, by the labels and the attention mask; None where neither says it."""
        if self.positions is False:
            return None
        positions = self.positions or (labels is not None and labels.dim() > 1)
        attention = attention_of(inputs, decoder=self.name == "seq2seq_lm") if positions else None
        if labels is None or labels.dim() < 2:
            return next_token(inputs, attention) if self.shifted else attention
        mask = labels != IGNORE
        packed = isinstance(inputs, Mapping) and "position_ids" in inputs
        if self.shifted and (attention is not None or packed):
            attention = next_token(inputs, attention)
        return mask & attention if attention is not None and attention.shape == mask.shape else mask

    def _labels(self, given: Any) -> Tensor | None:
        """The labels as a tensor of the type that the kind has."""
        if given is None or self.labels == "none":
            return None
        if _holds_words(given):
            raise DataError("labels are strings; expected numbers: map each name to its class number first")
        labels: Tensor = given if isinstance(given, Tensor) else torch.as_tensor(given)
        if self.labels in ("flags", "numbers"):
            labels = labels if labels.is_floating_point() else labels.float()
            if not labels.isfinite().all():
                raise DataError(
                    f"labels of {self} hold NaN or infinity; expected numbers: drop those rows, or mend them"
                )
            if (
                self.labels == "flags"
                and labels.numel()
                and not 0 <= float(labels.min()) <= float(labels.max()) <= 1
            ):
                raise DataError(
                    f"labels of {self} go from {float(labels.min()):g} to {float(labels.max()):g}; expected 0 or 1 for each class: "
                    "a row without labels has no place here"
                )
            return labels
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise DataError(
                f"labels are {labels.dtype}, and {self} has class numbers (torch.int64); {_FLOATS}"
            )
        return labels if labels.dtype == torch.long else labels.long()

    def complete(self, batch: Batch, rows: Sequence[int] | None = None) -> Batch:
        """The batch with a mask wherever its rows are positions.

        rows
            The shape of one sample's rows, as the models' outputs have it: for a batch that says nothing of them.
        """
        if batch.mask is not None or self.positions is False:
            return batch
        mask = self._mask(batch.inputs, batch.labels)
        if mask is None and rows and self.positions is None:
            mask = attention_of(batch.inputs, decoder=False)
            mask = mask if mask is not None and mask.shape[1:] == tuple(rows) else None
        if mask is None and rows:
            first = tensors_in(batch.inputs)[0][1]
            mask = torch.ones(len(batch), *rows, dtype=torch.bool, device=first.device)
        return batch if mask is None else replace(batch, mask=mask)

    # Counting.

    def rows(self, batch: Batch) -> float:
        """Number of rows that count: what a mean over rows divides by."""
        return float(len(batch) if batch.mask is None else batch.mask.sum())

    def labelled(self, batch: Batch) -> float:
        """Number of rows that count and have a label."""
        known = self.known(batch.labels, batch.probabilities)
        if known is None:
            return self.rows(batch) if batch.has_labels else 0.0
        if batch.mask is not None and batch.mask.shape != known.shape:
            raise DataError(
                f"the mask is {tuple(batch.mask.shape)}, and the labels are {tuple(known.shape)}; expected an entry a row of each"
            )
        return float((known if batch.mask is None else known & batch.mask).sum())

    def known(self, labels: Tensor | None, probabilities: Tensor | None = None) -> Tensor | None:
        """Bool, of the rows' shape: which have a label. None where all or none have."""
        if probabilities is not None:
            return probabilities.sum(-1) > 0
        return labels != IGNORE if labels is not None and self.labels == "classes" else None

    # Alignment.

    def aligned(self, output: Tensor) -> Tensor:
        """The model's output with the class axis last."""
        return output if self.class_axis == -1 else output.movedim(self.class_axis, -1)

    def check(self, batch: Batch, logits: Tensor, who: str = "the student") -> None:
        """Raise DataError where the outputs' rows are not the batch's. ``logits`` has its class axis last."""
        shape, labels = tuple(logits.shape), batch.labels
        rows = shape if self.labels == "numbers" and len(shape) == 1 else shape[:-1]
        if labels is not None and labels.is_floating_point() and self.labels == "classes":
            raise DataError(
                f"labels are {labels.dtype}, and {self} has class numbers (torch.int64); {_FLOATS}"
            )
        if not self._rank_fits(len(rows)):
            raise DataError(_unfit(self, who, shape, f"{self.name} has {self._wanted()}"))
        if rows[:1] != (len(batch),):
            raise DataError(_unfit(self, who, shape, f"the batch has {len(batch)} samples"))
        fits = labels is None or labels.shape == rows
        if labels is not None and self.labels == "flags":
            fits = labels.shape == shape
        elif labels is not None and self.labels == "numbers":
            fits = labels.shape[:1] == shape[:1] and labels.numel() == logits.numel()
        if labels is not None and not fits:
            raise DataError(_unfit(self, who, shape, f"the labels are {tuple(labels.shape)}"))
        expected = rows[:1] if self.labels == "numbers" else rows
        if batch.mask is not None and batch.mask.shape != expected:
            raise DataError(_unfit(self, who, shape, f"the mask is {tuple(batch.mask.shape)}"))
        if batch.probabilities is not None and tuple(batch.probabilities.shape) != shape:
            raise DataError(
                _unfit(self, who, shape, f"the probabilities are {tuple(batch.probabilities.shape)}")
            )

    def _rank_fits(self, rank: int) -> bool:
        if self.positions is None:
            return rank in (1, 2)
        return rank >= 2 if self.positions else rank == 1

    def _wanted(self) -> str:
        return "outputs (B, positions..., classes)" if self.positions else "outputs (B, C), one row a sample"


_CLASSIFICATION = TaskKind(
    "classification", "classes", None, "one class a sample: logits (B, C), labels (B,)"
)
KINDS: Mapping[str, TaskKind] = {
    kind.name: kind
    for kind in (
        _CLASSIFICATION,
        TaskKind(
            "multi_label", "flags", False, "several classes a sample: logits (B, C), labels (B, C) of 0 and 1"
        ),
        TaskKind("regression", "numbers", False, "numbers: outputs (B,) or (B, D), labels alike, floats"),
        TaskKind(
            "token_classification", "classes", True, "one class a token: logits (B, L, C), labels (B, L)"
        ),
        TaskKind(
            "causal_lm",
            "classes",
            True,
            "next token: labels are the input's tokens, shifted here",
            shifted=True,
        ),
        TaskKind(
            "masked_lm",
            "classes",
            True,
            "hidden tokens: logits (B, L, V), labels -100 where nothing is asked",
        ),
        TaskKind(
            "seq2seq_lm", "classes", True, "decoder's tokens: logits (B, L, V), labels (B, L), not shifted"
        ),
        TaskKind(
            "segmentation", "classes", True, "one class a pixel: logits (B, C, H, W), labels (B, H, W)", 1
        ),
        TaskKind("embedding", "none", False, "a vector a sample (B, D), no labels"),
    )
}
CLASS_KINDS = frozenset(name for name, kind in KINDS.items() if kind.labels == "classes")
"""The kinds whose outputs are logits of one softmax a row."""


def kind_of(task: str | TaskKind | None, given: Any) -> TaskKind:
    """The kind that ``task`` names. Without one: class numbers, or numbers where the labels are floats.

    Raises ConfigError for an unknown name, and for a transformers batch that comes without one.
    """
    if isinstance(task, TaskKind):
        return task
    if task is not None:
        if task not in KINDS:
            raise ConfigError(f"task: no kind of task is called '{task}'{nearest(task, KINDS)}")
        return KINDS[task]
    inputs = given.inputs if isinstance(given, Batch) else given
    inputs = inputs[0] if isinstance(inputs, tuple | list) and inputs else inputs
    if isinstance(inputs, Mapping) and any(name in inputs for name in _TRANSFORMERS):
        choice = "\n".join(f"  task='{kind.name}'  {kind.about}" for kind in KINDS.values())
        raise ConfigError(
            f"got a batch of tokens ({', '.join(inputs)}) and no task, which says what it means:\n{choice}"
        )
    labels = _given_labels(given)
    if _names_itself(inputs, labels):
        raise ConfigError(
            "got labels that are the inputs themselves and no task: a class a token would teach the student to copy; expected "
            "task='causal_lm', where a position predicts the next token"
        )
    return (
        KINDS["regression"] if isinstance(labels, Tensor) and labels.is_floating_point() else _CLASSIFICATION
    )


def _given_labels(given: Any) -> Any:
    if isinstance(given, Batch):
        return given.labels
    if isinstance(given, Mapping):
        return next((given[name] for name in LABEL_NAMES if name in given), None)
    return given[1] if isinstance(given, tuple | list) and len(given) == 2 else None


def _names_itself(inputs: Any, labels: Any) -> bool:
    """Whether the labels of tokens are these tokens, as a causal model is given them."""
    if isinstance(inputs, Mapping):
        return any(_names_itself(item, labels) for item in inputs.values())
    if not isinstance(inputs, Tensor) or not isinstance(labels, Tensor) or inputs.is_floating_point():
        return False
    if inputs.dim() != 2 or inputs.shape != labels.shape:
        return False
    known = labels != IGNORE
    return bool(known.any()) and bool((inputs == labels)[known].all())


def _field(name: str) -> str:
    return "labels" if name in LABEL_NAMES else "ids" if name in ID_NAMES else name


def _numbers(ids: Any) -> Tensor | None:
    """Samples' numbers as int64 ``(B,)``."""
    if ids is None:
        return None
    if _holds_words(ids):
        raise DataError(
            "sample ids are strings; expected whole numbers, as of the rows that labels were made of"
        )
    found = ids if isinstance(ids, Tensor) else torch.as_tensor(ids)
    if found.dim() != 1 or found.is_floating_point() or found.dtype == torch.bool:
        raise DataError(
            f"sample ids are {found.dtype} {tuple(found.shape)}; expected whole numbers (B,), one for each sample"
        )
    return found.long()


def _holds_words(labels: Any) -> bool:
    while isinstance(labels, list | tuple) and labels:
        labels = labels[0]
    return isinstance(labels, str)


def _unfit(kind: TaskKind, who: str, shape: tuple[int, ...], what: str) -> str:
    hint = "say what a batch means by task=..."
    if len(shape) == 4:
        hint = "for a class a pixel with classes on axis 1 say task='segmentation'"
    elif len(shape) == 3 and kind.name == "classification":
        hint = "for a class a token say task='token_classification' or 'causal_lm'"
    elif what.startswith("the labels are ("):
        hint = "class numbers have one entry a row (labels.squeeze(-1)); 0 or 1 for each class is task='multi_label'"
    return (
        f"{who} gives outputs of shape {shape} (class axis last), and {what}; expected the same rows: {hint}"
    )
