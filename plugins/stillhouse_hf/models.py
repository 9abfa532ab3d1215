"""Models of transformers: from a checkpoint, or of its shape with new weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.api import ConfigError, MissingExtra
from stillhouse_hf import files, tokens

HEADS = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
    "sentence-embeddings": "AutoModel",
    "image-folder": "AutoModelForImageClassification",
}
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")
_COUNT_FROM_PAD = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "data2vec-text",
)
"""Kinds whose positions begin after the pad token's number: so many of them are never used."""
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


class Models:
    """Builds models for one task: their heads fit, their tokenizer is the task's, their positions are enough.

    task
        The task's name.
    tokenizer, length
        The task's, and its longest row in tokens; None where there is no text.
    classes
        Names or numbers of the classes, in order; None where the task has none.
    """

    def __init__(
        self,
        task: str,
        tokenizer: Any = None,
        length: int | None = None,
        classes: Sequence[Any] | None = None,
    ) -> None:
        self._task, self._tokenizer, self._length, self._classes = task, tokenizer, length, classes

    def teacher(self, path: str, layers: int | None = None) -> nn.Module:
        """The model of a checkpoint's folder (or of the hub), whose head was trained.

        Raises ConfigError as ``pretrained`` does, for a checkpoint without a head, and for classes in another order.
        """
        model, new = self._loaded(path, layers)
        if (
            HEADS[self._task] == "AutoModel"
        ):  # embeddings are made of the hidden states, which a pooler comes after
            new = {name for name in new if not name.startswith("pooler.")}
        if new:
            raise ConfigError(
                f"{path} as a teacher: its weights lack {', '.join(sorted(new)[:3])}, so that its answers would be noise; "
                f"expected a model trained as {HEADS[self._task]}, saved with its head"
            )
        return model

    def pretrained(self, path: str, layers: int | None = None) -> nn.Module:
        """The model of a checkpoint's folder (or of the hub), of which ``layers`` stay, evenly spread.

        A head that the checkpoint lacks gets new weights.

        Raises ConfigError for a folder without a model, a tokenizer other than the task's, too few positions, a head
        of another width, and for a causal model that sees the tokens that it predicts.
        """
        return self._loaded(path, layers)[0]

    def fresh(self, path: str, layers: int | None = None, width: int | None = None) -> nn.Module:
        """A model of a checkpoint's shape with new weights, with ``layers`` and ``width`` of its own.

        Raises ConfigError as ``pretrained`` does, and for a width that its heads do not divide.
        """
        config = self._config(path)
        if layers is not None:
            if layers < 1:
                raise ConfigError(f"layers is {layers}; expected 1 at least")
            setattr(config, _named(config, _LAYERS), layers)
            for name in ("layer_types",):
                if isinstance(getattr(config, name, None), list):
                    setattr(config, name, getattr(config, name)[:layers])
        if width is not None:
            heads = config.num_attention_heads
            if width % heads:
                raise ConfigError(
                    f"width is {width}, and {path} has {heads} attention heads; expected a multiple of them"
                )
            config.hidden_size = width
        if self._classes is not None:
            config.num_labels = len(self._classes)
        for name, value in self._names().items():
            setattr(config, name, value)
        return self._ready(self._auto().from_config(config), path)

    def _loaded(self, path: str, layers: int | None) -> tuple[nn.Module, set[str]]:
        """The model, and which of its weights the checkpoint lacks."""
        config = self._config(path)
        options = {} if self._classes is None else {"num_labels": len(self._classes)}
        try:
            with _no_bars():
                model, info = self._auto().from_pretrained(
                    _place(path),
                    use_safetensors=True,
                    local_files_only=Path(path).expanduser().exists(),
                    ignore_mismatched_sizes=True,  # refused below, with the sizes
                    output_loading_info=True,
                    **options,
                )
        except Exception as error:  # noqa: BLE001 - whatever the library makes of a bad file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{path} gives no {HEADS[self._task]} ({reason}); expected a folder of save_pretrained"
            ) from None
        new = set(info["missing_keys"])
        self._refuse_other_head(path, config, info["mismatched_keys"], with_head=not new)
        for name, value in self._names().items():
            setattr(model.config, name, value)
        if layers is not None:
            _keep(model, layers, config)
        return self._ready(model, path), new

    def _refuse_other_head(self, path: str, config: Any, unfit: Any, *, with_head: bool) -> None:
        if unfit:
            name, there, here = min(unfit)
            classes = f"; the rows have {len(self._classes)} classes" if self._classes is not None else ""
            raise ConfigError(
                f"{path}: {name} is {tuple(there)} in the checkpoint, and the model has {tuple(here)}{classes}: expected a "
                "head for the same classes: say them by task: {classes: [...]}, or use a checkpoint without a head"
            )
        names = _class_names(config)
        own = self._names().get("id2label")
        if with_head and names and own and names != list(own.values()):
            raise ConfigError(
                f"{path} has the classes {', '.join(names[:8])}, in this order, and the task has "
                f"{', '.join(list(own.values())[:8])}; expected the same, for outputs are compared one by one: say the order "
                f"by task: {{classes: [{', '.join(names[:8])}]}}"
            )

    def _names(self) -> dict[str, Any]:
        """The classes' names for a model's config, where they have names."""
        if self._classes is None or not any(isinstance(name, str) for name in self._classes):
            return {}
        names = dict(enumerate(map(str, self._classes)))
        return {"id2label": names, "label2id": {name: number for number, name in names.items()}}

    def _ready(self, model: Any, path: str) -> nn.Module:
        if self._tokenizer is not None and model.config.pad_token_id is None:
            model.config.pad_token_id = (
                self._tokenizer.pad_token_id
            )  # a classifier looks for the last real token
        if self._task == "causal-lm":
            _refuse_foresight(model, path)
        return model  # type: ignore[no-any-return]

    def _config(self, path: str) -> Any:
        try:
            from transformers import AutoConfig
        except ImportError:
            raise MissingExtra("models of transformers", "transformers", "hf") from None
        if not path:
            raise ConfigError(
                "path is not set; expected the folder of a checkpoint, as save_pretrained writes it"
            )
        here = Path(path).expanduser().exists()
        if not here and not files.is_hub_name(path):
            raise ConfigError(
                f"{path}: no such folder; expected one of save_pretrained, or a model of the hub (org/name)"
            )
        try:
            config = AutoConfig.from_pretrained(_place(path), local_files_only=here)
        except Exception as error:  # noqa: BLE001 - whatever the library makes of a bad file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{path} holds no model of transformers ({reason}); expected a folder of save_pretrained"
            ) from None
        if self._tokenizer is not None and tokens.there(path):
            tokens.compare(self._tokenizer, tokens.load(path), path)
        positions = _positions(config)
        if self._length is not None and positions is not None and positions < self._length:
            raise ConfigError(
                f"{path} reads {positions} tokens at most, and task.length is {self._length}; expected no more: lower it"
            )
        return config

    def _auto(self) -> Any:
        import transformers

        return getattr(transformers, HEADS[self._task])


def _positions(config: Any) -> int | None:
    """Tokens that a model reads at most, where that is limited."""
    found: int | None = next((getattr(config, name) for name in _POSITIONS if hasattr(config, name)), None)
    if found is not None and config.model_type in _COUNT_FROM_PAD:
        found -= config.pad_token_id + 1
    return found


def _class_names(config: Any) -> list[str]:
    """The names of a checkpoint's classes, in order; none where it has just numbers."""
    names = [str(name) for _, name in sorted((config.id2label or {}).items())]
    return [] if names == [f"LABEL_{number}" for number in range(len(names))] else names


def _refuse_foresight(model: nn.Module, path: str) -> None:
    """A position's outputs may not depend on the tokens after it: they are what it is trained to predict."""
    first = torch.tensor([[1, 2, 3, 1], [1, 2, 3, 2]], device=next(model.parameters()).device)
    mode = model.training
    with torch.no_grad():
        found = model.eval()(input_ids=first).logits[:, :3].float()
    model.train(mode)
    if not torch.allclose(found[0], found[1], atol=1e-3, rtol=1e-3):
        raise ConfigError(
            f"{path} ({type(model).__name__}) sees the tokens that it is to predict; expected a causal model, as GPT-2 is: a "
            "model of the BERT family is none unless its config says is_decoder"
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bar for each file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _place(path: str) -> str:
    here = Path(path).expanduser()
    return str(here) if here.exists() else path


def _named(config: Any, names: tuple[str, ...]) -> str:
    return next(name for name in names if hasattr(config, name))


def _keep(model: nn.Module, count: int, config: Any) -> None:
    """Keep ``count`` layers of the model's stack, evenly spread, the last among them."""
    stacks = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    name, stack = max(stacks, key=lambda found: len(found[1]), default=("", nn.ModuleList()))
    if not 1 <= count <= len(stack):
        raise ConfigError(f"layers is {count}, and the model has {len(stack)}; expected 1 to {len(stack)}")
    kept = [stack[(number * len(stack)) // count - 1] for number in range(1, count + 1)]
    for number, layer in enumerate(kept):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                setattr(part, "layer_idx", number)  # noqa: B010 - a plain attribute of modules that have one
    parent = model.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], nn.ModuleList(kept))
    setattr(config, _named(config, _LAYERS), count)
    own: Any = model.config
    setattr(own, _named(own, _LAYERS), count)
    if isinstance(getattr(own, "layer_types", None), list):
        own.layer_types = own.layer_types[:count]
