"""What the models give, what the losses compare with, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stillhouse.errors import ConfigError

if TYPE_CHECKING:
    from stillhouse.kernels import Sampled, TopK


@dataclass(frozen=True, slots=True)
class StudentOut:
    """What the student gives: logits ``(B, C)`` or ``(B, L, V)``, and the features asked for, by module name.

    The class axis is the last one, whatever the model's own order. For the task kind ``embedding`` and for
    regression ``logits`` holds the model's output: a vector or numbers for each sample.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TeacherOut:
    """What the teacher gives, without a graph.

    ``logits`` is a dense tensor, a ``TopK`` or a ``Sampled`` (whatever ``softmax_kl`` takes as its
    target); ``features`` holds the named modules' outputs where the teacher was called. Where several teachers answer,
    ``logits`` is the mean of their log-probabilities, and ``each`` holds every one's own outputs by name.
    """

    logits: Tensor | TopK | Sampled
    features: Mapping[str, Tensor] = field(default_factory=dict)
    each: Mapping[str, TeacherOut] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Targets:
    """What the losses read, after every label transform.

    labels
        As the batch's, or None.
    soft
        The teacher's logits (dense, ``TopK`` or ``Sampled``), or None where no teacher is called.
    probabilities
        Class probabilities ``(..., C)`` in place of ``labels``; a row of zeros has none.
    """

    labels: Tensor | None = None
    soft: Any = None
    probabilities: Tensor | None = None

    @property
    def has_labels(self) -> bool:
        """Whether there are labels in either form."""
        return self.labels is not None or self.probabilities is not None

    @property
    def dense(self) -> Tensor:
        """The teacher's logits as a dense tensor; ConfigError where they are not."""
        if not isinstance(self.soft, Tensor):
            raise ConfigError(
                f"got {type(self.soft).__name__} for the teacher's logits; expected a dense tensor: use a "
                "method that takes what this teacher gives"
            )
        return self.soft


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One named loss: a scalar already divided by the update's rows (``info.mean`` does that).

    The engine adds ``weight * value`` to the loss and logs ``value``.
    """

    value: Tensor
    weight: float | Tensor = 1.0
