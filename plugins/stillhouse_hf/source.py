"""Language models of the standard library's source, which is text and code that is on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.api import (
    KINDS,
    DataError,
    Metrics,
    MissingExtra,
    Splits,
    Task,
    TaskConfig,
    TensorSplit,
    made_once,
    metrics_named,
)
from stillhouse_hf import packaged, stdlib

END = "<|endoftext|>"
SMALLEST = 512


class SourceConfig(TaskConfig):
    """How the source files are cut."""

    length: int = Field(
        128, gt=1, description="Tokens of a row: files one after the other, cut at this length."
    )
    train: int | None = Field(None, gt=0, description="Training rows, at most, evenly spread.")
    validation: int = Field(100, gt=0, description="Validation rows, at most, of modules of their own.")
    test: int = Field(200, gt=0, description="Test rows, at most, of modules of their own.")
    modules: tuple[str, ...] | None = Field(
        None, description="Top-level modules that are read; default: all."
    )


class BpeConfig(SourceConfig):
    """The same, with the size of a vocabulary of its own."""

    vocabulary: int = Field(
        8192, ge=SMALLEST, description="Tokens of the byte-level BPE, learnt on the training modules."
    )


def gpt2(layers: int = 4, width: int = 256, vocabulary: int = 8192, positions: int = 128) -> nn.Module:
    """A GPT-2 with new weights, of a head for each 64 of its width."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise MissingExtra("models of transformers", "transformers", "hf") from None
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=width, n_layer=layers, n_head=max(1, width // 64),
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def small_gpt2(layers: int = 2, width: int = 128, vocabulary: int = 8192, positions: int = 128) -> nn.Module:
    """The same, smaller."""
    return gpt2(layers, width, vocabulary, positions)


def smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct in bfloat16, as it comes."""
    return packaged.smollm2()


smollm2.trained = True  # type: ignore[attr-defined]


def llama(layers: int = 4, width: int = 192, vocabulary: int = 49_152) -> nn.Module:
    """A Llama with new weights, of a head for each 64 of its width; the output layer is the token vectors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), num_key_value_heads=max(1, width // 64), max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model


class _SourceTask(Task):
    """Rows of tokens of source files; which file goes where is said by its top-level module.

    A row is read as it stands, and yet not ``fixed``: outputs kept of it would take 4 bytes for each token of the vocabulary
    at each position, so teachers are asked anew.
    """

    api_version = 1
    Config = SourceConfig
    config: SourceConfig
    kind = "causal_lm"
    metric = "perplexity"
    name = ""

    def metrics(self) -> Metrics:
        return metrics_named(["perplexity", "nll", "accuracy"], KINDS[self.kind])

    def splits(self) -> Splits:
        made = made_once("data", self._made_from(), self._rows)
        kind, splits = KINDS[self.kind], {}
        for part in stdlib.PARTS:
            ids = made[part].long()
            batch = kind.read({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
            splits[part] = TensorSplit(batch.inputs, batch.labels, mask=batch.mask, fixed=False)
        return Splits(**splits)

    def _made_from(self) -> dict[str, object]:
        return {
            "task": self.name, **self.config.model_dump(mode="json"), **stdlib.origin(self.config.modules),
            **self._tokenizer_from(),
        }  # fmt: skip

    def _tokenizer_from(self) -> dict[str, object]:
        raise NotImplementedError

    def _tokenizer(self) -> Any:
        """What encodes texts, by ``encode_batch``, and the number of the token that ends one."""
        raise NotImplementedError

    def _rows(self) -> dict[str, Tensor]:
        texts: dict[str, list[str]] = {part: [] for part in stdlib.PARTS}
        for module, text in stdlib.sources(self.config.modules):
            texts[stdlib.part(module)].append(text)
        encode, end = self._tokenizer()
        found = {}
        for part, own in texts.items():
            stream = [
                token
                for row in encode.encode_batch(own, add_special_tokens=False)
                for token in [*row.ids, end]
            ]
            count = len(stream) // self.config.length
            if not count:
                raise DataError(
                    f"the {part} modules hold {len(stream)} tokens; expected {self.config.length} at least: lower task.length, "
                    "or read more task.modules"
                )
            rows = torch.tensor(stream[: count * self.config.length]).reshape(count, -1)
            found[part] = rows[stdlib.spread(count, getattr(self.config, part))].int()
        return found


class Source(_SourceTask):
    """The next token of Python source, in a byte-level BPE learnt on the training modules."""

    Config = BpeConfig
    config: BpeConfig
    name = "stdlib-source"
    teachers = {"gpt2": gpt2}
    students = {"gpt2": small_gpt2}
    teacher_training = {
        "steps": 600, "batch_size": 16, "precision": "bf16", "optimizer": {"lr": 2e-3, "weight_decay": 0.1},
        "scheduler": "CosineAnnealingLR", "clip": 1.0,
    }  # fmt: skip

    def _tokenizer_from(self) -> dict[str, object]:
        return {"tokenizers": _tokenizers().__version__}

    def _tokenizer(self) -> Any:
        library = _tokenizers()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = library.trainers.BpeTrainer(
            vocab_size=self.config.vocabulary, special_tokens=[END], show_progress=False,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(self._training_texts(), trainer)
        return tokenizer, tokenizer.token_to_id(END)

    def _training_texts(self) -> Iterator[str]:
        for module, text in stdlib.sources(self.config.modules):
            if stdlib.part(module) == "train":
                yield text


class SourceSmolLM2(_SourceTask):
    """The next token of Python source, in SmolLM2's vocabulary of 49,152 tokens."""

    name = "stdlib-source-smollm2"
    teachers = {"smollm2": smollm2}
    students = {"llama": llama}

    def _tokenizer_from(self) -> dict[str, object]:
        return {"tokenizer": packaged.named(packaged.SMOLLM2)}

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(packaged.smollm2_folder()), gguf_file=packaged.GGUF)
        return tokenizer.backend_tokenizer, 0  # <|endoftext|>, which parts documents in its training


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("task 'stdlib-source'", "transformers", "hf") from None
    return tokenizers
