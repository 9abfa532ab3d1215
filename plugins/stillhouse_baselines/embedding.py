"""The teacher's vectors as the target of the student's: for sentence embeddings, and from one modality to another."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stillhouse.api import (
    Batch,
    Conformance,
    LossTerm,
    Method,
    MethodConfig,
    StepInfo,
    StudentOut,
    Targets,
    hookimpl,
    kept,
    wide,
)

WITHIN = "takes the other samples of a micro-batch as negatives"


class EmbeddingConfig(MethodConfig):
    """Settings of learning from vectors."""

    loss: Literal["cosine", "contrastive"] = Field(
        "cosine",
        description="cosine: 1 - cos with the teacher's vector; contrastive: which of the batch's vectors is its own.",
    )
    temperature: float = Field(0.05, gt=0, description="Of the contrastive softmax over cosines.")


class Embedding(Method):
    """``1 - cos(student, teacher)``, or InfoNCE between the student's vectors and the teacher's.

    The cosine distance is half of the squared distance of vectors of length 1 (Reimers & Gurevych 2020,
    arXiv:2004.09813, take it of the vectors as they are). ``contrastive`` is the symmetric cross-entropy of CLIP (Radford
    et al. 2021, arXiv:2103.00020) with the teacher's side locked (Zhai et al. 2022, arXiv:2111.07991); its
    negatives are those of the micro-batch, so that its size matters. Teacher and student may read different things:
    ``teacher_inputs`` of the batch. Of class logits it is the same of logit vectors.
    """

    api_version = 1
    Config = EmbeddingConfig
    supports = frozenset({"embedding", "classification"})
    config: EmbeddingConfig
    conformance = Conformance(minimum={"cosine": 0.0})

    @hookimpl
    def loss_terms(
        self, student_out: StudentOut, targets: Targets, batch: Batch, info: StepInfo
    ) -> dict[str, LossTerm]:
        own, given = (wide(kept(side, batch.mask)) for side in (student_out.logits, targets.dense.detach()))
        if self.config.loss == "cosine":
            return {"cosine": LossTerm(info.mean(1 - F.cosine_similarity(own, given), batch.mask))}
        if batch.mask is not None:
            own, given = own[batch.mask], given[batch.mask]
        return {"contrastive": LossTerm(info_nce(own, given, self.config.temperature) * info.share)}


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Mean over both directions of ``-log softmax(cos(first_i, second_j) / temperature)`` at ``j = i``: a scalar.

    Both ``(B, D)``. 0 for one row or none, which have no negatives.
    """
    cosines = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / temperature
    if len(cosines) < 2:
        return cosines.sum() * 0.0
    own = cosines.log_softmax(1).diagonal() + cosines.log_softmax(0).diagonal()
    return -own.mean() / 2
