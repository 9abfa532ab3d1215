"""Learning from a teacher's vectors, and from one's own, against float64 by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from toys import loop, net, rows

import stillhouse
from stillhouse.api import TensorSplit
from stillhouse.training.step import DistillStep
from stillhouse_baselines.contrastive import Contrastive, vectors
from stillhouse_baselines.embedding import Embedding, EmbeddingConfig, info_nce


def normalised(values: torch.Tensor) -> np.ndarray:
    found = values.detach().double().numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def nce_by_hand(first: torch.Tensor, second: torch.Tensor, temperature: float) -> float:
    scores = normalised(first) @ normalised(second).T / temperature
    losses = []
    for way in (scores, scores.T):
        for number, row in enumerate(way):
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[number])
    return float(np.mean(losses))


def test_the_cosine_loss_is_one_minus_the_mean_cosine():
    made = loop([Embedding()])
    batch = made.splits.train.batch(torch.arange(8))
    _, terms = made.step(made.step.run.student, batch)
    own, given = (normalised(model(batch.inputs)) for model in (made.step.run.student, made.step.teacher))
    assert terms["embedding.cosine"].item() == pytest.approx(1 - (own * given).sum(1).mean(), rel=1e-6)


def test_the_contrastive_loss_finds_each_rows_own_vector_among_the_batchs():
    made = loop([Embedding(EmbeddingConfig(loss="contrastive", temperature=0.2))])
    batch = made.splits.train.batch(torch.arange(8))
    _, terms = made.step(made.step.run.student, batch)
    student, teacher = (model(batch.inputs) for model in (made.step.run.student, made.step.teacher))
    expected = nce_by_hand(student, teacher, 0.2)
    assert terms["embedding.contrastive"].item() == pytest.approx(expected, rel=1e-6)


class Flagged(nn.Module):
    """Infinite vectors for rows whose first input is large: what masked rows may hold."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = net(seed=seed)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(inputs).masked_fill(inputs[:, :1] > 100, torch.inf)


@pytest.mark.parametrize("loss", ["cosine", "contrastive"])
def test_masked_rows_give_neither_loss_nor_gradient(loss):
    x = rows(8)[0]
    x[5:, 0] = 200
    whole = TensorSplit(x, mask=torch.arange(8) < 5).batch(torch.arange(8))
    part = TensorSplit(x[:5]).batch(torch.arange(5))
    found = []
    for batch in (whole, part):
        student, method = Flagged(1), Embedding(EmbeddingConfig(loss=loss))
        with_it = stillhouse.Distillation(method, teacher=Flagged(2), task="embedding").attach(
            student, probe=part
        )
        with with_it as step:
            made = step(student, batch).loss
            made.backward()
        found.append((made.item(), [weight.grad for weight in student.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for first, second in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(first, second)


def test_without_a_teacher_the_student_reads_both_sides():
    x, other = rows(8)[0], rows(8, seed=5)[0]
    batch = TensorSplit(x, teacher_inputs=other).batch(torch.arange(8))
    student = net(seed=1)
    with_two = DistillStep([Contrastive()], student=student, probe=batch, task="embedding")
    _, terms = with_two(student, batch)
    expected = nce_by_hand(student(x), student(other), 0.05)
    assert terms["contrastive.contrastive"].item() == pytest.approx(expected, rel=1e-6)


def test_where_there_is_one_side_the_views_differ_by_dropout():
    batch = TensorSplit(rows(8)[0]).batch(torch.arange(8))
    student = net(seed=1, dropout=0.3)
    step = DistillStep([Contrastive()], student=student, probe=batch, task="embedding")
    _, terms = step(student, batch)
    same = nce_by_hand(student.eval()(batch.inputs), student(batch.inputs), 0.05)
    assert terms["contrastive.contrastive"].item() != pytest.approx(same, rel=1e-3)


def test_one_row_has_no_negatives():
    one = torch.randn(1, 4, requires_grad=True)
    loss = info_nce(one, torch.randn(1, 4), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert not one.grad.any()


def test_the_vector_of_a_transformers_model_is_the_mean_of_its_real_tokens():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    inputs = {"input_ids": torch.randint(1, 20, (2, 4)), "attention_mask": mask}
    states = model(**inputs).last_hidden_state
    expected = torch.stack([states[0, :3].mean(0), states[1, 0]])
    torch.testing.assert_close(vectors(model, inputs), expected)
