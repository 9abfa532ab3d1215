"""Rows that are tokens: which are real, which one each predicts, and where texts share a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stillhouse.contract.batch import tensors_in
from stillhouse.errors import DataError


def attention_of(inputs: Any, *, decoder: bool) -> Tensor | None:
    """The attention mask ``(B, L)`` as bool, where there is one of that form."""
    found = (
        inputs.get("decoder_attention_mask" if decoder else "attention_mask")
        if isinstance(inputs, Mapping)
        else None
    )
    return found.bool() if isinstance(found, Tensor) and found.dim() == 2 else None


def check_attention(inputs: Any) -> None:
    """Raise DataError where an attention mask has not an entry for each token."""
    if not isinstance(inputs, Mapping) or inputs.get("past_key_values") is not None:
        return  # beside kept keys the mask covers them too
    for before in ("", "decoder_"):
        mask = inputs.get(f"{before}attention_mask")
        for name in (f"{before}input_ids", f"{before}inputs_embeds"):
            tokens = inputs.get(name)
            if (
                isinstance(mask, Tensor)
                and isinstance(tokens, Tensor)
                and mask.dim() == 2
                and mask.shape != tokens.shape[:2]
            ):
                raise DataError(
                    f"{before}attention_mask is {tuple(mask.shape)}, and {name} is {tuple(tokens.shape)}; expected an entry "
                    "for each token: pad, cut and shift both alike"
                )


def without_packing_mask(inputs: Any) -> Any:
    """Packed rows without their attention mask: where one is given, transformers looks across the texts of a row.

    Raises DataError where that mask says more than that every token is real.
    """
    attention = attention_of(inputs, decoder=False)
    places = inputs.get("position_ids") if isinstance(inputs, Mapping) else None
    if attention is None or not isinstance(places, Tensor) or places.shape != attention.shape:
        return inputs
    anew = (places[:, 1:] == 0) & attention[:, 1:] & attention[:, :-1]
    if not anew.any():
        return inputs
    if not attention.all():
        raise DataError(
            "got packed rows (position_ids that begin anew) with an attention mask that leaves tokens out, under which "
            "transformers looks across the texts of a row; expected packed rows without padding and without the mask"
        )
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def shifted(values: Tensor, last: Any) -> Tensor:
    """Position i gets what stands at i + 1; the last one gets ``last``."""
    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], last)], 1)


def next_token(inputs: Any, attention: Tensor | None) -> Tensor:
    """Rows of a causal model: position i predicts token i + 1, and counts if both are real.

    A pad before the text predicts nothing, and no text predicts a pad, so left and right padding give the same rows. In a
    packed row (``position_ids`` that begin anew) the end of one text does not predict the next one's beginning.
    """
    real = torch.ones_like(_tokens(inputs), dtype=torch.bool) if attention is None else attention
    mask = real & shifted(real, False)
    places = inputs.get("position_ids") if isinstance(inputs, Mapping) else None
    if isinstance(places, Tensor) and places.shape == mask.shape:
        mask = mask & (shifted(places, 0) != 0)
    return mask


def _tokens(inputs: Any) -> Tensor:
    """A tensor ``(B, L)``: which one does not matter."""
    if isinstance(inputs, Mapping):
        inputs = next((inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs), inputs)
    found = [tensor for _, tensor in tensors_in(inputs) if tensor.dim() >= 2]
    if not found:
        raise DataError(
            "causal_lm got no tensor (B, L) of tokens; expected input_ids, or labels beside the inputs"
        )
    return found[0] if found[0].dim() == 2 else found[0][..., 0]
