"""What a model's own error is explained by: devices, dtypes, tokens beyond its vocabulary or positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from stillhouse.contract.kinds import KINDS
from stillhouse.errors import ConfigError, DataError
from stillhouse.models.calling import call


@pytest.fixture(scope="module")
def gpt2():
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def tokens(gpt2, ids):
    return call(gpt2, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, KINDS["causal_lm"])


def test_more_tokens_than_positions(gpt2):
    assert tokens(gpt2, torch.zeros(1, 8, dtype=torch.long)).logits.shape == (1, 8, 20)
    with pytest.raises(DataError, match="have 9 tokens, and GPT2LMHeadModel has 8 positions"):
        tokens(gpt2, torch.zeros(1, 9, dtype=torch.long))


def test_a_token_beyond_the_vocabulary(gpt2):
    with pytest.raises(DataError, match="token 20, and GPT2LMHeadModel has a vocabulary of 20"):
        tokens(gpt2, torch.tensor([[3, 20]]))


def test_a_model_on_another_device():
    with pytest.raises(ConfigError, match="Linear is on meta, and its inputs are on cpu"):
        call(nn.Linear(2, 3, device="meta"), torch.ones(1, 2))


def test_a_model_of_another_dtype():
    with pytest.raises(ConfigError, match=r"weights of torch\.float64 and got inputs of torch\.float32"):
        call(nn.Linear(2, 3).double(), torch.ones(1, 2))


def test_any_other_error_of_a_model_is_its_own(gpt2):
    class Broken(nn.Linear):
        def forward(self, inputs):
            raise self.error

    for error in (IndexError("own"), RuntimeError("own"), KeyError("own")):
        model = Broken(2, 3)
        model.error = error
        with pytest.raises(type(error), match="own"):
            call(model, torch.ones(1, 2))
