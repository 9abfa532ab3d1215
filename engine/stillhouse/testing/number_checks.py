"""Checks of what a method computes: gradients, finite numbers, masks, micro-batches, determinism."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.api import Batch
from stillhouse.contract.batch import tensors_in
from stillhouse.models.integrity import digest
from stillhouse.testing.checks import CheckFunction, NotApplicable, expect
from stillhouse.testing.rig import Rig, Subject, everything
from stillhouse.testing.toys import FLAG, PAD


def gradient_reaches_the_student(subject: Subject, folder: Path) -> None:
    """Training changes the model that is evaluated, by gradients alone."""
    rig = Rig(subject, everything(subject, folder=folder))
    before = {name: tensor.clone() for name, tensor in rig.final.state_dict().items()}
    rig.loop.run()
    changed = [
        name for name, tensor in rig.final.state_dict().items() if not torch.equal(tensor, before[name])
    ]
    expect(
        bool(changed),
        subject,
        "no weight of the student changed in a run; expected its loss to depend on them",
    )


def teacher_is_untouched(subject: Subject, folder: Path) -> None:
    """The teacher's weights stay as they are, bit for bit, and it gets no gradient and no train mode."""
    rig = Rig(subject, everything(subject, folder=folder))
    if rig.teacher is None:
        raise NotApplicable("runs without a teacher")
    before = digest(rig.teacher)
    rig.loop.run()
    expect(digest(rig.teacher) == before, subject, "wrote to the teacher's weights")
    for name, parameter in rig.teacher.named_parameters():
        frozen = parameter.grad is None and not parameter.requires_grad
        expect(frozen, subject, f"unfroze the teacher's '{name}'; expected no gradient there")
    modes = [name for name, module in rig.teacher.named_modules() if module.training]
    expect(not modes, subject, "put the teacher into train mode; expected eval mode")


def finite_in_float32(subject: Subject, folder: Path) -> None:
    """Losses and weights are finite with large logits, in float32."""
    _finite(subject, folder, "fp32")


def finite_in_bf16(subject: Subject, folder: Path) -> None:
    """Losses and weights are finite with large logits, under bf16 autocast."""
    _finite(subject, folder, "bf16")


def _finite(subject: Subject, folder: Path, precision: str) -> None:
    given = everything(subject, folder=folder, precision=precision, learning_rate=1e-4)
    teacher = None if given.teacher is None else given.toys.teacher(scale=60.0)
    rig = Rig(subject, replace(given, teacher=teacher, student=given.toys.student(scale=60.0)))
    _run_finite(rig, f"in {precision} with logits around 60")


def _run_finite(rig: Rig, what: str) -> None:
    try:
        rig.loop.run()
    except ValueError:
        if not rig.unfinished():
            raise
    expect(not rig.unfinished(), rig.subject, f"{what}: {rig.unfinished()}")


def takes_a_batch_of_one(subject: Subject, folder: Path) -> None:
    """A batch may hold one sample."""
    rig = Rig(subject, everything(subject, folder=folder, batch_size=1))
    _run_finite(rig, "with one sample in a batch")


def masked_rows_are_ignored(subject: Subject, folder: Path) -> None:
    """Masked rows give no loss and no gradient, whatever they hold; the mean is over the others."""
    counts = torch.tensor([True, False, True, True, False, True, True, False])
    makers = [lambda batch: _holding(batch, counts, 0.5), lambda batch: _holding(batch, counts, 2 * FLAG)]
    runs = [Rig(subject, everything(subject, folder=folder)).updates(make) for make in makers]
    without = Rig(subject, everything(subject, folder=folder)).updates(lambda batch: _samples(batch, counts))
    for (stage, metrics, gradient), infinite, absent in zip(*runs, without, strict=True):
        where = f"in stage '{stage.name}'"
        message = f"{where} a masked row changed the {{}}; expected it to count nowhere: use batch.mask"
        expect(
            close(gradient, infinite[2]), subject, message.format("gradient when its logits were infinite")
        )
        expect(close(metrics["loss"], infinite[1]["loss"]), subject, message.format("loss"))
        expect(
            close(metrics["loss"], absent[1]["loss"]) and close(gradient, absent[2]),
            subject,
            f"{where} the loss with masked rows is {float(metrics['loss']):.6g}, without these rows "
            f"{float(absent[1]['loss']):.6g}; expected the same: divide by info.rows",
        )


def _holding(batch: Batch, counts: Tensor, content: float) -> Batch:
    """The samples that do not count masked, and holding something else."""
    rows = counts if batch.mask is None else batch.mask & counts[:, None]
    if isinstance(batch.inputs, Tensor):
        inputs = batch.inputs.clone()
        inputs[~counts, 0] = content
        return replace(batch, inputs=inputs, mask=rows)
    tokens = batch.inputs["input_ids"].clone()
    tokens[~counts] = PAD if content > FLAG else 1
    return replace(batch, inputs={**batch.inputs, "input_ids": tokens}, mask=rows)


def _samples(batch: Batch, counts: Tensor) -> Batch:
    """The samples that count, and no others."""
    index = counts.nonzero()[:, 0]
    return replace(batch.part(index), mask=counts[index] if batch.mask is None else batch.mask[index])


def micro_batches_do_not_matter(subject: Subject, folder: Path) -> None:
    """An update's gradient is the same in one, two and four micro-batches, and in uneven ones."""
    runs = [
        Rig(subject, everything(subject, folder=folder)).updates(_split(sizes))
        for sizes in ((8,), (4, 4), (2, 2, 2, 2), (5, 2, 1))
    ]
    for (stage, metrics, whole), *others in zip(*runs, strict=True):
        for parts, (_, terms, gradient) in zip(("2", "4", "3 uneven"), others, strict=True):
            expect(
                close(whole, gradient),
                subject,
                f"in stage '{stage.name}' the gradient of {parts} micro-batches differs from that of one batch by "
                f"{float((whole - gradient).abs().max()):.3g} (loss {float(metrics['loss']):.6g} and "
                f"{float(terms['loss']):.6g}); expected the same: divide by info.rows, or multiply by info.share",
            )


def _split(sizes: Sequence[int]) -> Callable[[Batch], list[Batch]]:
    ends = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
    return lambda batch: [batch.part(slice(start, end)) for start, end in pairwise(ends)]


def _same(batch: Batch) -> Batch:
    return batch


def same_seed_same_bits(subject: Subject, folder: Path) -> None:
    """Two runs with one seed give the same weights and losses, bit for bit."""
    rigs = [Rig(subject, everything(subject, folder=folder / str(number))) for number in (1, 2)]
    for rig in rigs:
        rig.loop.run()
    expect(
        rigs[0].metrics == rigs[1].metrics, subject, "two runs with one seed had different losses" + _RANDOM
    )
    first, second = (rig.weights() for rig in rigs)
    for name, tensor in first.items():
        expect(
            torch.equal(tensor, second[name]), subject, f"two runs with one seed differ in {name}" + _RANDOM
        )


_RANDOM = "; expected the same bits: draw from torch's global generator, or from one seeded with run.seed"


def student_equal_to_teacher_gives_the_minimum(subject: Subject, folder: Path) -> None:
    """Each term that declares a minimum has it where the student is a copy of the teacher, and never less."""
    declared = subject.conformance.minimum
    if not declared:
        raise NotApplicable("conformance.minimum declares none")
    given = everything(subject, folder=folder)
    same = Rig(
        subject,
        replace(given, student=copy.deepcopy(given.teacher) if given.teacher else given.toys.student()),
    )
    other = Rig(subject, given)
    equal: dict[str, float] = {}
    unequal: dict[str, float] = {}
    for rig, found in ((same, equal), (other, unequal)):
        for _, metrics, _ in rig.updates(_same):
            for name, value in metrics.items():
                found.setdefault(name.removeprefix(f"{subject.name}."), float(value))
    for name, minimum in declared.items():
        expect(name in equal, subject, f"declares a minimum for '{name}'; its terms are {', '.join(equal)}")
        expect(
            abs(equal[name] - minimum) <= 1e-5,
            subject,
            f"'{name}' is {equal[name]:.6g} where student and teacher are equal; it declares {minimum:.6g}",
        )
        expect(
            unequal[name] >= minimum - 1e-6,
            subject,
            f"'{name}' is {unequal[name]:.6g} for another student; it declares {minimum:.6g} as its minimum",
        )


def batch_is_untouched(subject: Subject, folder: Path) -> None:
    """What the batch holds is the same after an update as before."""
    held: list[tuple[Batch, Batch]] = []

    def make(batch: Batch) -> Batch:
        batch = replace(batch, extra={"kind": torch.zeros(len(batch))})
        held.append((batch, copy.deepcopy(batch)))
        return batch

    list(Rig(subject, everything(subject, folder=folder)).updates(make))
    for batch, before in held:
        for name in ("inputs", "labels", "ids"):
            pairs = zip(*(tensors_in(getattr(one, name), name) for one in (batch, before)), strict=True)
            expect(
                all(torch.equal(now, then) for (_, now), (_, then) in pairs),
                subject,
                f"changed batch.{name} in place; expected it untouched: give a new Batch from batch_transform",
            )
        expect(batch.extra.keys() == before.extra.keys(), subject, "changed the keys of batch.extra")


def no_graph_is_kept(subject: Subject, folder: Path) -> None:
    """The student's outputs of one update are gone when the next has been made."""
    rig = Rig(subject, everything(subject, folder=folder))
    seen: list[weakref.ref[Tensor]] = []

    def remember(module: Any, given: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            seen.append(weakref.ref(output))

    handles = [model.register_forward_hook(remember) for model in rig.step.run.models.values()]
    rig.loop.run()
    for handle in handles:
        handle.remove()
    rig.step.captures.close()
    gc.collect()
    alive = sum(output() is not None for output in seen)
    expect(
        alive == 0,
        subject,
        f"{alive} of {len(seen)} outputs of the student, with their graphs, are alive after the run; expected none: "
        "keep tensor.detach()",
    )


def close(a: Tensor, b: Tensor) -> bool:
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return False
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-3)
    return float((a - b).abs().max()) <= 2e-5 * scale


CHECKS: tuple[CheckFunction, ...] = (
    gradient_reaches_the_student,
    teacher_is_untouched,
    finite_in_float32,
    finite_in_bf16,
    takes_a_batch_of_one,
    masked_rows_are_ignored,
    micro_batches_do_not_matter,
    same_seed_same_bits,
    student_equal_to_teacher_gives_the_minimum,
    batch_is_untouched,
    no_graph_is_kept,
)
