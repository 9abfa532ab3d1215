"""Hugging Face's Trainer."""

import tempfile

from small import rows, student
from transformers import Trainer, TrainingArguments

args = TrainingArguments(
    tempfile.mkdtemp(), per_device_train_batch_size=8, max_steps=8, report_to=[], use_cpu=True
)
trainer = Trainer(model=student, args=args, train_dataset=rows())
trainer.train()
