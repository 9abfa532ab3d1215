import pytest
import torch
from stillhouse_wttm import WTTM, WTTMConfig

from stillhouse.api import Batch, StepInfo, StudentOut, Targets
from stillhouse.testing import parametrize_with_checks


@parametrize_with_checks(WTTM)
def test_conformance(check):
    check()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_the_loss_is_the_papers(weighted, temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(6, 5, generator=generator) for _ in range(2))
    p, q = teacher.softmax(-1), student.softmax(-1)
    powers = p ** (1 / temperature)
    matched = powers / powers.sum(-1, keepdim=True)
    rows = (matched * (matched / q).log()).sum(-1)
    expected = (rows * powers.sum(-1) if weighted else rows).mean()
    method = WTTM(WTTMConfig(temperature=temperature, weighted=weighted))
    terms = method.loss_terms(
        StudentOut(student), Targets(None, teacher), Batch(torch.zeros(6, 1)), StepInfo(rows=6.0)
    )
    torch.testing.assert_close(terms["ttm"].value, expected)
