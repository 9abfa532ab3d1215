"""Sentence embeddings of the standard library's docstrings: all-MiniLM-L6-v2 as teacher, no labels to train on."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import Metrics, Splits, Task, TaskConfig, TensorSplit, WholeSplit, made_once
from stillhouse_hf import packaged, scores, stdlib, tokens
from stillhouse_hf.models import Models

LONGEST = 512


class DocstringsConfig(TaskConfig):
    """Which docstrings, and how much of each."""

    length: int = Field(
        32, gt=2, le=LONGEST, description="Tokens of a docstring, at most; longer ones are cut."
    )
    train: int | None = Field(None, gt=0, description="Training docstrings, at most, evenly spread.")
    validation: int = Field(400, gt=1, description="Validation docstrings, at most, of modules of their own.")
    test: int = Field(1000, gt=1, description="Test docstrings, at most, of modules of their own.")
    modules: tuple[str, ...] | None = Field(
        None, description="Top-level modules that are read; default: all."
    )


def _models() -> Models:
    return Models("sentence-embeddings", tokens.load(packaged.minilm()), 2, None)


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2, as it comes."""
    return _models().pretrained(packaged.minilm())


minilm.trained = True  # type: ignore[attr-defined]


def layers(layers: int = 3) -> nn.Module:
    """A BERT that begins with some of the teacher's layers, evenly spread, and its token vectors."""
    return _models().pretrained(packaged.minilm(), layers)


def fresh(layers: int = 3, width: int | None = None) -> nn.Module:
    """A BERT of the teacher's kind with new weights."""
    return _models().fresh(packaged.minilm(), layers, width)


class Docstrings(Task):
    """A vector for each docstring of the standard library. Training rows have no labels.

    The labels of validation and test rows are their numbers among the held-out rows, by which the score finds the
    teacher's vectors and the modules. ``spearman``: of the student's cosines of all pairs to the teacher's.
    ``module``: how often the five nearest others name the module that a docstring comes from, over modules with ten
    held-out docstrings or more.
    """

    api_version = 1
    Config = DocstringsConfig
    config: DocstringsConfig
    kind = "embedding"
    metric = "spearman"
    teachers = {"minilm": minilm}
    students = {"layers": layers, "fresh": fresh}

    def __init__(self, config: DocstringsConfig | None = None) -> None:
        super().__init__(config)
        self._data: dict[str, Tensor] | None = None
        self._given: Tensor | None = None

    def splits(self) -> Splits:
        data, sizes = self._tokens(), self._tokens()["sizes"].tolist()
        ids, mask = (torch.split(data[name], sizes) for name in ("input_ids", "attention_mask"))
        inputs = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
        numbers = torch.split(torch.arange(sum(sizes[1:])), sizes[1:])
        return Splits(
            train=TensorSplit(inputs[0]),
            validation=TensorSplit(inputs[1], numbers[0]),
            test=TensorSplit(inputs[2], numbers[1]),
        )

    def metrics(self) -> Metrics:
        return {"": WholeSplit(self._scores)}

    def _scores(self, outputs: Tensor, numbers: Tensor) -> dict[str, float]:
        modules = self._tokens()["modules"][numbers]
        return {
            "spearman": scores.similarity_spearman(outputs, self._reference()[numbers]),
            "module": scores.neighbour_accuracy(outputs, modules),
        }

    def _made_from(self) -> dict[str, object]:
        own = {"task": "stdlib-docstrings", **self.config.model_dump(mode="json")}
        return {**own, **stdlib.origin(self.config.modules), "model": packaged.named(packaged.MINILM)}

    def _tokens(self) -> dict[str, Tensor]:
        """Tokens of the three parts one after the other, their ``sizes``, and ``modules`` of the held-out rows."""
        if self._data is None:
            self._data = made_once("data", self._made_from(), self._tokenised)
        return self._data

    def _tokenised(self) -> dict[str, Tensor]:
        config, tokenizer = self.config, tokens.load(packaged.minilm())
        texts = stdlib.documented(config.modules)
        found = tokenizer([one.text for one in texts], truncation=True, max_length=config.length)["input_ids"]
        most = {part: getattr(config, part) for part in stdlib.PARTS}
        chosen, sizes = stdlib.divided(found, [one.module for one in texts], most)
        names = {name: number for number, name in enumerate(sorted({one.module for one in texts}))}
        return {
            **packaged.padded([found[number] for number in chosen], config.length, tokenizer.pad_token_id),
            "modules": torch.tensor([names[texts[number].module] for number in chosen[sizes[0] :]]),
            "sizes": torch.tensor(sizes),
        }

    def _reference(self) -> Tensor:
        """The teacher's vectors of the held-out rows, ``(N, 384)``."""
        if self._given is None:
            data = self._tokens()
            first = int(data["sizes"][0])
            held_out = {name: data[name][first:] for name in ("input_ids", "attention_mask")}
            made = made_once(
                "data",
                {**self._made_from(), "what": "vectors"},
                lambda: {"vectors": packaged.embedded(minilm(), held_out)},
            )
            self._given = made["vectors"]
        return self._given
