"""What the examples share: a GPT-2 teacher and student of random weights, and some rows of tokens."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY = 256


def gpt2(layers, width, seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 64, "n_layer": layers, "n_embd": width, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def rows(count=64, length=32):
    ids = torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


student, teacher = gpt2(2, 32, seed=1), gpt2(4, 64, seed=2)
