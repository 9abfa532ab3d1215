"""One of the softmax-KL kernel's divergences beside the labels' loss."""

from __future__ import annotations

from typing import Literal

from stillhouse.api import Batch, LossTerm, StepInfo, StudentOut, Targets, label_loss
from stillhouse.kernels import softmax_kl


def divergence_and_labels(
    name: str,
    student_out: StudentOut,
    targets: Targets,
    batch: Batch,
    info: StepInfo,
    *,
    temperature: float,
    alpha: float,
    divergence: Literal["reverse", "jsd"],
    beta: float = 0.5,
) -> dict[str, LossTerm]:
    """``alpha`` times the divergence at ``temperature``, as term ``name``, and ``1 - alpha`` times ``ce``."""
    logits = student_out.logits
    apart = softmax_kl(
        logits,
        targets.soft,
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        mask=batch.mask,
        count=info.rows,
    )
    terms = {name: LossTerm(apart, alpha)}
    if alpha < 1 and targets.has_labels:
        terms["ce"] = LossTerm(label_loss(logits, targets, batch, info), 1 - alpha)
    return terms
