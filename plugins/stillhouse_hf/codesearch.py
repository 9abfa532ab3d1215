"""From a docstring to its function: the teacher reads the docstring, the student reads the code."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import Metrics, Splits, Task, TaskConfig, TensorSplit, WholeSplit, made_once
from stillhouse_hf import packaged, scores, stdlib, tokens

WIDTH, VOCABULARY, LONGEST = 384, 30_522, 512
CODE, DOCSTRING = 0, 1
"""Sides of a held-out pair: a row's label is ``2 * pair + side``."""


class CodeSearchConfig(TaskConfig):
    """Which functions, how much of each, and who reads the queries."""

    length: int = Field(
        96, gt=2, le=LONGEST, description="Tokens of a function, at most; a docstring's are a third."
    )
    train: int | None = Field(None, gt=0, description="Training functions, at most, evenly spread.")
    validation: int = Field(200, gt=1, description="Validation functions, at most, of modules of their own.")
    test: int = Field(500, gt=1, description="Test functions, at most, of modules of their own.")
    queries: Literal["teacher", "student"] = Field(
        "teacher",
        description="Whose vectors of docstrings look for code: student for one that was trained on both.",
    )
    modules: tuple[str, ...] | None = Field(
        None, description="Top-level modules that are read; default: all."
    )


class Vectors(nn.Module):
    """A BERT's mean over the real tokens, mapped to ``width`` numbers where that is given: ``(B, width)``."""

    def __init__(self, bert: nn.Module, hidden: int, width: int | None = None) -> None:
        super().__init__()
        self.bert = bert
        self.map = nn.Identity() if width is None else nn.Linear(hidden, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens and mask ``(B, L)``."""
        states = packaged.pooled(self.bert, {"input_ids": input_ids, "attention_mask": attention_mask})
        made: Tensor = self.map(states)
        return made


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2, as it comes."""
    from transformers import AutoModel

    return Vectors(AutoModel.from_pretrained(packaged.minilm(), add_pooling_layer=False), WIDTH)


minilm.trained = True  # type: ignore[attr-defined]


def small(layers: int = 2, width: int = 128) -> nn.Module:
    """A small BERT with new weights, mapped to the teacher's width."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 32),
        intermediate_size=4 * width, max_position_embeddings=LONGEST,
    )  # fmt: skip
    return Vectors(BertModel(config, add_pooling_layer=False), width, WIDTH)


class CodeSearch(Task):
    """A vector for each function of the standard library, near to that of its docstring's first paragraph.

    A training row's ``inputs`` are the function's tokens without the docstring, its ``teacher_inputs`` the docstring's.
    Validation and test rows are both sides of held-out pairs, so that a student that reads both can be scored too; each
    query looks for its own function among all of the split's.
    """

    api_version = 1
    Config = CodeSearchConfig
    config: CodeSearchConfig
    kind = "embedding"
    metric = "mrr"
    teachers = {"minilm": minilm}
    students = {"small": small}

    def __init__(self, config: CodeSearchConfig | None = None) -> None:
        super().__init__(config)
        self._data: dict[str, Tensor] | None = None
        self._given: Tensor | None = None

    def splits(self) -> Splits:
        sizes = self._tokens()["sizes"].tolist()
        codes, docstrings = (self._side(side, sizes) for side in ("code", "docstring"))
        held_out = []
        for number in (1, 2):
            both = {
                name: torch.cat([codes[number][name], docstrings[number][name]]) for name in codes[number]
            }
            pairs = torch.arange(sizes[number]) + (0 if number == 1 else sizes[1])
            held_out.append(TensorSplit(both, torch.cat([2 * pairs + CODE, 2 * pairs + DOCSTRING])))
        return Splits(TensorSplit(codes[0], teacher_inputs=docstrings[0]), *held_out)

    def _side(self, side: str, sizes: list[int]) -> list[dict[str, Tensor]]:
        ids, mask = (
            torch.split(self._tokens()[f"{side}.{name}"], sizes) for name in ("input_ids", "attention_mask")
        )
        return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]

    def metrics(self) -> Metrics:
        return {"": WholeSplit(self._scores, higher_is_better=True)}

    def _scores(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        found = dict(zip(labels.tolist(), outputs, strict=True))
        pairs = [label // 2 for label in found if label % 2 == CODE and label + DOCSTRING in found]
        if not pairs:  # a few rows to try it on
            return {"mrr": 0.0, "recall@1": 0.0, "recall@10": 0.0}
        codes = torch.stack([found[2 * pair + CODE] for pair in pairs])
        if self.config.queries == "teacher":
            return scores.retrieval(self._reference()[pairs], codes)
        return scores.retrieval(torch.stack([found[2 * pair + DOCSTRING] for pair in pairs]), codes)

    def _made_from(self) -> dict[str, object]:
        own = {"task": "stdlib-code-search", **self.config.model_dump(mode="json", exclude={"queries"})}
        return {**own, **stdlib.origin(self.config.modules), "model": packaged.named(packaged.MINILM)}

    def _tokens(self) -> dict[str, Tensor]:
        """``code.`` and ``docstring.`` tokens of the three parts one after the other, and their ``sizes``."""
        if self._data is None:
            self._data = made_once("data", self._made_from(), self._tokenised)
        return self._data

    def _tokenised(self) -> dict[str, Tensor]:
        config, tokenizer = self.config, tokens.load(packaged.minilm())
        pairs = [one for one in stdlib.documented(config.modules) if one.code]
        codes = tokenizer([one.code for one in pairs], truncation=True, max_length=config.length)["input_ids"]
        most = {part: getattr(config, part) for part in stdlib.PARTS}
        chosen, sizes = stdlib.divided(codes, [one.module for one in pairs], most)
        short = max(3, config.length // 3)
        texts = tokenizer([pairs[n].summary for n in chosen], truncation=True, max_length=short)["input_ids"]
        sides = {"code": [codes[number] for number in chosen], "docstring": texts}
        made = {
            f"{side}.{name}": tensor
            for side, rows in sides.items()
            for name, tensor in packaged.padded(rows, config.length, tokenizer.pad_token_id).items()
        }
        return {**made, "sizes": torch.tensor(sizes)}

    def _reference(self) -> Tensor:
        """The teacher's vectors of the held-out docstrings, ``(N, 384)``."""
        if self._given is None:
            data = self._tokens()
            first = int(data["sizes"][0])
            held_out = {name: data[f"docstring.{name}"][first:] for name in ("input_ids", "attention_mask")}
            model: nn.Module = minilm().bert  # type: ignore[assignment]
            made = made_once(
                "data",
                {**self._made_from(), "what": "vectors"},
                lambda: {"vectors": packaged.embedded(model, held_out)},
            )
            self._given = made["vectors"]
        return self._given
