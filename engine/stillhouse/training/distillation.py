"""``stillhouse.Distillation``: describes how a student is to be distilled; binds to nothing until attached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from stillhouse.contract.kinds import TaskKind
from stillhouse.contract.splits import Splits
from stillhouse.errors import ConfigError
from stillhouse.plugin.load import MethodLike, as_plugins
from stillhouse.softlabels import SoftLabels
from stillhouse.training.compatibility import EMBEDDED
from stillhouse.training.step import DistillStep
from stillhouse.training.update import Reduce


class Distillation:
    """A method, its teacher and what a batch means: one object for any trainer.

    method
        A name with its settings as further arguments (``temperature=2.0``), ``{"name": ..., setting: ...}``, a Method, or
        a list of these.
    teacher
        A module; several by name; ``"self"``: the student's own base with its adapters off (PEFT); None where the method
        needs none or reads ``soft_labels``.
    target
        Another model to end with, for methods that can.
    task
        What a batch means: ``classification``, ``multi_label``, ``regression``, ``token_classification``, ``causal_lm``,
        ``masked_lm``, ``seq2seq_lm``, ``segmentation`` or ``embedding``. Without it labels are classes, or numbers
        where they are floats; a batch of tokens is then refused.
    soft_labels
        The teacher's kept outputs, read by sample id in place of calling it: each batch has its samples' numbers as
        ``sample_id`` (a column of the data set), those that the labels were made under.
    teacher_moves
        Says that the teacher is changed from outside while the student trains (a moving average).

    Raises PluginError or ConfigError for a method or a setting that is not there.
    """

    def __init__(
        self,
        method: MethodLike | Sequence[MethodLike],
        *,
        teacher: nn.Module | Mapping[str, nn.Module] | str | None = None,
        target: nn.Module | None = None,
        task: str | TaskKind | None = None,
        soft_labels: SoftLabels | None = None,
        teacher_moves: bool = False,
        **settings: Any,
    ) -> None:
        if settings and not isinstance(method, str):
            raise ConfigError(
                f"got the settings {', '.join(settings)} beside a method that is no name; expected them with the method, "
                "as in {'name': 'kd', 'temperature': 2.0}"
            )
        self.method = {"name": method, **settings} if settings else method
        as_plugins(self.method)
        self.teacher, self.target, self.task = teacher, target, task
        self.soft_labels, self.teacher_moves = soft_labels, teacher_moves

    def attach(
        self,
        student: nn.Module,
        *,
        probe: Any,
        steps: int | None = None,
        splits: Splits | None = None,
        batch_size: int = 1,
        seed: int = 0,
        dir: Path | None = None,
        offers: Iterable[str] = EMBEDDED,
        say: Callable[[str], None] = lambda message: None,
        reduce: Reduce | None = None,
        divided_by: float = 1.0,
    ) -> DistillStep:
        """Bind to a student: the step, which is also a context manager that finishes and closes it.

        See DistillStep for the arguments and for what is refused. Settings are read anew: a description may be attached
        several times.
        """
        return DistillStep(
            self.method,
            student=student,
            probe=probe,
            teacher=self.teacher,
            target=self.target,
            task=self.task,
            splits=splits,
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            dir=dir,
            offers=offers,
            say=say,
            soft_labels=self.soft_labels,
            reduce=reduce,
            divided_by=divided_by,
            teacher_moves=self.teacher_moves,
        )
