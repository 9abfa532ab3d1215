"""Models of transformers: from a checkpoint, or of its shape with new weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from stillhouse.api import ConfigError, MissingExtra
from stillhouse_hf import tokens

HEADS = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
    "sentence-embeddings": "AutoModel",
}
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


class Models:
    """Builds models for one task: their heads fit, their tokenizer is the task's, their positions are enough.

    task
        The task's name.
    tokenizer
        The task's.
    length
        The longest row, in tokens.
    classes
        Outputs of a new head; None where the task has no classes.
    """

    def __init__(self, task: str, tokenizer: Any, length: int, classes: int | None) -> None:
        self._head, self._tokenizer, self._length, self._classes = HEADS[task], tokenizer, length, classes

    def pretrained(self, path: str, layers: int | None = None) -> nn.Module:
        """The model of a checkpoint's folder (or of the hub), of which ``layers`` stay, evenly spread.

        Raises ConfigError for a folder without a model, a tokenizer other than the task's, or too few positions.
        """
        config = self._config(path)
        options = {} if self._classes is None else {"num_labels": self._classes}
        try:
            model = self._auto().from_pretrained(
                _place(path),
                use_safetensors=True,
                local_files_only=Path(path).expanduser().exists(),
                **options,
            )
        except Exception as error:  # noqa: BLE001 - whatever the library makes of a bad file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{path} gives no {self._head} ({reason}); expected a folder of save_pretrained"
            ) from None
        if layers is not None:
            _keep(model, layers, config)
        return model  # type: ignore[no-any-return]

    def fresh(self, path: str, layers: int | None = None, width: int | None = None) -> nn.Module:
        """A model of a checkpoint's shape with new weights, with ``layers`` and ``width`` of its own.

        Raises ConfigError as ``pretrained`` does, and for a width that its heads do not divide.
        """
        config = self._config(path)
        if layers is not None:
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
            config.num_labels = self._classes
        return self._auto().from_config(config)  # type: ignore[no-any-return]

    def _config(self, path: str) -> Any:
        try:
            from transformers import AutoConfig
        except ImportError:
            raise MissingExtra("models of transformers", "transformers", "hf") from None
        if not path:
            raise ConfigError(
                "path is not set; expected the folder of a checkpoint, as save_pretrained writes it"
            )
        try:
            config = AutoConfig.from_pretrained(
                _place(path), local_files_only=Path(path).expanduser().exists()
            )
        except Exception as error:  # noqa: BLE001 - whatever the library makes of a bad file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{path} holds no model of transformers ({reason}); expected a folder of save_pretrained"
            ) from None
        if tokens.there(path):
            tokens.compare(self._tokenizer, tokens.load(path), path)
        positions = next((getattr(config, name) for name in _POSITIONS if hasattr(config, name)), None)
        if positions is not None and positions < self._length:
            raise ConfigError(
                f"{path} reads {positions} tokens at most, and task.length is {self._length}; expected no more: lower it"
            )
        return config

    def _auto(self) -> Any:
        import transformers

        return getattr(transformers, self._head)


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
