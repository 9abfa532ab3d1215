"""Metrics that read a split batch by batch, so that its outputs are never joined.

A metric is any object with ``update`` and ``compute``: torchmetrics' are such, and so are those here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.contract.kinds import TaskKind
from stillhouse.errors import ConfigError, DataError, nearest

LIMIT = 512 * 2**20
"""Bytes of outputs that are joined for a function that scores them whole."""


@runtime_checkable
class Metric(Protocol):
    """What reads a split's rows part by part.

    Only rows that count are handed over: those that the mask has, with a label. ``reset`` is called before each
    split where there is one, and ``to(device)`` too.
    """

    def update(self, outputs: Tensor, labels: Tensor, /) -> None:
        """Some rows: outputs ``(n, C)`` in float32 or better and labels ``(n,)``.

        Flags are ``(n, C)``; numbers are ``(n,)`` or, where there are several a row, ``(n, D)``, as their outputs are.
        """

    def compute(self) -> Any:
        """A number, several (a tensor, a sequence), or numbers by name, of all rows since the beginning."""


Metrics = Mapping[str, Metric]


class Accuracy:
    """Part of the rows whose greatest output is at the label."""

    higher_is_better = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.right, self.rows = 0, 0

    def update(self, outputs: Tensor, labels: Tensor, /) -> None:
        self.right += int((outputs.argmax(-1) == labels).sum())
        self.rows += len(labels)

    def compute(self) -> float:
        """Rounded as a float32, as a mean of torch's is."""
        share = torch.tensor(self.right, dtype=torch.float32) / torch.tensor(self.rows, dtype=torch.float32)
        return float(share)


class NegativeLogLikelihood:
    """Mean of ``-log softmax(outputs)[label]`` in nats a row; sums in float64."""

    higher_is_better = False

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total, self.rows = 0.0, 0

    def update(self, outputs: Tensor, labels: Tensor, /) -> None:
        self.total += float(F.cross_entropy(outputs, labels, reduction="none").double().sum())
        self.rows += len(labels)

    def compute(self) -> float:
        return self.total / self.rows if self.rows else math.nan


class Perplexity(NegativeLogLikelihood):
    """``exp`` of the mean negative log-likelihood a row; infinity where that has no float."""

    def compute(self) -> float:
        mean = super().compute()
        return math.exp(mean) if mean < 700 else math.inf


class BinaryNegativeLogLikelihood(NegativeLogLikelihood):
    """The same of flags: mean over rows and classes of the binary cross-entropy of ``sigmoid(outputs)``."""

    def update(self, outputs: Tensor, labels: Tensor, /) -> None:
        losses = F.binary_cross_entropy_with_logits(outputs, labels.to(outputs.dtype), reduction="none")
        self.total += float(losses.double().sum())
        self.rows += losses.numel()


class _Torchmetrics:
    """A metric of torchmetrics, made when the first rows say how many outputs there are."""

    def __init__(self, make: Callable[[Any, int], Any], prepare: Callable[[Tensor, Tensor], Any]) -> None:
        self._make, self._prepare = make, prepare
        self._metric: Any = None

    def reset(self) -> None:
        if self._metric is not None:
            self._metric.reset()

    def update(self, outputs: Tensor, labels: Tensor, /) -> None:
        if self._metric is None:
            self._metric = self._make(_torchmetrics(), 1 if outputs.dim() == 1 else outputs.shape[-1])
            if hasattr(self._metric, "set_dtype"):
                self._metric.set_dtype(torch.float64)
            self._metric.to(outputs.device)
        self._metric.update(*self._prepare(outputs, labels))

    def compute(self) -> Any:
        return math.nan if self._metric is None else self._metric.compute()


def _torchmetrics() -> Any:
    import torchmetrics  # here: it takes seconds, since it imports what is installed beside it

    return torchmetrics


def _classes(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return outputs.argmax(-1), labels


def _flags(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return (outputs > 0).long(), labels.long()


def _numbers(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return outputs.double(), labels.double()


def _wrapped(
    prepare: Callable[[Tensor, Tensor], Any], make: Callable[[Any, int], Any]
) -> Callable[[], Metric]:
    return lambda: _Torchmetrics(make, prepare)


@dataclass(frozen=True)
class Known:
    """A metric that is called by name: its maker by what labels are, and whether higher is better."""

    make: Mapping[str, Callable[[], Metric]]
    higher_is_better: bool = True


KNOWN: Mapping[str, Known] = {
    "accuracy": Known(
        {
            "classes": Accuracy,
            "flags": _wrapped(_flags, lambda tm, n: tm.classification.MultilabelAccuracy(n, average="micro")),
        }
    ),
    "f1": Known(
        {
            "classes": _wrapped(_classes, lambda tm, n: tm.classification.MulticlassF1Score(n)),
            "flags": _wrapped(_flags, lambda tm, n: tm.classification.MultilabelF1Score(n)),
        }
    ),
    "nll": Known({"classes": NegativeLogLikelihood, "flags": BinaryNegativeLogLikelihood}, False),
    "perplexity": Known({"classes": Perplexity}, False),
    "miou": Known({"classes": _wrapped(_classes, lambda tm, n: tm.classification.MulticlassJaccardIndex(n))}),
    "r2": Known({"numbers": _wrapped(_numbers, lambda tm, n: tm.R2Score(multioutput="variance_weighted"))}),
    "mse": Known({"numbers": _wrapped(_numbers, lambda tm, n: tm.MeanSquaredError())}, False),
    "spearman": Known({"numbers": _wrapped(_numbers, lambda tm, n: tm.SpearmanCorrCoef(num_outputs=n))}),
}
"""The metrics that can be named: ``f1`` and ``miou`` are means over classes, ``r2`` weighs targets by their variance."""

DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "nll"),
    "token_classification": ("accuracy", "nll"),
    "causal_lm": ("accuracy", "nll", "perplexity"),
    "masked_lm": ("accuracy", "nll", "perplexity"),
    "seq2seq_lm": ("accuracy", "nll", "perplexity"),
    "segmentation": ("miou", "accuracy", "nll"),
    "multi_label": ("f1", "accuracy", "nll"),
    "regression": ("r2", "mse"),
}
"""What is scored where nothing is said, by task kind; the first is the one that tables show."""


def metrics_named(names: Iterable[str], kind: TaskKind) -> dict[str, Metric]:
    """New metrics, by name. ConfigError for a name that is unknown, or has no meaning for the kind."""
    found = {}
    for name in names:
        if name not in KNOWN:
            raise ConfigError(f"score: no metric is called {name!r}{nearest(str(name), KNOWN)}")
        if kind.labels not in KNOWN[name].make:
            fit = ", ".join(known for known, metric in KNOWN.items() if kind.labels in metric.make) or "none"
            raise ConfigError(f"score: {name} has no meaning for {kind}; expected some of: {fit}")
        found[name] = KNOWN[name].make[kind.labels]()
    return found


def default_metrics(kind: TaskKind) -> dict[str, Metric]:
    """New metrics that a kind of task is scored by."""
    return metrics_named(DEFAULTS.get(kind.name, ()), kind)


def higher_is_better(name: str, metric: Any = None) -> bool:
    """Whether more of a metric is better, as far as that is known: by the object, else by its name; else it is."""
    return known_direction(name, metric) is not False


def known_direction(name: str, metric: Any = None) -> bool | None:
    """The same, and None where neither the object nor the name says."""
    own = getattr(metric, "higher_is_better", None)
    if own is None and name in KNOWN:
        own = KNOWN[name].higher_is_better
    return None if own is None else bool(own)


def metric_behind(score: str, metrics: Metrics) -> Metric | None:
    """The object that a score of that name comes from: its own, that of several numbers, or the one called ``""``."""
    found = metrics.get(score)
    return metrics.get(score.partition(".")[0], metrics.get("")) if found is None else found


class WholeSplit:
    """A function of a whole split's outputs ``(N, C)`` and labels ``(N,)``, rows that count alone, on the CPU.

    It is for scores that can't be taken part by part; a split's outputs may take 512 MiB.

    higher_is_better
        Whether more of its numbers is better; None: their names say.

    Raises DataError where they take more.
    """

    def __init__(
        self, function: Callable[[Tensor, Tensor], Any], higher_is_better: bool | None = None
    ) -> None:
        self.function, self.higher_is_better = function, higher_is_better
        self.reset()

    def reset(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._bytes = 0

    def update(self, outputs: Tensor, labels: Tensor, /) -> None:
        self._bytes += outputs.numel() * outputs.element_size()
        if self._bytes > LIMIT:
            raise too_large(self._bytes)
        self._parts.append((outputs.cpu().clone(), labels.cpu()))

    def compute(self) -> Any:
        if not self._parts:
            raise DataError("no row to be scored has a label; expected some: mend the labels or the mask")
        outputs, labels = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        self.reset()
        return self.function(outputs, labels)


def too_large(size: int) -> DataError:
    """The refusal of a split whose outputs are too many for a function of them all."""
    return DataError(
        f"the score is a function of a whole split's outputs, which take {size:,} bytes or more here; at most {LIMIT:,} "
        "are joined: score by names or by metrics with update and compute (torchmetrics), which read batch by batch"
    )


def numbers(scores: Any, who: str) -> dict[str, float]:
    """Metrics as Python numbers: from numbers of any library, and from several (a score for each class) one each.

    Raises ConfigError for what is no mapping of names to numbers.
    """
    if not isinstance(scores, Mapping) or not scores:
        got = (
            "an empty mapping" if isinstance(scores, Mapping) else f"{type(scores).__name__} ({scores!r:.60})"
        )
        raise ConfigError(f"score of {who} gave {got}; expected metrics by name, as in {{'accuracy': 0.9}}")
    found: dict[str, float] = {}
    for name, value in scores.items():
        for key, one in _flat(str(name), value):
            if isinstance(one, str | bytes) or not hasattr(one, "__float__"):
                raise ConfigError(
                    f"score of {who} gave '{name}' = {value!r:.60} ({type(value).__name__}); expected a number"
                )
            found[key] = int(one) if isinstance(one, int) else float(one)
    return found


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    """Single numbers with names of their own."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, Mapping):
        items: Iterable[tuple[Any, Any]] = plain.items()
    elif isinstance(plain, list | tuple):
        items = enumerate(plain)
    else:
        return [(name, plain)]
    return [found for key, one in items for found in _flat(f"{name}.{key}", one)]
