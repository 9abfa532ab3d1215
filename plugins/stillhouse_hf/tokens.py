"""Tokenizers: loaded from a folder, and compared before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.api import IGNORE, ConfigError, MissingExtra

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")


def load(path: str) -> Any:
    """The tokenizer of a folder or of the hub, with something to pad with.

    Raises ConfigError where there is none.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra("tasks over text", "transformers", "hf") from None
    here = Path(path).expanduser()
    if not path:
        raise ConfigError(
            "task.tokenizer is not set; expected a folder with a tokenizer: the student's, as a rule"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(here) if here.exists() else path, local_files_only=here.exists()
        )
    except Exception as error:  # noqa: BLE001 - whatever the library makes of a bad file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"task.tokenizer: {path} gives no tokenizer ({reason}); expected a folder with one"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def there(path: str) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((Path(path).expanduser() / name).is_file() for name in FILES)


def compare(own: Any, other: Any, who: str) -> None:
    """Raise ConfigError where two tokenizers number tokens differently, or make other tokens of a text.

    It names the first token, or the first part of the pipeline. A longer vocabulary is no difference: the shared
    beginning is compared. A tokenizer without a backend of the ``tokenizers`` library is compared by its numbers alone.
    """
    first, second = _by_number(own), _by_number(other)
    for number in range(min(len(first), len(second))):
        a, b = first.get(number), second.get(number)
        if a != b:
            raise ConfigError(
                f"the {who}'s tokenizer is another than the task's: token {number} is {b!r} there and {a!r} here; expected "
                "the same numbers, for both models read the same tokens: use models of one tokenizer"
            )
    shared = min(len(first), len(second))
    here, yonder = _pipeline(own, shared), _pipeline(other, shared)
    for part in {**here, **yonder} if here and yonder else ():
        a, b = here.get(part), yonder.get(part)
        if a != b:
            raise ConfigError(
                f"the {who}'s tokenizer makes other tokens of a text than the task's: {part} is {_brief(b, a)} there and "
                f"{_brief(a, b)} here; expected the same, for both models read the same tokens: use models of one tokenizer"
            )


def _pipeline(tokenizer: Any, shared: int) -> dict[str, Any]:
    """What decides which tokens a text becomes, part by part; empty where the tokenizer doesn't say."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    said = json.loads(backend.to_str())
    model = dict(said["model"])
    vocabulary = model.pop("vocab", None)
    if isinstance(vocabulary, list):  # with a score each, by which a text is divided
        model["scores"] = vocabulary[:shared]
    added = [
        {name: value for name, value in token.items() if name != "special"}
        for token in said["added_tokens"]
        if token["id"] < shared
    ]
    parts = {name: said[name] for name in ("normalizer", "pre_tokenizer", "post_processor")}
    return {**parts, "added_tokens": added, **{f"model.{name}": value for name, value in model.items()}}


def _brief(part: Any, other: Any) -> str:
    """A part as a message shows it: of two lists, how long this one is and its first item that the other lacks."""
    if isinstance(part, list) and isinstance(other, list):
        place = next((i for i, (a, b) in enumerate(zip(part, other, strict=False)) if a != b), len(other))
        first = f", number {place} {part[place]!r}" if place < len(part) else ""
        return f"a list of {len(part)}{first}"
    text = repr(part)
    return text if len(text) <= 120 else text[:117] + "..."


def _by_number(tokenizer: Any) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


class Padded:
    """Joins rows of token lists, padded to the longest of them."""

    def __init__(self, tokenizer: Any) -> None:
        self._fill = {"input_ids": tokenizer.pad_token_id, "labels": IGNORE}

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch as transformers' models take it; labels of one number a row stay as they are."""
        return {name: self._joined(name, [item[name] for item in items]) for name in items[0]}

    def _joined(self, name: str, values: list[Any]) -> Tensor:
        if not isinstance(values[0], list):
            return torch.tensor(values)
        width = max(map(len, values))
        fill = self._fill.get(name, 0)
        return torch.tensor([value + [fill] * (width - len(value)) for value in values])
