"""Which classes make up which task: given, or found from what a teacher confuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.api import IGNORE, ConfigError, MissingExtra

Tasks = list[list[int]]


def check(tasks: Sequence[Sequence[int]], classes: int, *, overlap: bool = False) -> Tasks:
    """The tasks, sorted, if each of ``classes`` classes stands in exactly one (in one or more with ``overlap``).

    Raises ConfigError naming the classes that are missing, repeated or unknown, or a task without any.
    """
    seen: dict[int, int] = {}
    for number, own in enumerate(tasks):
        if not own:
            raise ConfigError(f"tasks: task {number} is empty; expected at least one class in each")
        for label in own:
            if not 0 <= label < classes:
                raise ConfigError(f"tasks: task {number} has class {label}; expected 0 to {classes - 1}")
            if seen.get(label) == number or (label in seen and not overlap):
                raise ConfigError(
                    f"tasks: class {label} stands in task {seen[label]} and in task {number}; expected each class "
                    "once (gate: merge takes tasks that overlap)"
                )
            seen[label] = number
    missing = sorted(set(range(classes)) - set(seen))
    if missing:
        raise ConfigError(
            f"tasks: no task has class {missing}; expected each of the {classes} classes in one"
        )
    return [sorted(own) for own in tasks]


def confusion(probabilities: Tensor, labels: Tensor | None) -> Tensor:
    """Mean probabilities ``(C, C)`` that a teacher gives each class (column) on rows of each class (row).

    probabilities ``(N, C)``; labels ``(N,)``: a row's class, ``-100`` or None: the teacher's own answer.
    """
    found = probabilities.argmax(-1)
    if labels is not None:
        found = labels.where(labels != IGNORE, found)
    classes = probabilities.shape[-1]
    total = torch.zeros(classes, classes).index_add_(0, found, probabilities.float())
    counts = found.bincount(minlength=classes).clamp(min=1)
    return total / counts[:, None]


def cluster(confused: Tensor, count: int) -> Tasks:
    """At most ``count`` tasks, classes that are confused ``(C, C)`` with each other together.

    Complete linkage over the distance ``1 - (m_ij + m_ji) / max``, with SciPy. A class that would stand alone, with
    nothing for a specialist to tell apart, joins the task it is confused with most.
    """
    if not 1 <= count <= len(confused):
        raise ConfigError(
            f"tasks: got {count} tasks for {len(confused)} classes; expected 1 to {len(confused)}"
        )
    try:
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import squareform
    except ImportError:
        raise MissingExtra("finding tasks by confusion", "scipy", "study") from None
    alike = confused + confused.T
    alike.fill_diagonal_(0)
    distance = 1 - alike / alike.max().clamp(min=1e-12)
    distance.fill_diagonal_(0)
    groups = fcluster(
        linkage(squareform(distance.double().numpy(), checks=False), "complete"), count, "maxclust"
    )
    found: dict[int, list[int]] = {}
    for label, group in enumerate(groups):
        found.setdefault(int(group), []).append(label)
    tasks = sorted(found.values(), key=len, reverse=True)
    while len(tasks) > 1 and len(tasks[-1]) == 1:
        (alone,) = tasks.pop()
        nearest = max(tasks, key=lambda own: float(alike[alone, own].mean()))
        nearest.append(alone)
        tasks.sort(key=len, reverse=True)
    return sorted(sorted(own) for own in tasks)


def sampled(ids: Tensor, tasks: int, temperature: float) -> Tensor:
    """Row numbers in which task k is drawn in proportion to ``size_k ** (1 / temperature)``.

    ids ``(N,)``: each row's task. The largest task's rows stand once; those of smaller ones are repeated, the
    last repetition in part, from evenly spaced rows. Rows of no task (-1) stand once. The rule is that of
    multilingual training (Arivazhagan et al. 2019, arXiv:1907.05019); BAM (Clark et al. 2019) takes 4/3.
    """
    sizes = torch.stack([(ids == k).sum() for k in range(tasks)])
    largest = int(sizes.max())
    drawn = [(ids < 0).nonzero()[:, 0]]
    for k, size in enumerate(sizes.tolist()):
        if not size:
            continue
        wanted = max(size, round(largest * (size / largest) ** (1 / temperature)))
        own = (ids == k).nonzero()[:, 0]
        rest = torch.linspace(0, size - 1, wanted % size).round().long()
        drawn += [own.repeat(wanted // size), own[rest]]
    return torch.cat(drawn)
