"""One distillation in five trainers: the same models, batches, optimizer and clipping in each."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, DistributedSampler

import stillhouse
from stillhouse.api import Method, hookimpl

V, WIDTH, BATCH = 50, 16, 8
CLIP = 1.0


def gpt2(seed: int, layers: int = 2, width: int = WIDTH) -> nn.Module:
    """A GPT-2 of this size, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    none = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    sizes = {"vocab_size": V, "n_positions": 32, "n_embd": width, "n_layer": layers, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **none, bos_token_id=0, eos_token_id=0))


def texts(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows of 3 to 11 tokens."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length in torch.randint(3, 12, (count,), generator=draw).tolist():
        ids = torch.randint(1, V, (length,), generator=draw)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return rows


def padded(rows) -> dict[str, torch.Tensor]:
    """A batch of them, padded on the right."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: nn.utils.rnn.pad_sequence([torch.as_tensor(row[name]) for row in rows], True, value)
        for name, value in fill.items()
    }


class Losses(Method):
    """Keeps the loss of each update."""

    api_version = 1
    requires = frozenset()
    supports = frozenset({"causal_lm", "classification", "token_classification"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    @hookimpl
    def on_update_end(self, metrics):
        self.found.append(float(metrics["loss"]))


@dataclass
class Case:
    """What is trained, and how."""

    method: object
    steps: int
    accumulate: int
    folder: Path
    student: nn.Module = field(default_factory=lambda: gpt2(1))
    teacher: nn.Module = field(default_factory=lambda: gpt2(2, layers=3, width=24))
    lr: float = 0.1
    world: int = 1

    def __post_init__(self) -> None:
        self.student, self.teacher = copy.deepcopy(self.student), copy.deepcopy(self.teacher)
        self.losses = Losses()
        methods = self.method if isinstance(self.method, list) else [self.method]
        self.data = texts(self.steps * BATCH)
        self.distillation = stillhouse.Distillation(
            [*methods, self.losses], teacher=self.teacher, task="causal_lm"
        )

    @property
    def micro(self) -> int:
        return BATCH // self.accumulate // self.world

    def optimizer(self, groups) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)

    def loader(self, **named) -> DataLoader:
        return DataLoader(self.data, batch_size=self.micro, collate_fn=padded, **named)


def plain(case: Case) -> dict[str, torch.Tensor]:
    from stillhouse.adapters.host import own_generators

    loader = case.loader()
    with own_generators(42):
        step = case.distillation.attach(case.student, probe=padded(case.data[:4]), steps=case.steps)
    with step:
        optimizer = case.optimizer(step.parameter_groups())
        batches = list(loader)
        for start in range(0, len(batches), case.accumulate):
            parts = batches[start : start + case.accumulate]
            step.begin_update(parts)
            for part in parts:
                step(case.student, part).loss.backward()
            clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP)
            optimizer.step()
            step.zero_grad()
        return step.evaluate(case.student, padded(texts(10, seed=3))).metrics


def hf(case: Case, base=None, arguments=None, **named) -> object:
    from transformers import Trainer, TrainingArguments

    from stillhouse.adapters.hf import distilling

    args = {
        "output_dir": str(case.folder),
        "per_device_train_batch_size": case.micro,
        "gradient_accumulation_steps": case.accumulate,
        "max_steps": case.steps,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 42,
        **({"ddp_backend": "gloo"} if case.world > 1 else {}),
    }
    given = {
        "optimizers": (case.optimizer(case.student.parameters()), None),
        "data_collator": padded,
        **named,
    }
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = distilling(base or Trainer)(
            model=case.student,
            args=(arguments or TrainingArguments)(**args),
            train_dataset=given.pop("train_dataset", case.data),
            distillation=case.distillation,
            **given,
        )
        trainer.train()
    return trainer


def sft(case: Case) -> object:
    import datasets
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    rows = datasets.Dataset.from_list(
        [{name: value.tolist() for name, value in row.items()} for row in case.data]
    )
    return hf(
        case,
        SFTTrainer,
        lambda **named: SFTConfig(**named, dataset_kwargs={"skip_prepare_dataset": True}, bf16=False),
        train_dataset=rows,
        data_collator=None,  # TRL's own
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer(), pad_token="0", eos_token="0"),
    )


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def accelerate(case: Case) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from stillhouse.adapters.accelerate import attached

    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    accelerator = Accelerator(gradient_accumulation_steps=case.accumulate, cpu=True)
    with contextlib.redirect_stdout(io.StringIO()):
        made = attached(
            case.distillation,
            accelerator,
            case.student,
            probe=padded(case.data[:4]),
            steps=case.steps,
            seed=42,
        )
    with made as step:
        optimizer = case.optimizer(step.parameter_groups())
        student, optimizer, loader = accelerator.prepare(case.student, optimizer, case.loader())
        for batch in step.updates(loader):
            with accelerator.accumulate(student):
                accelerator.backward(step(student, batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(step.trained_parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()


def lightning(case: Case) -> object:
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger

    from stillhouse.adapters.lightning import DistilledModule, UpdateLoader

    module = DistilledModule(case.student, case.distillation, optimizer=case.optimizer, seed=42)
    # Lightning's own sampler over ranks shuffles.
    rank = int(os.environ.get("RANK", "0"))
    sampler = DistributedSampler(case.data, case.world, rank, shuffle=False) if case.world > 1 else None
    loader = UpdateLoader(
        case.data,
        batch_size=case.micro,
        sampler=sampler,
        collate_fn=padded,
        accumulate_grad_batches=case.accumulate,
    )
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            max_epochs=1,
            accumulate_grad_batches=case.accumulate,
            gradient_clip_val=CLIP,
            accelerator="cpu",
            devices=case.world,
            strategy="ddp" if case.world > 1 else "auto",
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            log_every_n_steps=1,
            logger=CSVLogger(case.folder),
        )
        trainer.fit(module, loader)
    return trainer


TRAINERS = {"plain": plain, "hf": hf, "sft": sft, "accelerate": accelerate, "lightning": lightning}
