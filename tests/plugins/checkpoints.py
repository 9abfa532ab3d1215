"""Small checkpoints of transformers with tokenizers of their own, and files of rows, as a user has them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch

WORDS = "the cat sat on a mat while many dogs ran far away from one small green house near old trees".split()
FILL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
END = "<|end|>"
PROGRAM = "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))\n"


def word_tokenizer(words=WORDS):
    """As BERT's: a token for each word, between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = {token: number for number, token in enumerate([*FILL, *words])}
    made = Tokenizer(models.WordPiece(known, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def byte_tokenizer(size: int = 300):
    """As GPT-2's: byte pairs, nothing added, nothing to pad with."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [PROGRAM, " ".join(WORDS)],
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def gpt2(folder: Path, layers: int = 2, width: int = 16, tokenizer=None, **config) -> Path:
    """A GPT-2 with random weights, its tokenizer beside it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tokenizer or byte_tokenizer()
    torch.manual_seed(layers)
    sizes = {
        "vocab_size": len(tokenizer), "n_positions": 64, "n_embd": width, "n_layer": layers, "n_head": 2,
        "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    return saved(GPT2LMHeadModel(GPT2Config(**{**sizes, **config})), tokenizer, folder)


def bert(
    folder: Path, head: str = "BertModel", layers: int = 2, width: int = 16, tokenizer=None, **config
) -> Path:
    """A BERT with random weights, its tokenizer beside it."""
    import transformers

    tokenizer = tokenizer or word_tokenizer()
    torch.manual_seed(layers)
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2,
        "intermediate_size": 2 * width, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    family = config.pop("family", "Bert")
    made = getattr(transformers, head)(getattr(transformers, f"{family}Config")(**{**sizes, **config}))
    return saved(made, tokenizer, folder)


def saved(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentences(count: int = 40) -> list[str]:
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length in torch.randint(3, 10, (count,), generator=draw).tolist():
        rows.append(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=draw).tolist()))
    return rows


def labelled(count: int = 40) -> list[dict]:
    """Texts, of the class 1 where a cat is in them."""
    return [{"text": text, "label": int("cat" in text)} for text in sentences(count)]


def tagged(count: int = 40) -> list[dict]:
    """Words, of the class ``long`` where they are that."""
    return [
        {"text": text.split(), "label": ["long" if len(word) > 3 else "short" for word in text.split()]}
        for text in sentences(count)
    ]


def written(rows: list[dict], file: Path) -> Path:
    """The rows in a file of the format that its name says."""
    if file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif file.suffix == ".csv":
        with file.open("w", newline="") as open_file:
            table = csv.DictWriter(open_file, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("\n".join(row["text"] for row in rows))
    return file
