"""Hugging Face Accelerate."""

import torch
from accelerate import Accelerator
from small import rows, student, teacher
from torch.utils.data import DataLoader

import stillhouse
from stillhouse.adapters.accelerate import attached

accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
loader = DataLoader(rows(), batch_size=4, shuffle=True)
distillation = stillhouse.Distillation("kd", teacher=teacher, task="causal_lm")
step = attached(distillation, accelerator, student, probe=next(iter(loader)), steps=len(loader) // 2)
optimizer = torch.optim.AdamW(step.parameter_groups(), lr=1e-3)
student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
for batch in step.updates(loader):
    with accelerator.accumulate(student):
        loss = step(student, batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
print(f"loss {loss.item():.3f}")
