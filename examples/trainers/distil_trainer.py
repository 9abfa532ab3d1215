"""Hugging Face's Trainer."""

import tempfile

from small import rows, student, teacher
from transformers import Trainer, TrainingArguments

import stillhouse
from stillhouse.adapters.hf import distilling

args = TrainingArguments(
    tempfile.mkdtemp(), per_device_train_batch_size=8, max_steps=8, report_to=[], use_cpu=True
)
distillation = stillhouse.Distillation("kd", teacher=teacher, task="causal_lm")
trainer = distilling(Trainer)(model=student, args=args, train_dataset=rows(), distillation=distillation)
trainer.train()
