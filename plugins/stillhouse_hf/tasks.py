"""Tasks over a user's own text files, with models from local checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from stillhouse.api import (
    IGNORE,
    KINDS,
    Builder,
    ConfigError,
    DataError,
    DatasetSplit,
    Splits,
    Task,
    TaskConfig,
)
from stillhouse_hf import files, tokens
from stillhouse_hf.models import Models

MOST_CLASSES = 100_000


class TextConfig(TaskConfig):
    """Files and how they are read."""

    train: str = Field(
        "", description="A file (json, jsonl, csv, parquet, txt), a folder of such, or org/name of the hub."
    )
    validation: str = Field(
        "", description="The same; without it a tenth of the training rows is kept apart."
    )
    test: str = Field("", description="The same; without it there is no test split.")
    tokenizer: str = Field("", description="A folder with the models' tokenizer.")
    length: int = Field(128, gt=1, description="Tokens of a row, at most; longer ones are cut.")
    text_column: str = Field("text", description="The column with the text.")
    seed: int = Field(0, ge=0, description="Of the division into training and validation rows.")


class ClassConfig(TextConfig):
    """The same, with classes."""

    label_column: str = Field(
        "label", description="The column with the classes: names, or numbers from 0 on."
    )
    classes: list[str] | list[int] | None = Field(
        None,
        description="The classes in the order of the models' outputs; without it those of the training rows, sorted.",
    )


class _TextTask(Task):
    """What they share: rows of tokens from files, and models with the tokenizer compared."""

    api_version = 1
    Config: ClassVar[type[TaskConfig]] = TextConfig
    config: TextConfig
    name: ClassVar[str]
    documents: ClassVar[bool] = False  # whether a text file is one text, or each of its lines

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._splits: Splits | None = None
        self.classes: list[Any] | None = None

        def teacher(path: str = "", layers: int | None = None) -> nn.Module:
            return self._models().teacher(path, layers)

        def pretrained(path: str = "", layers: int | None = None) -> nn.Module:
            return self._models().pretrained(path, layers)

        def fresh(path: str = "", layers: int | None = None, width: int | None = None) -> nn.Module:
            return self._models().fresh(path, layers, width)

        teacher.trained = True  # type: ignore[attr-defined]
        self.teachers: Mapping[str, Builder] = {"pretrained": teacher}  # type: ignore[misc]
        self.students: Mapping[str, Builder] = {"pretrained": pretrained, "fresh": fresh}  # type: ignore[misc]

    def tokenizer(self) -> Any:
        """The tokenizer that the config names."""
        return tokens.load(self.config.tokenizer)

    def _models(self) -> Models:
        self.splits()
        return Models(self.name, self.tokenizer(), self.config.length, self.classes)

    def splits(self) -> Splits:
        if self._splits is None:
            self._splits = self._read()
        return self._splits

    def _read(self) -> Splits:
        config = self.config
        if not config.train:
            raise ConfigError("task.train is not set; expected a file or a folder with the training rows")
        tables = {"train": self._rows(config.train)}
        for name in ("validation", "test"):
            if path := getattr(config, name):
                tables[name] = self._rows(path)
        self._look(tables)
        tokenizer = self.tokenizer()
        made = {name: self._tokenised(table, tokenizer) for name, table in tables.items()}
        if "validation" not in made:
            made["train"], made["validation"] = self._divided(made["train"])
        collate = tokens.Padded(tokenizer)
        kind = KINDS[self.kind]
        return Splits(
            **{
                name: DatasetSplit(
                    rows, labelled=kind.labels != "none", fixed=True, collate=collate, kind=kind
                )
                for name, rows in made.items()
            }
        )

    def _divided(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if len(rows) < 2:
            raise DataError(
                f"task.train has {len(rows)} rows and no validation is named; expected two at least, or a validation file"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.config.seed)).tolist()
        count = max(1, len(rows) // 10)
        return [rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])]

    def _rows(self, path: str) -> list[dict[str, Any]]:
        return files.rows(path, self._columns(), documents=self.documents)

    def _columns(self) -> dict[str, str]:
        """Our names of columns to the file's."""
        return {"text": self.config.text_column}

    def _look(self, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Find the classes, before rows are tokenised."""

    def _tokenised(self, table: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
        _refuse_other_than(str, table, "a text", "text")
        found = tokenizer([row["text"] for row in table], truncation=True, max_length=self.config.length)
        for number, ids in enumerate(found["input_ids"]):
            if not ids:
                raise DataError(
                    f"row {number} has no token ({table[number]['text']!r:.40}); expected a text in each row: drop it"
                )
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in found]
        return [{name: found[name][number] for name in names} for number in range(len(table))]


class TextClassification(_TextTask):
    """A class for each text."""

    Config: ClassVar[type[TaskConfig]] = ClassConfig
    config: ClassConfig
    name = "text-classification"
    kind = "classification"

    def _columns(self) -> dict[str, str]:
        return {**super()._columns(), "label": self.config.label_column}

    def _look(self, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.classes = self.config.classes or _classes(row["label"] for row in tables["train"])

    def _tokenised(self, table: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
        number = _numbers(self.classes)
        rows = super()._tokenised(table, tokenizer)
        return [{**row, "labels": number(given["label"])} for row, given in zip(rows, table, strict=True)]


class TokenClassification(_TextTask):
    """A class for each word; the first token of a word has it."""

    Config: ClassVar[type[TaskConfig]] = ClassConfig
    config: ClassConfig
    name = "token-classification"
    kind = "token_classification"

    def _columns(self) -> dict[str, str]:
        return {**super()._columns(), "label": self.config.label_column}

    def _look(self, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        for name, table in tables.items():
            for number, row in enumerate(table):
                words, labels = row["text"], row["label"]
                if not isinstance(words, list) or not isinstance(labels, list) or len(words) != len(labels):
                    raise DataError(
                        f"the {name} rows: row {number} has {_count(words)} and {_count(labels)}; expected a list of words "
                        "in the text column and a label for each in the label column"
                    )
        self.classes = self.config.classes or _classes(
            label for row in tables["train"] for label in row["label"]
        )

    def _tokenised(self, table: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
        if not tokenizer.is_fast:
            raise ConfigError(
                "token-classification needs a tokenizer that knows its words; expected one with tokenizer.json"
            )
        number = _numbers(self.classes)
        words = [row["text"] for row in table]
        found = tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.config.length)
        rows = []
        for place, row in enumerate(table):
            owners = found.word_ids(place)
            labels = [
                number(row["label"][owner]) if owner is not None and owner != before else IGNORE
                for before, owner in zip([None, *owners], owners, strict=False)
            ]
            mine = {"input_ids": found["input_ids"][place], "attention_mask": found["attention_mask"][place]}
            rows.append({**mine, "labels": labels})
        return rows


class CausalLM(_TextTask):
    """The next token of running text: the texts one after the other, cut into rows of ``length`` tokens.

    A text is a row of a table, or a whole text file; the tokenizer's end token stands between two.
    """

    name = "causal-lm"
    kind = "causal_lm"
    documents = True

    def _tokenised(self, table: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
        _refuse_other_than(str, table, "a text", "text")
        texts = [row["text"] for row in table if row["text"].strip()]
        if not texts:
            raise DataError("the texts are all blank; expected some text")
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # a text may be long
        stream = [token for ids in found for token in (*ids, *end)]
        length = self.config.length
        rows = [stream[start : start + length] for start in range(0, len(stream), length)]
        if len(rows[-1]) < 2:
            rows.pop()
        if not rows:
            raise DataError("the texts hold no two tokens; expected more text")
        return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in rows]


class SentenceEmbeddings(_TextTask):
    """A vector for each text, the teacher's the target: no labels."""

    name = "sentence-embeddings"
    kind = "embedding"
    metric = ""

    def _read(self) -> Splits:
        if self.config.validation or self.config.test:
            raise ConfigError(
                "sentence-embeddings has no labels that validation or test rows could be scored by; leave them out"
            )
        return Splits(super()._read().train)

    def _divided(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return rows, []


def _classes(labels: Iterable[Any]) -> list[Any]:
    found = list(labels)
    if odd := [label for label in found if not isinstance(label, str | int)]:
        raise DataError(
            f"labels hold {odd[0]!r:.40} ({type(odd[0]).__name__}); expected names, or class numbers from 0 on"
        )
    every = sorted(set(found), key=lambda label: (isinstance(label, str), label))
    if all(isinstance(label, int) and not isinstance(label, bool) for label in every):
        if every[0] < 0:
            raise DataError(f"labels hold {every[0]}; expected class numbers from 0 on, or names")
        if every[-1] >= MOST_CLASSES:
            raise DataError(
                f"labels go up to {every[-1]}; expected class numbers from 0 to {MOST_CLASSES - 1}, without great gaps"
            )
        return list(range(every[-1] + 1))
    return every


def _numbers(classes: list[Any] | None) -> Callable[[Any], int]:
    known = {label: number for number, label in enumerate(classes or [])}

    def number(label: Any) -> int:
        if label not in known:
            names = ", ".join(map(str, list(known)[:8]))
            raise DataError(
                f"the label {label!r} is none of the classes ({names}), which are those of the training rows, or of "
                "task: {classes: [...]}; expected one of them"
            )
        return known[label]

    return number


def _refuse_other_than(kind: type, table: Sequence[Mapping[str, Any]], what: str, column: str) -> None:
    for number, row in enumerate(table):
        if not isinstance(row[column], kind):
            raise DataError(
                f"row {number} has {type(row[column]).__name__} ({row[column]!r:.40}) as its {column}; expected {what}"
            )


def _count(value: Any) -> str:
    return f"{len(value)} items" if isinstance(value, list) else f"{type(value).__name__}"
